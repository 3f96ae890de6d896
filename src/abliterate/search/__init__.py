"""Ways to choose an edit, one file each."""
