"""Between Arrow's buffers and torch's tensors without copying, and the checksum over both."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack
import xxhash

from kvlink_core.compress import EncodedColumn
from kvlink_core.store.pages import Run

assert sys.byteorder == "little", "stored numbers are little-endian and are not swapped here"


def checksum(data: torch.Tensor) -> str:
    """XXH3-128 of uint8 ``[n]``, or of ``[values, length]`` as if laid end to end, as 32 hexadecimal digits."""
    array = data.numpy()
    if array.flags.c_contiguous:
        return xxhash.xxh3_128_hexdigest(array.data)
    running = xxhash.xxh3_128()
    for row in array:
        running.update(row.data)
    return running.hexdigest()


def checksum_of_run(data: memoryview, values: Run) -> str:
    """The same of values where they lie; for many short ones in a third of the time."""
    running = xxhash.xxh3_128()
    step = values.length + values.gap
    for begin in range(values.begin, values.begin + values.count * step, step):
        running.update(data[begin : begin + values.length])
    return running.hexdigest()


def tensor_of_buffer(buffer: pa.Buffer) -> torch.Tensor:
    """A uint8 view of ``buffer`` that keeps it alive. Never to be written to.

    Through DLPack, because NumPy marks the view as read-only and torch warns about that.
    """
    if buffer.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.utils.dlpack.from_dlpack(pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer]))


def column_of_values(whole: torch.Tensor, values: Run | Sequence[tuple[int, int]]) -> EncodedColumn:
    """The column whose values lie in uint8 ``[n]``: a run as it lies there, others copied together."""
    if isinstance(values, Run):
        shape, strides = (values.count, values.length), (values.length + values.gap, 1)
        return EncodedColumn(whole.as_strided(shape, strides, values.begin), (values.length,) * values.count)
    lengths = tuple(end - begin for begin, end in values)
    view, joined, at = whole.numpy(), np.empty(sum(lengths), dtype=np.uint8), 0
    for begin, end in values:
        joined[at : at + end - begin] = view[begin:end]
        at += end - begin
    return EncodedColumn(torch.from_numpy(joined), lengths)


def tokens_of_bytes(data: bytes) -> torch.Tensor:
    """Stored token ids (``fingerprint.token_bytes``) as int64 ``[tokens]``."""
    return torch.from_numpy(np.frombuffer(data, dtype="<u4").astype(np.int64))
