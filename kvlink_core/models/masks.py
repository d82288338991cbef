"""Attention masks for tokens computed on top of a linked cache, where a key's slot *is* its position.

Isolation between documents needs no mask at query time: documents are not recomputed, their keys already are what
they would be alone. What is computed (prefix, link tokens, suffix, answer) sees every earlier position that its
layer's window reaches.
"""

from __future__ import annotations

import torch

from kvlink_core.models.spec import ModelSpec

#: What Hugging Face models accept as ``attention_mask``: nothing, one 4-D mask, or one per kind of layer.
AttentionMask = torch.Tensor | dict[str, torch.Tensor] | None


def visible(positions: torch.Tensor, length: int, window: int | None) -> torch.Tensor:
    """Boolean ``[queries, length]``: may the token at ``positions[i]`` see slot ``j``?"""
    slots = torch.arange(length, device=positions.device)
    seen = slots[None, :] <= positions[:, None]
    if window is not None:
        seen &= slots[None, :] > positions[:, None] - window
    return seen


def attention_mask(spec: ModelSpec, positions: torch.Tensor, length: int, dtype: torch.dtype) -> AttentionMask:
    """The mask for tokens at int64 ``positions [queries]`` over slots ``0..length-1``.

    ``None`` when one new token sees everything, so that the kernels without a mask are used.
    """
    if positions.shape[0] == 1 and (not spec.windowed or all(w is None or length <= w for w in spec.windows)):
        return None if spec.attention == "sdpa" else _wrap(spec, {None: _form(spec, positions, length, None, dtype)})
    return _wrap(spec, {w: _form(spec, positions, length, w, dtype) for w in dict.fromkeys(spec.windows)})


def _form(
    spec: ModelSpec, positions: torch.Tensor, length: int, window: int | None, dtype: torch.dtype
) -> torch.Tensor:
    seen = visible(positions, length, window)[None, None]
    if spec.attention == "sdpa":
        return seen
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _wrap(spec: ModelSpec, by_window: dict[int | None, torch.Tensor]) -> AttentionMask:
    any_mask = next(iter(by_window.values()))
    if spec.mask_kinds[0] is None:
        return any_mask
    pairs = zip(spec.mask_kinds, spec.windows, strict=True)
    return {kind: by_window.get(window, any_mask) for kind, window in pairs if kind is not None}
