"""``random``: the control. What a scorer is worth shows against choosing blindly."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from kvlink_core.fingerprint import digest_of_tokens
from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache


class RandomScorer:
    """Numbers drawn anew for each layer and head, and always the same for the same token ids."""

    name: ClassVar[str] = "random"
    reads: ClassVar[Reads] = "cache"

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """See ``Scorer.score``."""
        seed = int(digest_of_tokens(cache.token_ids.tolist()), 16)
        drawn = np.random.Generator(np.random.PCG64(seed)).random(tuple(cache.keys.shape[:3]), dtype=np.float32)
        return torch.from_numpy(drawn).to(cache.keys.device)
