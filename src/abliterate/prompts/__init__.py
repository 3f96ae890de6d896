"""Prompt sets and how they become conversations; behaviours, which say what contrasts with what."""
