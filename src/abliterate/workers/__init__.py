"""Replicas of the model in other processes, here or on a Ray cluster, that share each stage's rows."""
