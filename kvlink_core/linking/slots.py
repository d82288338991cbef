"""Where the tokens of a prompt are among the slots of a linked cache: in order, and without what pruning took."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch

from kvlink_core.prompt import Prompt
from kvlink_core.types import DocumentCache


class Slots:
    """From positions to slots. Every token that is not of a document has a slot, a pruned document fewer.

    Args:
        prompt: the laid-out prompt.
        caches: of its documents, in order; none, where no document is placed.
    """

    def __init__(self, prompt: Prompt, caches: Sequence[DocumentCache]) -> None:
        segments = prompt.documents[: len(caches)]
        self._lacking = [cache.tokens - cache.slots for cache in caches]
        before = [0, *accumulate(self._lacking)]
        self.pruned = any(cache.kept is not None for cache in caches)
        self.dropped = before[-1]
        self._ends = torch.tensor([segment.end for segment in segments], dtype=torch.int64)
        self._before = torch.tensor(before, dtype=torch.int64)

    def of(self, positions: torch.Tensor) -> torch.Tensor:
        """The slots of tokens at int64 ``positions`` ``[n]`` on the CPU, none of them inside a pruned document."""
        if not self.pruned:
            return positions
        return positions - self._before[torch.searchsorted(self._ends, positions, right=True)]

    def first_of(self, start: int) -> int:
        """The first slot of the document that starts at that position."""
        return int(self.of(torch.tensor([start])))

    def positions(self, capacity: int) -> torch.Tensor:
        """Int32 ``[capacity]``: the position of what is in each slot, but for those of pruned documents."""
        where = torch.arange(capacity, dtype=torch.int32)
        for end, lacking in zip(self._ends, self._lacking, strict=True):
            where[int(self.of(end)) :] += lacking
        return where
