"""Weights between Hugging Face directories and the engine: one table of names, used in both directions."""
