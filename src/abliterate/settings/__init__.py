"""The one place where an option is declared."""
