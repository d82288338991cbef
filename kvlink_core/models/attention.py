"""One attention for every architecture, plugged in where transformers lets its users plug their own in.

transformers asks two registries by the name in ``attn_implementation``: one for the mask, to which it hands the
model's own predicate (causal, sliding window, chunk, ...), and one for the attention itself. Ours evaluate that
predicate at the *positions* of the tokens being computed, which need not be contiguous, over all slots of a linked
cache; so windows and chunks are the model's own, and nothing here knows one architecture from another.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

#: The value of ``attn_implementation`` for models that KVLink loads.
ATTENTION = "kvlink"

#: Arguments of an attention call that SDPA has no term for: soft-capped scores, attention sinks.
_BEYOND_SDPA = ("softcap", "s_aux")


@dataclass(slots=True)
class _Pass:
    """What the forward pass under way in this thread computes: tokens at ``positions`` over ``length`` slots."""

    positions: torch.Tensor
    length: int
    forms: dict[tuple[int, object], torch.Tensor] = field(default_factory=dict)


_active = threading.local()


@contextmanager
def attending(positions: torch.Tensor, length: int) -> Iterator[None]:
    """Inside, forward passes of this thread compute tokens at ``positions [n]`` that see slots ``0..length-1``.

    A key's slot *is* its position. Isolation between documents needs no mask: a document that is not computed keeps
    the keys that it has alone.
    """
    assert getattr(_active, "now", None) is None, "passes do not nest"
    _active.now = _Pass(positions, length)
    try:
        yield
    finally:
        _active.now = None


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., torch.Tensor],
    allow_is_causal_skip: bool = True,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask: boolean ``[batch, 1, queries, slots]``, or ``None`` when nothing that exists is hidden."""
    now: _Pass | None = getattr(_active, "now", None)
    if now is None:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size, q_length, kv_length, *args, mask_function=mask_function,
            allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **kwargs,
        )  # fmt: skip
    if q_length == 1 and allow_is_causal_skip and (local_size is None or now.length <= local_size):
        return None
    assert kwargs.get("attention_mask") is None, "padding is not used with a linked cache"
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=now.positions.device)
    slots = torch.arange(now.length, device=now.positions.device)
    seen = mask_function(zero, zero, now.positions[None, None, :, None], slots[None, None, None, :])
    return seen.expand(batch_size, 1, q_length, now.length)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of transformers' registry: SDPA, or the module's own plain one for what SDPA lacks."""
    if any(kwargs.get(name) is not None for name in _BEYOND_SDPA):
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        mask = _additive(attention_mask, query, key)
        return eager(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    groups = query.shape[1] // key.shape[1]
    if attention_mask is None or attention_mask.shape[1] != 1 or groups == 1 or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    return _grouped(query, key, value, attention_mask, groups, kwargs.get("scaling")), None


def _grouped(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    groups: int,
    scaling: float | None,
) -> torch.Tensor:
    """Grouped-query attention with a mask, the queries of a group laid end to end.

    SDPA with a mask would repeat every key and value ``groups`` times first: for a few queries over a long context
    that copy costs more than the attention.
    """
    batch, heads, tokens, _ = query.shape
    folded = query.reshape(batch, heads // groups, groups * tokens, query.shape[3])
    attended = torch.nn.functional.scaled_dot_product_attention(
        folded, key, value, attn_mask=_repeated(mask, groups), scale=scaling
    )
    return attended.view(batch, heads, tokens, value.shape[3]).transpose(1, 2).contiguous()


def _once_a_pass(mask: torch.Tensor, kind: object, make: Callable[[], torch.Tensor]) -> torch.Tensor:
    """What all layers derive alike from one mask, made by the first of them."""
    now: _Pass | None = getattr(_active, "now", None)
    if now is None:
        return make()
    key = (mask.data_ptr(), kind)
    if key not in now.forms:
        now.forms[key] = make()
    return now.forms[key]


def _repeated(mask: torch.Tensor, groups: int) -> torch.Tensor:
    return _once_a_pass(mask, groups, lambda: mask.repeat(1, 1, groups, 1))


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """0 where a query sees a key and the dtype's lowest number where not; ``None`` for a lone query that sees all."""
    if mask is None:
        if query.shape[2] == 1:
            return None
        assert query.shape[2] == key.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    seen, dtype = mask, query.dtype

    def make() -> torch.Tensor:
        return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)

    return _once_a_pass(mask, dtype, make)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
