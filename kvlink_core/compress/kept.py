"""Which tokens a pruned document still has, as bits (FORMAT.md section 8, "Pruning")."""

from __future__ import annotations

import math

import numpy as np
import torch

from kvlink_core.compress.codec import CacheShape, EncodedColumn, fresh
from kvlink_core.errors import PayloadCorruptError

#: The column's name.
KEPT = "kept"


def kept_tokens(thousandths: int, tokens: int) -> int:
    """How many of ``tokens`` a document keeps of which that many thousandths are kept: rounded up, so 1 at least."""
    return -(-thousandths * tokens // 1000)


def kept_bytes(shape: CacheShape) -> int:
    """Bytes of one layer's value for an unpruned cache of ``shape``."""
    return shape.kv_heads * math.ceil(shape.tokens / 8)


def pack_kept(kept: torch.Tensor, tokens: int) -> EncodedColumn:
    """The column of int32 ``[layers, kv_heads, slots]``, ascending and below ``tokens``."""
    layers, heads, _ = kept.shape
    there = torch.zeros(layers, heads, tokens, dtype=torch.uint8)
    there.scatter_(2, kept.cpu().to(torch.int64), 1)
    packed = torch.from_numpy(np.packbits(there.numpy(), axis=2, bitorder="little"))
    return EncodedColumn(packed.view(-1), (packed[0].numel(),) * layers)


def unpack_kept(column: EncodedColumn, shape: CacheShape, slots: int) -> torch.Tensor:
    """The reverse, for an unpruned cache of ``shape`` of which each layer and head has ``slots`` tokens left.

    Takes memory in proportion to the column's own. Raises ``PayloadCorruptError`` when a layer or head has more tokens
    or fewer, or some beyond the document's end.
    """
    size = kept_bytes(shape)
    if column.lengths != (size,) * shape.layers or column.data.numel() != size * shape.layers:
        raise PayloadCorruptError(f"column {KEPT!r} is not {shape.layers} values of {size} bytes")
    packed = column.data.numpy().reshape(shape.layers * shape.kv_heads, -1)
    there = np.unpackbits(packed, axis=1, bitorder="little")
    if there[:, shape.tokens :].any():
        raise PayloadCorruptError(f"column {KEPT!r} names tokens beyond the document's {shape.tokens}")
    if (np.count_nonzero(there, axis=1) != slots).any():
        raise PayloadCorruptError(f"column {KEPT!r} does not name {slots} tokens of each layer and head")
    kept = fresh((shape.layers, shape.kv_heads, slots), torch.int32, torch.device("cpu"))
    np.copyto(kept.view(-1).numpy(), np.nonzero(there)[1], casting="unsafe")
    return kept
