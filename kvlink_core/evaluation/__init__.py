"""Evaluation: what a strategy costs in quality."""
