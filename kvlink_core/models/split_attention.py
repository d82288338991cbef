"""Attention of a few queries over a long context, in parts, on CUDA.

A kernel of one pass gives a multiprocessor some queries of one head, and all slots. A question of 32 tokens on 8 heads
keeps 16 of 132 busy that way. Cut into parts that are attended to beside each other, and are merged by the logarithms
of their sums of exponentials, the same takes a fraction of the time (flash-decoding; the merge is that of DESIGN
section 3).
"""

from __future__ import annotations

import torch

#: What is added to a score that is hidden. Not minus infinity: in a part of which a query sees nothing, that is not a
#: number, and this is a part that weighs nothing.
HIDDEN = {torch.float32: -1e30, torch.float64: -1e30, torch.bfloat16: -1e30, torch.float16: -3e4}

#: Queries that a kernel takes at a time, the fewest slots of a part, the most parts.
_QUERIES, _LEAST, _MOST = 64, 256, 32


def split_parts(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> int:
    """How many parts to cut the slots of ``key [1, heads, slots, dim]`` into; 1 where it does not help."""
    if not query.is_cuda or query.dtype == torch.float64 or key.shape[3] % 8 or value.shape[3] % 8:
        return 1
    slots, parts = key.shape[2], 1
    busy = key.shape[1] * -(-query.shape[2] // _QUERIES)
    enough = torch.cuda.get_device_properties(query.device).multi_processor_count
    while busy * parts < enough and parts < _MOST and slots % (16 * parts) == 0 and slots >= 2 * parts * _LEAST:
        parts *= 2
    return parts


def split_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor,
    parts: int,
    scaling: float | None,
) -> torch.Tensor:
    """``softmax(query key' scaling + mask) value``, float32 in between.

    Args:
        query: ``[1, heads, queries, dim]``.
        key, value: ``[1, heads, slots, dim]``.
        mask: additive ``[1, 1, queries, slots]``, with ``HIDDEN`` for what is hidden.
        parts: as ``split_parts`` says.
    """
    heads, queries = query.shape[1:3]
    keys, values = (t.view(heads, parts, -1, t.shape[2]).transpose(0, 1) for t in (key[0], value[0]))
    bias = mask.view(queries, parts, -1).transpose(0, 1)[:, None].expand(-1, heads, -1, -1)
    attended: torch.Tensor
    attended, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
        query.expand(parts, -1, -1, -1), keys, values, bias, True, scale=scaling
    )
    shares = sums[:, :, :queries].softmax(0)
    merged: torch.Tensor = (attended * shares[..., None]).sum(0, keepdim=True)
    return merged.to(query.dtype)
