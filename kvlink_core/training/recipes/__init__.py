"""Recipes of ``kvlink train``: link tokens, with or without the model, and soft wraps (docs/training.md)."""
