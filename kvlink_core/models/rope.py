"""Re-position: give unrotated keys the rotation of their place in this prompt (DESIGN section 3).

Nothing of RoPE is computed here. Cosines and sines come from the model's own rotary module, in float32, and are
applied by the very function that the model's attention calls, so every RoPE kind is right by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True, slots=True)
class RopeTables:
    """Cosines and sines of some positions, float32 ``[1, positions, rotary_dim]``."""

    cos: torch.Tensor
    sin: torch.Tensor

    def slice(self, start: int, end: int) -> RopeTables:
        """The tables of positions ``start..end-1`` of these (views)."""
        return RopeTables(self.cos[:, start:end], self.sin[:, start:end])


class Rotary:
    """The rotary embedding of one loaded model.

    Args:
        module: the model's rotary module; called as ``module(x, position_ids)``.
        apply: the ``apply_rotary_pos_emb`` of the model's modelling module, unpatched.
    """

    def __init__(self, module: Any, apply: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._module = module
        self._apply = apply

    @torch.inference_mode()
    def tables(self, positions: torch.Tensor) -> RopeTables:
        """Tables for int64 positions ``[n]``, computed in float32 whatever the model's dtype is."""
        probe = torch.empty(1, dtype=torch.float32, device=positions.device)
        cos, sin = self._module(probe, positions.unsqueeze(0))
        return RopeTables(cos, sin)

    @torch.inference_mode()
    def rotate(self, keys: torch.Tensor, tables: RopeTables) -> torch.Tensor:
        """Rotate keys ``[layers, kv_heads, n, head_dim]`` to the positions of ``tables``.

        Returns a new float32 tensor of the same shape; the caller casts when it writes it to its place.
        """
        keys = keys.float()
        _, rotated = self._apply(keys[:, :0], keys, tables.cos, tables.sin)
        return rotated
