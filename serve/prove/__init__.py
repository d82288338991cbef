"""Proofs of the service that anybody can run again: under load, and under faults. ``python -m serve.prove --help``."""
