"""Parquet files byte by byte, from the specifications alone: to write shards by hand, and to bend real ones.

Shares nothing with the product. A struct is a list of ``[field number, kind, value]``, so that what is read and written
again is the same, byte for byte.
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import hashlib
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)

Struct = list[list[Any]]


class _In:
    def __init__(self, data: bytes, at: int) -> None:
        self.data, self.at = data, at

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def varint(self) -> int:
        value = shift = 0
        while True:
            byte = self.byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def value(self, kind: int) -> Any:
        match kind:
            case 4 | 5 | 6:
                raw = self.varint()
                return raw // 2 if raw % 2 == 0 else -(raw + 1) // 2
            case 8:
                length = self.varint()
                self.at += length
                return self.data[self.at - length : self.at]
            case 9:
                head = self.byte()
                count = head >> 4
                if count == 15:
                    count = self.varint()
                return [head & 15, [self.value(head & 15) for _ in range(count)]]
            case 12:
                return self.struct()
            case _:
                raise ValueError(f"kind {kind}")

    def struct(self) -> Struct:
        fields: Struct = []
        number = 0
        while True:
            head = self.byte()
            if head == 0:
                return fields
            number = number + (head >> 4) if head >> 4 else self.value(I16)
            kind = head & 15
            fields.append([number, kind, kind == TRUE if kind in (TRUE, FALSE) else self.value(kind)])


def read_struct(data: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct at a place, and where it ends."""
    source = _In(data, at)
    return source.struct(), source.at


def varint(value: int) -> bytes:
    out = []
    while True:
        value, low = divmod(value, 128)
        if not value:
            return bytes([*out, low])
        out.append(low + 128)


def _written(kind: int, value: Any) -> bytes:
    match kind:
        case 1 | 2:
            return b""
        case 4 | 5 | 6:
            return varint(2 * value if value >= 0 else -2 * value - 1)
        case 8:
            return varint(len(value)) + value
        case 9:
            element, values = value
            head = (
                bytes([len(values) * 16 + element])
                if len(values) < 15
                else bytes([240 + element]) + varint(len(values))
            )
            return head + b"".join(_written(element, v) for v in values)
        case 12:
            return write_struct(value)
        case _:
            raise ValueError(f"kind {kind}")


def write_struct(fields: Struct) -> bytes:
    out, last = b"", 0
    for number, kind, value in fields:
        kind = (TRUE if value else FALSE) if kind in (TRUE, FALSE) else kind
        delta = number - last
        out += bytes([delta * 16 + kind]) if 0 < delta < 16 else bytes([kind]) + _written(I16, number)
        out += _written(kind, value)
        last = number
    return out + b"\0"


def get(fields: Struct, number: int) -> Any:
    return next(value for n, _, value in fields if n == number)


def put(fields: Struct, number: int, value: Any) -> None:
    next(field for field in fields if field[0] == number)[2] = value


def footer_of(data: bytes) -> bytes:
    """FileMetaData of a Parquet file."""
    return data[-8 - int.from_bytes(data[-8:-4], "little") : -8]


def with_footer(data: bytes, footer: bytes) -> bytes:
    """The file with another footer."""
    return data[: len(data) - 8 - len(footer_of(data))] + footer + len(footer).to_bytes(4, "little") + b"PAR1"


def name_of(data: bytes) -> str:
    """The name that FORMAT.md gives a shard."""
    return hashlib.sha256(footer_of(data)).hexdigest() + ".parquet"


def metadata(footer: Struct) -> dict[bytes, list[Any]]:
    """The fields of each key-value pair by key, to be changed in place."""
    return {get(pair, 1): next(f for f in pair if f[0] == 2) for pair in get(footer, 5)[1]}


def page(count: int, content: bytes) -> bytes:
    """A plain, uncompressed data page with its header."""
    described = [[1, I32, count], [2, I32, 0], [3, I32, 3], [4, I32, 3]]
    header = [[1, I32, 0], [2, I32, len(content)], [3, I32, len(content)], [5, STRUCT, described]]
    return write_struct(header) + content


def binary(values: list[bytes]) -> bytes:
    """Values of a binary column, PLAIN."""
    return b"".join(len(v).to_bytes(4, "little") + v for v in values)


def parquet(
    columns: list[tuple[str, int, bool]], groups: list[list[tuple[int, list[bytes]]]], pairs: dict[str, str]
) -> bytes:
    """A file of row groups.

    Args:
        columns: name, Parquet's type, whether optional.
        groups: for each row group and column the number of values, and pages.
        pairs: key-value metadata.
    """
    out, described, rows = b"PAR1", [], 0
    for group in groups:
        chunks, start = [], len(out)
        for (name, kind, _), (count, pages) in zip(columns, group, strict=True):
            at = len(out)
            out += b"".join(pages)
            size = len(out) - at
            meta = [
                [1, I32, kind], [2, LIST, [I32, [0, 3]]], [3, LIST, [BINARY, [name.encode()]]], [4, I32, 0],
                [5, I64, count], [6, I64, size], [7, I64, size], [9, I64, at],
            ]  # fmt: skip
            chunks.append([[2, I64, at], [3, STRUCT, meta]])
        rows += group[0][0]
        described.append([[1, LIST, [STRUCT, chunks]], [2, I64, len(out) - start], [3, I64, group[0][0]]])
    schema: list[Struct] = [[[4, BINARY, b"schema"], [5, I32, len(columns)]]]
    schema += [[[1, I32, k], [3, I32, int(optional)], [4, BINARY, n.encode()]] for n, k, optional in columns]
    footer = write_struct(
        [
            [1, I32, 2], [2, LIST, [STRUCT, schema]], [3, I64, rows], [4, LIST, [STRUCT, described]],
            [5, LIST, [STRUCT, [[[1, BINARY, k.encode()], [2, BINARY, v.encode()]] for k, v in pairs.items()]]],
        ]
    )  # fmt: skip
    return out + footer + len(footer).to_bytes(4, "little") + b"PAR1"
