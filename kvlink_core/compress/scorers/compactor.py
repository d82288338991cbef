"""``compactor``: keys that the other keys cannot stand in for (leverage scores; Compactor, arXiv 2507.08143).

The leverage of a row of a matrix says how far it is from what the other rows span: a key of high leverage is the only
one of its direction, and attention to it goes nowhere else once it is gone. Compactor approximates it by a random
sketch; a document's keys are few enough to solve for it, so here it is exact, but for a ridge that keeps it defined
where a document has fewer tokens than a key has dimensions. Of the paper's score this is the part that looks at keys
alone; its attention within chunks and its calibrated share are left out.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache

#: The ridge, as a share of the mean of the eigenvalues.
_RIDGE = 1e-2


class Compactor:
    """Ridge leverage of the centred keys, before RoPE: ``k (K^T K + r I)^-1 k`` for each key *k* of *K*."""

    name: ClassVar[str] = "compactor"
    reads: ClassVar[Reads] = "cache"

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """See ``Scorer.score``."""
        layers = [leverage(keys.float()) for keys in cache.keys]
        return torch.stack(layers)


def leverage(keys: torch.Tensor) -> torch.Tensor:
    """Scores ``[heads, tokens]`` of float32 ``[heads, tokens, dim]``, 0 to 1; NaN where keys are not finite."""
    centred = keys - keys.mean(dim=1, keepdim=True)
    centred = centred / centred.abs().amax((1, 2), keepdim=True).clamp_min(1e-30)  # so that squares do not overflow
    gram = centred.transpose(1, 2) @ centred
    ridge = _RIDGE * gram.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(1e-20)
    gram = gram + ridge[:, None, None] * torch.eye(gram.shape[1], device=gram.device)
    factor, _ = torch.linalg.cholesky_ex(gram)
    solved = torch.linalg.solve_triangular(factor, centred.transpose(1, 2), upper=False)
    scores: torch.Tensor = solved.square().sum(dim=1)
    return scores
