"""A decode step's attention in three launches a layer: write new keys and values, attend to all parts, merge them.

For accelerators. What a program reads is named by addresses in tables (``decode_tables``), so a CUDA graph of a step
stays right when requests join and leave. Imported only where Triton is, which comes with torch's CUDA build alone.

A part is a tile of keys of one document, or of one prompt's own slots, with all rows of queries that read it: its keys
are read once, and split over as many programs as there are tiles (as in flash-decoding), each of which gives the result
and the logarithm of the sum of exponentials (FlashAttention, arXiv 2205.14135).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kvlink_core.models.decode_tables import PART_FIELDS, TOKEN_FIELDS

#: Partial results that are merged at a time.
_AT_ONCE = 16


def tile(dtype: torch.dtype) -> int:
    """Keys of a part at most: as many as a program can hold."""
    return 32 if dtype == torch.float32 else 128


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _write(  # type: ignore[no-untyped-def]
    keys, values, table, layer, key_head, key_token, value_head, value_token,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    row = table + token * FIELDS
    there = tl.load(row) != 0
    dim, value_dim = tl.arange(0, DIM), tl.arange(0, VALUE_DIM)
    out = tl.load(row).to(tl.pointer_type(keys.dtype.element_ty))
    out += layer * tl.load(row + 1) + head * tl.load(row + 2) + dim
    tl.store(out, tl.load(keys + head * key_head + token * key_token + dim), mask=there & (dim >= 0))
    out = tl.load(row + 3).to(tl.pointer_type(values.dtype.element_ty))
    out += layer * tl.load(row + 4) + head * tl.load(row + 5) + value_dim
    tl.store(out, tl.load(values + head * value_head + token * value_token + value_dim), mask=there & (value_dim >= 0))
    if head == 0:
        tl.store(tl.load(row + 6).to(tl.pointer_type(tl.int64)), tl.load(row + 7), mask=there)


@triton.jit(do_not_specialize=["layer"])  # type: ignore[untyped-decorator]
def _attend(  # type: ignore[no-untyped-def]
    query, parts, rows, cos, sin, results, sums, layer, scale, query_head, query_token,
    HEADS: tl.constexpr, GROUPS: tl.constexpr, PADDED: tl.constexpr, BLOCK: tl.constexpr, DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr, TILE: tl.constexpr, TURN: tl.constexpr, PRECISION: tl.constexpr, FIELDS: tl.constexpr,
):  # fmt: skip
    part, head = parts + tl.program_id(0) * FIELDS, tl.program_id(1)
    slots, first, count, result = tl.load(part + 6), tl.load(part + 7), tl.load(part + 8), tl.load(part + 9)
    HALF: tl.constexpr = DIM // 2
    slot, dim, value_dim = tl.arange(0, TILE), tl.arange(0, HALF), tl.arange(0, VALUE_DIM)
    held = slot < slots
    key = tl.load(part).to(tl.pointer_type(query.dtype.element_ty))
    value = tl.load(part + 3).to(tl.pointer_type(query.dtype.element_ty))
    # Rows are of 64 bytes at least, which the compiler cannot know of an address from a table.
    key = tl.multiple_of(key + layer * tl.load(part + 1) + head * tl.load(part + 2), 16)
    value = tl.multiple_of(value + layer * tl.load(part + 4) + head * tl.load(part + 5), 16)
    # The other way round, as the products want them.
    low = tl.load(key + dim[:, None] + slot[None, :] * DIM, mask=held[None, :], other=0.0)
    high = tl.load(key + HALF + dim[:, None] + slot[None, :] * DIM, mask=held[None, :], other=0.0)
    held_values = tl.load(value + slot[:, None] * VALUE_DIM + value_dim[None, :], mask=held[:, None], other=0.0)
    line = tl.arange(0, BLOCK)
    for begin in range(0, count, BLOCK // PADDED):
        row, group = begin + line // PADDED, line % PADDED
        there = (row < count) & (group < GROUPS)
        token = tl.load(rows + first + row, mask=there, other=0)
        at = query + token * query_token + (head * GROUPS + group) * query_head
        q_low = tl.load(at[:, None] + dim[None, :], mask=there[:, None], other=0.0)
        q_high = tl.load(at[:, None] + HALF + dim[None, :], mask=there[:, None], other=0.0)
        if TURN:
            table = ((first + row) * DIM)[:, None] + dim[None, :]
            c_low, c_high = tl.load(cos + table, mask=there[:, None]), tl.load(cos + table + HALF, mask=there[:, None])
            s_low, s_high = tl.load(sin + table, mask=there[:, None]), tl.load(sin + table + HALF, mask=there[:, None])
            f_low, f_high = q_low.to(tl.float32), q_high.to(tl.float32)
            q_low = (f_low * c_low - f_high * s_low).to(query.dtype.element_ty)
            q_high = (f_high * c_high + f_low * s_high).to(query.dtype.element_ty)
        scores = tl.dot(q_low, low, input_precision=PRECISION) + tl.dot(q_high, high, input_precision=PRECISION)
        scores = tl.where(held[None, :], scores * scale, float("-inf"))
        most = tl.max(scores, 1)
        weights = tl.exp(scores - most[:, None])
        total = tl.sum(weights, 1)
        attended = tl.dot(weights.to(query.dtype.element_ty), held_values, input_precision=PRECISION) / total[:, None]
        place = ((result + row) * HEADS + head) * GROUPS + group
        tl.store(results + (place * VALUE_DIM)[:, None] + value_dim[None, :], attended, mask=there[:, None])
        tl.store(sums + place, most + tl.log(total), mask=there)


@triton.jit  # type: ignore[untyped-decorator]
def _merge(  # type: ignore[no-untyped-def]
    results, sums, bounds, order, merged,
    HEADS: tl.constexpr, VALUE_DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    token, head = tl.program_id(0), tl.program_id(1)
    dim, along = tl.arange(0, VALUE_DIM), tl.arange(0, AT_ONCE)
    most, total = tl.full((), float("-inf"), tl.float32), tl.full((), 0.0, tl.float32)
    attended = tl.zeros((VALUE_DIM,), tl.float32)
    begin, end = tl.load(bounds + token), tl.load(bounds + token + 1)
    for first in range(begin, end, AT_ONCE):
        there = first + along < end
        place = tl.load(order + first + along, mask=there, other=0) * HEADS + head
        logs = tl.load(sums + place, mask=there, other=float("-inf"))
        highest = tl.maximum(most, tl.max(logs, 0))
        before, weights = tl.exp(most - highest), tl.exp(logs - highest)
        parts = tl.load(results + (place * VALUE_DIM)[:, None] + dim[None, :], mask=there[:, None], other=0.0)
        attended = attended * before + tl.sum(parts * weights[:, None], 0)
        total = total * before + tl.sum(weights, 0)
        most = highest
    attended = attended / tl.where(total > 0, total, 1.0)  # a line that stands for no token sees nothing
    tl.store(merged + (token * HEADS + head) * VALUE_DIM + dim, attended.to(merged.dtype.element_ty))


def write(keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, layer: int) -> None:
    """Write a layer's ``[kv_heads, tokens, dim]``, dim contiguous, to where ``table`` says."""
    heads, tokens, dim = keys.shape
    _write[(tokens, heads)](
        keys, values, table, layer, *keys.stride()[:2], *values.stride()[:2],
        DIM=dim, VALUE_DIM=values.shape[-1], FIELDS=TOKEN_FIELDS, num_warps=1,
    )  # fmt: skip


def attend(
    query: torch.Tensor,
    parts: torch.Tensor,
    rows: torch.Tensor,
    turns: tuple[torch.Tensor, torch.Tensor] | None,
    bounds: torch.Tensor,
    order: torch.Tensor,
    layer: int,
    *,
    kv_heads: int,
    value_dim: int,
    scale: float,
) -> torch.Tensor:
    """Attention of one token of each of many prompts over all parts of their contexts.

    Args:
        query: ``[heads, tokens, dim]``, dim contiguous; tokens that stand for nobody get 0.
        parts, rows, bounds, order: int64, as ``decode_tables.Tables`` has them.
        turns: float32 cosines and sines ``[rows, dim]`` that turn the queries of each row back; ``None`` for a layer
            that does not rotate.
        layer: counted among those that cache.

    Returns:
        ``[tokens, heads, value_dim]`` in the dtype of ``query``.
    """
    heads, tokens, dim = query.shape
    groups = heads // kv_heads
    padded = triton.next_power_of_2(groups)
    results = torch.empty(order.shape[0], heads, value_dim, dtype=torch.float32, device=query.device)
    sums = torch.empty(order.shape[0], heads, dtype=torch.float32, device=query.device)
    cos, sin = turns if turns is not None else (sums, sums)
    _attend[(parts.shape[0], kv_heads)](
        query, parts, rows, cos, sin, results, sums, layer, scale, *query.stride()[:2],
        HEADS=kv_heads, GROUPS=groups, PADDED=padded, BLOCK=max(16, padded), DIM=dim, VALUE_DIM=value_dim,
        TILE=tile(query.dtype), TURN=turns is not None, PRECISION="ieee", FIELDS=PART_FIELDS, num_warps=4,
    )  # fmt: skip
    merged = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    _merge[(tokens, heads)](
        results, sums, bounds, order, merged, HEADS=heads, VALUE_DIM=value_dim, AT_ONCE=_AT_ONCE, num_warps=2
    )
    return merged
