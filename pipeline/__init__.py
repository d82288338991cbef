"""The precompute job: a corpus goes in, each document's KV cache is computed once and stored.

Runs from a checkout or the image, on Ray: ``python pipeline/precompute.py --help``.
"""
