"""Benchmarks: commands that compare candidates alternately in one process and report ratios."""
