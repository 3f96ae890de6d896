"""Ways to apply an edit, one file each."""
