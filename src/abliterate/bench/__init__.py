"""Benchmarks of lm-evaluation-harness on models, adapters and recipes, and whether they differ by more than chance."""
