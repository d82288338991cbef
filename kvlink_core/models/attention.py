"""One attention for every architecture, plugged in where transformers lets its users plug their own in.

transformers asks two registries by the name in ``attn_implementation``: one for the mask, to which it hands the
model's own predicate (causal, sliding window, chunk, ...), and one for the attention itself. Ours evaluate that
predicate at the *positions* of the tokens being computed, which need not be contiguous, over all slots of a linked
cache; so windows and chunks are the model's own, and nothing here knows one architecture from another.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvlink_core.models.pruned import PrunedContext
from kvlink_core.models.split_attention import HIDDEN, split_attention, split_parts

#: The value of ``attn_implementation`` for models that KVLink loads.
ATTENTION = "kvlink"

#: Arguments of an attention call that SDPA has no term for: soft-capped scores, attention sinks.
_BEYOND_SDPA = ("softcap", "s_aux")

#: Queries are cut at these fractions of the context.
_PARTS = 4


@dataclass(slots=True)
class _Pass:
    """What the forward pass under way in this thread computes: tokens at ``positions`` over ``length`` slots."""

    positions: torch.Tensor
    length: int
    pruned: PrunedContext | None = None
    blocks: dict[tuple[int, int, torch.dtype], Sequence[_Block]] = field(default_factory=dict)


class FlatAttention(Protocol):
    """A pass that attends in its own way: over tokens of many prompts laid end to end (``flat``)."""

    def mask(self, tokens: int, seen: Callable[..., torch.Tensor], *, causal: bool) -> torch.Tensor:
        """What the model will hand to ``attend`` as its mask; ``causal``: ``seen`` is plain causality."""
        ...

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Any
    ) -> torch.Tensor:
        """``[1, tokens, heads, dim]`` for one layer."""
        ...


_active = threading.local()


@contextmanager
def flattened(attention: FlatAttention) -> Iterator[None]:
    """Inside, forward passes of this thread are attended to by ``attention``."""
    assert getattr(_active, "now", None) is None, "passes do not nest"
    assert getattr(_active, "flat", None) is None, "passes do not nest"
    _active.flat = attention
    try:
        yield
    finally:
        _active.flat = None


@contextmanager
def attending(positions: torch.Tensor, length: int, pruned: PrunedContext | None = None) -> Iterator[None]:
    """Inside, forward passes of this thread compute tokens at ``positions [n]`` that see slots ``0..length-1``.

    A key's slot *is* its position, unless ``pruned`` says otherwise; then ``positions`` are slots. Isolation between
    documents needs no mask: a document that is not computed keeps the keys that it has alone.
    """
    assert getattr(_active, "now", None) is None, "passes do not nest"
    _active.now = _Pass(positions, length, pruned)
    try:
        yield
    finally:
        _active.now = None


#: What is told of each attention of a pass: the module, its queries and keys, rotated, and the scaling of the scores.
Watch = Callable[[torch.nn.Module, torch.Tensor, torch.Tensor, float | None], None]


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Inside, ``watch`` is told of the attention of every layer that this thread computes."""
    assert getattr(_active, "watch", None) is None, "watches do not nest"
    _active.watch = watch
    try:
        yield
    finally:
        _active.watch = None


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
    flat: FlatAttention | None = getattr(_active, "flat", None)
    if flat is not None:
        return flat.mask(q_length, mask_function, causal=allow_is_causal_skip and local_size is None)
    now: _Pass | None = getattr(_active, "now", None)
    if now is None:
        return sdpa_mask(  # type: ignore[no-any-return]
            batch_size, q_length, kv_length, *args, mask_function=mask_function,
            allow_is_causal_skip=allow_is_causal_skip, local_size=local_size, **kwargs,
        )  # fmt: skip
    length = now.length if now.pruned is None else now.pruned.length
    hides_future_alone = allow_is_causal_skip and (local_size is None or length <= local_size)
    if q_length == 1 and hides_future_alone:
        return None
    assert kwargs.get("attention_mask") is None, "padding is not used with a linked cache"
    if now.pruned is not None and not hides_future_alone:
        return now.pruned.asked_by_layer(mask_function, now.length)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=now.positions.device)
    slots = torch.arange(now.length, device=now.positions.device)
    seen = mask_function(zero, zero, now.positions[None, None, :, None], slots[None, None, None, :])
    seen = seen.expand(batch_size, 1, q_length, now.length)
    return seen if now.pruned is None else now.pruned.shared(seen)


def _attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The attention of transformers' registry: SDPA, or the module's own plain one for what SDPA lacks."""
    flat: FlatAttention | None = getattr(_active, "flat", None)
    if flat is not None:
        return flat.attend(query, key, value, attention_mask, kwargs), None
    now: _Pass | None = getattr(_active, "now", None)
    watch: Watch | None = getattr(_active, "watch", None)
    if watch is not None:
        watch(module, query, key, kwargs.get("scaling"))
    shared = True
    if now is not None and now.pruned is not None and attention_mask is not None:
        attention_mask, shared = now.pruned.mask_of(module, attention_mask, query.shape[1])
    if any(kwargs.get(name) is not None for name in _BEYOND_SDPA):
        eager = vars(sys.modules[type(module).__module__])["eager_attention_forward"]
        mask = _additive(attention_mask, query, key)
        return eager(module, query, key, value, mask, **kwargs)  # type: ignore[no-any-return]
    alike = shared and attention_mask is not None and attention_mask.shape[:2] == (1, 1)
    if now is None or attention_mask is None or not alike or query.shape[2] == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)  # type: ignore[no-any-return]
    blocks = _once(now, attention_mask, query, key)
    return _grouped(query, key, value, blocks, kwargs.get("scaling")), None


@dataclass(frozen=True, slots=True)
class _Block:
    """Queries ``begin..end-1`` of a pass, the slots ``low..high-1`` that any of them sees, and their additive mask.

    ``mask``: ``[1, 1, groups x queries, slots]``, the queries of a group laid end to end.
    """

    begin: int
    end: int
    low: int
    high: int
    mask: torch.Tensor


def _grouped(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, blocks: Sequence[_Block], scaling: float | None
) -> torch.Tensor:
    """Grouped-query attention with a mask: ``[1, queries, heads, dim]``.

    SDPA with a mask would repeat every key and value for the queries that share it: for a few queries over a long
    context that copy costs more than the attention. Here these queries are laid end to end instead.
    """
    _, heads, tokens, width = query.shape
    groups = heads // key.shape[1]
    attended = query.new_empty(1, tokens, heads, value.shape[3])
    for block in blocks:
        rows = block.end - block.begin
        folded = query[:, :, block.begin : block.end].reshape(1, heads // groups, groups * rows, width)
        keys, values = key[:, :, block.low : block.high], value[:, :, block.low : block.high]
        parts = split_parts(folded, keys, values)
        if parts > 1:
            result = split_attention(folded, keys, values, block.mask, parts, scaling)
        else:
            result = torch.nn.functional.scaled_dot_product_attention(
                folded, keys, values, attn_mask=block.mask, scale=scaling
            )
        attended[:, block.begin : block.end] = result.reshape(1, heads, rows, -1).transpose(1, 2)
    return attended


def _once(now: _Pass, mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> Sequence[_Block]:
    """The blocks of a mask, made by the first layer that needs them."""
    groups = query.shape[1] // key.shape[1]
    kind = (mask.data_ptr(), groups, query.dtype)
    if kind not in now.blocks:
        now.blocks[kind] = _blocks(now, mask[0, 0], groups, query.dtype)
    return now.blocks[kind]


def _blocks(now: _Pass, seen: torch.Tensor, groups: int, dtype: torch.dtype) -> list[_Block]:
    """Cut the queries where it saves work: link tokens of early documents see a part of the slots only.

    On an accelerator one call over all slots is cheaper than several over fewer, and looking would be a pause.
    """
    bounds = [(0, seen.shape[0])]
    if seen.device.type == "cpu":
        quarters = (now.positions * _PARTS // now.length).tolist()
        cuts = [i for i in range(1, len(quarters)) if quarters[i] != quarters[i - 1]]
        bounds = list(zip([0, *cuts], [*cuts, len(quarters)], strict=True))
    blocks = []
    for begin, end in bounds:
        low, high = 0, now.length
        if seen.device.type == "cpu":
            slots = torch.nonzero(seen[begin:end].any(0)).flatten()
            low, high = int(slots[0]), int(slots[-1]) + 1
        part = seen[begin:end, low:high].repeat(groups, 1)
        hidden = HIDDEN[dtype] if seen.device.type == "cuda" else -torch.inf
        mask = torch.zeros(part.shape, dtype=dtype, device=seen.device).masked_fill_(~part, hidden)
        blocks.append(_Block(begin, end, low, high, mask[None, None]))
    return blocks


def _additive(mask: torch.Tensor | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor | None:
    """0 where a query sees a key and the dtype's lowest number where not; ``None`` for a lone query that sees all."""
    if mask is None:
        if query.shape[2] == 1:
            return None
        assert query.shape[2] == key.shape[2]
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=key.device).tril()[None, None]
    if mask.dtype != torch.bool:
        return mask
    lowest = torch.finfo(query.dtype).min
    return torch.zeros(mask.shape, dtype=query.dtype, device=mask.device).masked_fill_(~mask, lowest)


AttentionInterface.register(ATTENTION, _attention)
AttentionMaskInterface.register(ATTENTION, _mask)
