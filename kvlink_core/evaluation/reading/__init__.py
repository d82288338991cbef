"""Readers of the usual file formats of evaluation data: streaming, compressed or not, errors with file and line."""

from kvlink_core.evaluation.reading.datasets import open_dataset

__all__ = ["open_dataset"]
