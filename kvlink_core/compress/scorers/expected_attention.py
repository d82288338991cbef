"""``expected-attention``: what attention a key is to expect of queries that come later (arXiv 2510.00636).

Queries before RoPE are taken for normally distributed, with a mean and a covariance for each head. A query that
comes later is rotated by its position; the rotation is averaged over the positions ahead, so that the expected weight
of a key has a closed form. What a key contributes is that weight times the norm of its value. Mean and covariance are
those of the document's own queries, seen while it was encoded: no question is needed.
"""

from __future__ import annotations

from typing import ClassVar

import torch

from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache

#: Positions ahead of the document over which a query's rotation is averaged.
AHEAD = 512

#: Added to a weight, so that values of large norm count for something where the weights are all but zero.
_FLOOR = 1e-2


class ExpectedAttention:
    """Expected attention times the norm of the value."""

    name: ClassVar[str] = "expected-attention"
    reads: ClassVar[Reads] = "queries"

    def score(self, cache: DocumentCache, reading: Reading | None) -> torch.Tensor:
        """See ``Scorer.score``."""
        assert reading is not None
        turns: dict[object, torch.Tensor] = {}
        layers = []
        for layer, (kind, keys) in enumerate(zip(reading.kinds, cache.keys, strict=True)):
            if kind not in turns:
                turns[kind] = _turn(reading, layer, keys)
            layers.append(_weights(reading, layer, keys, turns[kind]))
        weights = torch.stack(layers)
        norms: torch.Tensor = cache.values.float().norm(dim=3)
        return (weights + _FLOOR / cache.tokens) * norms


def _turn(reading: Reading, layer: int, keys: torch.Tensor) -> torch.Tensor:
    """The rotation averaged over the positions ahead: row *i* is where unit vector *i* goes.

    Rotating is linear: what it does to the unit vectors is its matrix.
    """
    _, tokens, dim = keys.shape
    unit = torch.eye(dim, device=keys.device)[:, None].expand(dim, AHEAD, dim)
    return reading.rotate(layer, unit, torch.arange(tokens, tokens + AHEAD, device=keys.device)).mean(dim=1)


def _weights(reading: Reading, layer: int, keys: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """Expected attention weights ``[kv_heads, tokens]``, the mean over the queries that share a key."""
    kv_heads, tokens, dim = keys.shape
    queries = reading.queries[layer].float()
    mean = queries.mean(dim=1)
    off = queries - mean[:, None]
    covariance = off.transpose(1, 2) @ off / tokens
    rotated = reading.rotate(layer, keys.float(), torch.arange(tokens, device=keys.device))
    mean, covariance = mean @ turn, turn.T @ covariance @ turn
    groups = mean.shape[0] // kv_heads
    mean, covariance = mean.view(kv_heads, groups, dim), covariance.view(kv_heads, groups, dim, dim)
    scale = reading.scaling[layer]
    expected = torch.einsum("hgd,htd->hgt", mean, rotated) * scale
    spread = torch.einsum("htd,hgde,hte->hgt", rotated, covariance, rotated) * (scale * scale / 2)
    weights: torch.Tensor = (expected + spread).softmax(dim=2).mean(dim=1)
    return weights
