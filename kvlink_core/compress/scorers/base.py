"""What a scorer is."""

from __future__ import annotations

from typing import ClassVar, Protocol

import torch

from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache


class Scorer(Protocol):
    """A way to tell which tokens of a document are worth keeping, for questions that nobody has asked yet.

    ``name`` is what users select; ``reads`` is what it has to see of the document beyond its cache. Deterministic, and
    without state.
    """

    name: ClassVar[str]
    reads: ClassVar[Reads]

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """Float32 ``[layers, kv_heads, tokens]`` on the cache's device; the greater, the more worth keeping.

        Args:
            cache: not pruned, keys before RoPE; not written to.
            reading: what ``reads`` says, of the same document; ``None`` for ``cache``.
        """
        ...
