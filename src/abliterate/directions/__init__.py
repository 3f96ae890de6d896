"""The stream's statistics and the directions in them."""
