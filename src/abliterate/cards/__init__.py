"""Text about a result, for the folder that goes to the Hub."""
