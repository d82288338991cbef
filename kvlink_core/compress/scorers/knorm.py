"""``knorm``: keys of small norm are those that get attention (arXiv 2406.11430)."""

from __future__ import annotations

from typing import ClassVar

import torch

from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache


class KeyNorm:
    """The negative norm of a key; RoPE does not change it."""

    name: ClassVar[str] = "knorm"
    reads: ClassVar[Reads] = "cache"

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """See ``Scorer.score``."""
        norms: torch.Tensor = cache.keys.float().norm(dim=3)
        return -norms
