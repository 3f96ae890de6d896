"""The Edit: what leaves which writers; its algebra, and the recipe, which is an edit on disk."""
