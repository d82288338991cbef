"""Between Arrow's buffers and torch's tensors without copying, and the checksum over both."""

from __future__ import annotations

import sys
from itertools import accumulate

import numpy as np
import pyarrow as pa
import torch
import torch.utils.dlpack
import xxhash

from kvlink_core.compress import EncodedColumn
from kvlink_core.errors import PayloadCorruptError

assert sys.byteorder == "little", "stored numbers are little-endian and are not swapped here"


def checksum(data: torch.Tensor) -> str:
    """XXH3-128 of uint8 ``[n]``, as 32 hexadecimal digits."""
    return xxhash.xxh3_128_hexdigest(data.numpy().data)


def tensor_of_buffer(buffer: pa.Buffer) -> torch.Tensor:
    """A uint8 view of ``buffer`` that keeps it alive. Never to be written to.

    Through DLPack, because NumPy marks the view as read-only and torch warns about that.
    """
    if buffer.size == 0:
        return torch.empty(0, dtype=torch.uint8)
    return torch.utils.dlpack.from_dlpack(pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer]))


def array_of_column(column: EncodedColumn) -> pa.LargeBinaryArray:
    """The values of ``column`` as an Arrow array that shares its memory."""
    offsets = np.fromiter(accumulate(column.lengths, initial=0), dtype=np.int64)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(column.data.numpy())]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(column.lengths), buffers)


def column_of_array(name: str, chunked: pa.ChunkedArray) -> EncodedColumn:
    """The reverse: one value per row, none null. Raises ``PayloadCorruptError`` for anything else."""
    if chunked.type != pa.large_binary() or chunked.num_chunks != 1 or chunked.null_count:
        raise PayloadCorruptError(f"column {name!r} is not one run of large binary values without nulls")
    array = chunked.chunk(0)
    _, offset_buffer, data = array.buffers()
    offsets = np.frombuffer(offset_buffer, dtype=np.int64)[array.offset : array.offset + len(array) + 1]
    lengths = np.diff(offsets)
    if (lengths < 0).any() or offsets[0] < 0 or offsets[-1] > (data.size if data else 0):
        raise PayloadCorruptError(f"column {name!r} has offsets outside its data")
    run = data.slice(int(offsets[0]), int(offsets[-1] - offsets[0])) if data else pa.py_buffer(b"")
    return EncodedColumn(tensor_of_buffer(run), tuple(lengths.tolist()))


def tokens_of_bytes(data: bytes) -> torch.Tensor:
    """Stored token ids (``fingerprint.token_bytes``) as int64 ``[tokens]``."""
    return torch.from_numpy(np.frombuffer(data, dtype="<u4").astype(np.int64))
