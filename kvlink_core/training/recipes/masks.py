"""The attention mask of linking (DESIGN section 3) over packed rows, for SDPA and for FlexAttention.

A test holds a training loss under this mask against the negative log-likelihood of the same answer through linking.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from kvlink_core.errors import UnsupportedModelError


def visible(context: Tensor, document: Tensor, window: int | None = None) -> Tensor:
    """Boolean ``[rows, 1, tokens, tokens]``, true where the row's token may attend to the column's.

    Args:
        context, document: int ``[rows, tokens]``, as ``collate`` gives them.
        window: tokens that a layer with a sliding window sees, its own included.
    """
    index = torch.arange(context.shape[1], device=context.device)
    back = index[:, None] - index[None, :]
    near = back >= 0 if window is None else (back >= 0) & (back < window)
    same = context[:, :, None] == context[:, None, :]
    own = (document[:, :, None] == 0) | (document[:, :, None] == document[:, None, :])
    return (near[None] & same & own)[:, None]


def additive(context: Tensor, document: Tensor, dtype: torch.dtype, window: int | None = None) -> Tensor:
    """``visible`` as what attention adds: 0, or the lowest number of ``dtype``."""
    seen = visible(context, document, window)
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def block_mask(context: Tensor, document: Tensor, window: int | None = None) -> Any:
    """``visible`` for FlexAttention: computed where needed, and blocks that it empties are skipped."""
    from torch.nn.attention.flex_attention import create_block_mask

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (document[b, q] == 0) | (document[b, q] == document[b, k])
        seen = (q >= k) & (context[b, q] == context[b, k]) & own
        return seen if window is None else seen & (q - k < window)

    rows, tokens = context.shape
    return create_block_mask(sees, rows, None, tokens, tokens, device=context.device)


def attention_masks(
    config: Any, context: Tensor, document: Tensor, dtype: torch.dtype, attention: Literal["sdpa", "flex"]
) -> Any:
    """What a model of ``config`` takes as ``attention_mask``: one, or one for each type of its layers."""

    def make(window: int | None) -> Any:
        if attention == "flex":
            return block_mask(context, document, window)
        return additive(context, document, dtype, window)

    window = getattr(config, "sliding_window", None)
    types = getattr(config, "layer_types", None)
    if types is None:
        return make(window)
    return {t: make(window if t == "sliding_attention" else None) for t in sorted(set(types))}


def check_layers(config: Any) -> None:
    """Raises ``UnsupportedModelError`` where a layer attends in a way that these masks do not know."""
    known = {"full_attention", "sliding_attention"}
    if unknown := set(getattr(config, "layer_types", None) or ()) - known:
        raise UnsupportedModelError(
            f"this model has layers of the type {sorted(unknown)[0]!r}; training knows the mask of full and of sliding "
            "attention only."
        )
