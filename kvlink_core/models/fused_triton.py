"""One launch that rotates the keys of all documents, in halves, and writes keys and values into their place.

For accelerators, where a call for each document costs more than the work: docs/benchmarks.md has the figures. Imported
only where there is one, since Triton comes with torch's CUDA build alone.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

#: Tokens of a program, and of these at a time.
_TOKENS, _AT_ONCE = 64, 16


@triton.jit  # type: ignore[untyped-decorator]
def _kernel(  # type: ignore[no-untyped-def]
    keys, values, starts, lengths, block_document, block_first, cos, sin, out_keys, out_values, capacity,
    DIM: tl.constexpr, TOKENS: tl.constexpr, AT_ONCE: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    block, layer = tl.program_id(0), tl.program_id(1).to(tl.int64)
    document = tl.load(block_document + block)
    length, start = tl.load(lengths + document), tl.load(starts + document)
    key = tl.load(keys + document).to(tl.pointer_type(out_keys.dtype.element_ty))
    value = tl.load(values + document).to(tl.pointer_type(out_keys.dtype.element_ty))
    half: tl.constexpr = DIM // 2
    dim = tl.arange(0, half)[None, :]
    for begin in range(0, TOKENS, AT_ONCE):
        token = tl.load(block_first + block) + begin + tl.arange(0, AT_ONCE)
        there = (token < length)[:, None]
        table = (start + token)[:, None] * DIM + dim
        # Read once for all heads: of a small head, tables weigh as much as keys and values.
        cos_low, cos_high = tl.load(cos + table, mask=there), tl.load(cos + table + half, mask=there)
        sin_low, sin_high = tl.load(sin + table, mask=there), tl.load(sin + table + half, mask=there)
        for head in range(HEADS):
            row = layer * HEADS + head
            read = (row * length + token)[:, None] * DIM + dim
            write = (row * capacity + start + token)[:, None] * DIM + dim
            low = tl.load(key + read, mask=there).to(tl.float32)
            high = tl.load(key + read + half, mask=there).to(tl.float32)
            tl.store(out_keys + write, (low * cos_low - high * sin_low).to(out_keys.dtype.element_ty), mask=there)
            tl.store(
                out_keys + write + half, (high * cos_high + low * sin_high).to(out_keys.dtype.element_ty), mask=there
            )
            tl.store(out_values + write, tl.load(value + read, mask=there), mask=there)
            tl.store(out_values + write + half, tl.load(value + read + half, mask=there), mask=there)


def place_all(
    documents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    starts: Sequence[int],
    cos: torch.Tensor,
    sin: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """Place some layers of documents.

    Args:
        documents: keys and values, each contiguous ``[layers, kv_heads, tokens, dim]``, of the dtype of the outputs.
        starts: each document's first slot.
        cos, sin: float32 ``[1, positions, dim]``; row i is of slot i.
        out_keys, out_values: contiguous ``[layers, kv_heads, slots, dim]``.
    """
    layers, kv_heads, capacity, dim = out_keys.shape
    lengths = [keys.shape[2] for keys, _ in documents]
    blocks = [(d, first) for d, length in enumerate(lengths) for first in range(0, length, _TOKENS)]
    columns = (
        [keys.data_ptr() for keys, _ in documents],
        [values.data_ptr() for _, values in documents],
        list(starts),
        lengths,
        [d for d, _ in blocks],
        [first for _, first in blocks],
    )
    flat = torch.tensor([x for column in columns for x in column]).pin_memory()
    parts = torch.split(flat.to(out_keys.device, non_blocking=True), [len(column) for column in columns])
    grid = (len(blocks), layers)
    _kernel[grid](
        *parts, cos, sin, out_keys, out_values, capacity,
        DIM=dim, TOKENS=_TOKENS, AT_ONCE=_AT_ONCE, HEADS=kv_heads, num_warps=4,
    )  # fmt: skip
