"""Writes a shard's Parquet file: FORMAT.md section 2, and no more of Parquet than that needs.

Not Arrow's writer, for one reason: it puts values wherever they fall, and numbers that do not begin at a multiple of
their size have to be copied before they can be computed with. Here they begin at a multiple of eight bytes, or of two.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from typing import IO

import pyarrow as pa
import torch

from kvlink_core.compress import EncodedColumn
from kvlink_core.store.thrift import (
    BINARY,
    INT16,
    INT32,
    INT64,
    LIST,
    STRUCT,
    write_bytes,
    write_list,
    write_number,
    write_struct,
)

MAGIC = b"PAR1"

#: A page's first value begins at a multiple of the first of these for which its header can be made to fit.
ALIGNMENTS = (8, 4, 2)
ALIGNMENT = ALIGNMENTS[0]

_LONGEST_NUMBER = 5  # bytes of a 32-bit number

_INT32_TYPE, _BYTE_ARRAY_TYPE = 0x1, 0x6
_REQUIRED, _OPTIONAL = 0, 1
_PLAIN, _RLE = 0, 3

#: A page's length is a 31-bit number; half of it keeps sums away from every corner.
_MAX_PAGE_BYTES = 2**30


class ShardWriter:
    """Writes documents, one row group each, to a file that is empty.

    Args:
        sink: where to.
        columns: names of the codec's columns.
        metadata: key-value metadata of the file.
    """

    def __init__(self, sink: IO[bytes], columns: Sequence[str], metadata: Mapping[bytes, bytes]) -> None:
        self._sink = sink
        self._columns = ("layer", "token_ids", *columns)
        self._metadata = metadata
        self._groups: list[bytes] = []
        self._rows = 0
        self._at = 0
        self._write(MAGIC)

    def add(self, token_ids: bytes, columns: Sequence[EncodedColumn]) -> None:
        """Write a document."""
        layers = len(columns[0].lengths)
        start = self._at
        numbers = b"".join(layer.to_bytes(4, "little") for layer in range(layers))
        # Definition levels of one bit each: the first is there, the others, in a run, are not.
        levels = b"\x02\x01" + (_run(layers - 1) + b"\x00" if layers > 1 else b"")
        tokens = len(levels).to_bytes(4, "little") + levels + len(token_ids).to_bytes(4, "little") + token_ids
        chunks = [self._chunk(0, layers, [(layers, numbers)]), self._chunk(1, layers, [(layers, tokens)])]
        for number, column in enumerate(columns, start=2):
            chunks.append(self._values(number, column))
        size = self._at - start
        self._groups.append(
            write_struct(
                (1, LIST, write_list(STRUCT, chunks)),
                (2, INT64, write_number(size)),
                (3, INT64, write_number(layers)),
                (5, INT64, write_number(start)),
                (6, INT64, write_number(size)),
                (7, INT16, write_number(len(self._groups) & 0x7FFF)),
            )
        )
        self._rows += layers

    def end(self) -> bytes:
        """Write the footer and return it, without its length and the closing mark."""
        schema = [write_struct((4, BINARY, write_bytes(b"schema")), (5, INT32, write_number(len(self._columns))))]
        for number, name in enumerate(self._columns):
            schema.append(
                write_struct(
                    (1, INT32, write_number(_type(number))),
                    (3, INT32, write_number(_OPTIONAL if number == 1 else _REQUIRED)),
                    (4, BINARY, write_bytes(name.encode())),
                )
            )
        pairs = {**self._metadata, b"ARROW:schema": base64.b64encode(self._schema().serialize().to_pybytes())}
        footer = write_struct(
            (1, INT32, write_number(2)),
            (2, LIST, write_list(STRUCT, schema)),
            (3, INT64, write_number(self._rows)),
            (4, LIST, write_list(STRUCT, self._groups)),
            (
                5,
                LIST,
                write_list(
                    STRUCT,
                    [
                        write_struct((1, BINARY, write_bytes(key)), (2, BINARY, write_bytes(value)))
                        for key, value in pairs.items()
                    ],
                ),
            ),
            (6, BINARY, write_bytes(b"kvlink")),
        )
        self._write(footer, len(footer).to_bytes(4, "little"), MAGIC)
        return footer

    def _schema(self) -> pa.Schema:
        """What Arrow is to read: without it, binary values would be of the type that ends at 2 GiB."""
        first = [pa.field("layer", pa.int32(), nullable=False), pa.field("token_ids", pa.large_binary())]
        return pa.schema(first + [pa.field(name, pa.large_binary(), nullable=False) for name in self._columns[2:]])

    def _values(self, number: int, column: EncodedColumn) -> bytes:
        """A column chunk of the codec's; all values in one page unless that would be too large."""
        parts = list(column.data) if column.data.ndim > 1 else torch.split(column.data, list(column.lengths))
        most = max(1, _MAX_PAGE_BYTES // (4 + max(column.lengths)))
        runs = [parts[start : start + most] for start in range(0, len(parts), most)]
        return self._chunk(number, len(parts), [(len(run), run) for run in runs])

    def _chunk(self, number: int, values: int, pages: Sequence[tuple[int, bytes | Sequence[torch.Tensor]]]) -> bytes:
        start = self._at
        for count, content in pages:
            if isinstance(content, bytes):
                self._write(self._header(count, len(content), align=False), content)
                continue
            self._write(self._header(count, sum(4 + len(value) for value in content), align=True))
            for value in content:
                self._write(len(value).to_bytes(4, "little"), value.numpy().data)
        size = write_number(self._at - start)
        encodings = [write_number(_PLAIN)] + ([write_number(_RLE)] if number == 1 else [])
        described = write_struct(
            (1, INT32, write_number(_type(number))),
            (2, LIST, write_list(INT32, encodings)),
            (3, LIST, write_list(BINARY, [write_bytes(self._columns[number].encode())])),
            (4, INT32, write_number(0)),
            (5, INT64, write_number(values)),
            (6, INT64, size),
            (7, INT64, size),
            (9, INT64, write_number(start)),
        )
        return write_struct((2, INT64, write_number(start)), (3, STRUCT, described))

    def _header(self, count: int, size: int, *, align: bool) -> bytes:
        """A page header; its numbers get leading zeros so that the first value begins where it should."""
        plain = _header(count, size, (0, 0, 0))
        if not align:
            return plain
        room = [_LONGEST_NUMBER - len(write_number(number)) for number in (count, size, size)]
        beyond = self._at + len(plain) + 4
        spare = next((s for a in ALIGNMENTS if (s := -beyond % a) <= sum(room)), 0)
        first = min(spare, room[0])
        second = min(spare - first, room[1])
        return _header(count, size, (first, second, spare - first - second))

    def _write(self, *parts: bytes | memoryview) -> None:
        for part in parts:
            self._sink.write(part)
            self._at += len(part)


def _header(count: int, size: int, spare: tuple[int, int, int]) -> bytes:
    page = write_struct(
        (1, INT32, write_number(count, spare[0])),
        (2, INT32, write_number(_PLAIN)),
        (3, INT32, write_number(_RLE)),
        (4, INT32, write_number(_RLE)),
    )
    return write_struct(
        (1, INT32, write_number(0)),
        (2, INT32, write_number(size, spare[1])),
        (3, INT32, write_number(size, spare[2])),
        (5, STRUCT, page),
    )


def _type(number: int) -> int:
    return _INT32_TYPE if number == 0 else _BYTE_ARRAY_TYPE


def _run(length: int) -> bytes:
    """The header of a run of so many equal levels."""
    header, data = length << 1, bytearray()
    while header > 0x7F:
        data.append(header & 0x7F | 0x80)
        header >>= 7
    return bytes([*data, header])
