"""A loaded model, its parts and its writers, found by looking and proved by measuring."""
