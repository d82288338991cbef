"""Values of one column: plain bytes, or zstd frames where these are shorter (FORMAT.md section 8)."""

from __future__ import annotations

import pyarrow as pa
import torch
import torch.utils.dlpack

from kvlink_core.compress.codec import EncodedColumn, fresh, packed
from kvlink_core.errors import PayloadCorruptError

#: A frame is at least this part of its plain bytes, so that a short file cannot ask for much memory.
MOST_SHRUNK = 16


def least_bytes(plain: int, level: int) -> int:
    """The fewest bytes that a value of ``plain`` bytes may have."""
    return -(-plain // MOST_SHRUNK) if level else plain


def pack_values(plain: torch.Tensor, level: int) -> EncodedColumn:
    """A column of the rows of uint8 ``[layers, bytes]``; for level 0 a view of them."""
    plain = plain.contiguous().cpu()
    layers, size = plain.shape
    if not level:
        return EncodedColumn(plain.view(-1), (size,) * layers)
    codec = pa.Codec("zstd", compression_level=level)
    values = []
    for row in plain:
        frame = codec.compress(pa.py_buffer(row.numpy()))
        values.append(_tensor(frame) if least_bytes(size, level) <= frame.size < size else row)
    return EncodedColumn(torch.cat(values), tuple(len(v) for v in values))


def unpack_values(name: str, column: EncodedColumn, layers: int, size: int, level: int) -> torch.Tensor:
    """The plain bytes again, uint8 ``[layers, size]``; a view of the column where all of them are plain.

    Raises ``PayloadCorruptError`` when the values cannot have ``size`` plain bytes each, before memory for these is
    taken, or when a frame is damaged.
    """
    least = least_bytes(size, level)
    lengths = column.lengths
    if len(lengths) != layers or not all(least <= n <= size for n in lengths) or column.data.numel() != sum(lengths):
        raise PayloadCorruptError(f"column {name!r} is not {layers} values of {size} bytes")
    data = packed(column.data)
    if all(n == size for n in lengths):
        return data.view(layers, size)
    codec = pa.Codec("zstd")
    plain = fresh((layers, size), torch.uint8, data.device)
    for row, value in zip(plain, torch.split(data, list(lengths)), strict=True):
        if len(value) < size:
            try:
                value = _tensor(codec.decompress(pa.py_buffer(value.numpy()), decompressed_size=size))
            except (
                OSError
            ) as error:  # what Arrow raises for a frame that is damaged, or longer or shorter than it must be
                raise PayloadCorruptError(f"column {name!r} holds a frame that cannot be unpacked: {error}") from error
        row.copy_(value)
    return plain


def _tensor(buffer: pa.Buffer) -> torch.Tensor:
    """A uint8 view that keeps ``buffer`` alive."""
    return torch.utils.dlpack.from_dlpack(pa.Array.from_buffers(pa.uint8(), buffer.size, [None, buffer]))
