"""As much of Thrift's compact protocol as reading and writing Parquet's own structures needs.

Arrow trusts what it parses: a page header says how much to allocate, and some impossible values in a footer end the
process instead of raising. So both are looked at with this first, which only ever raises ``PayloadCorruptError``.
https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from kvlink_core.errors import PayloadCorruptError

#: Kinds of values, as they are written.
INT16: Final = 4
INT32: Final = 5
INT64: Final = 6
BINARY: Final = 8
LIST: Final = 9
STRUCT: Final = 12

#: A struct is ``{field number: value}``; a value is a bool, int, bytes, list or struct, or None where it is skipped.
Value = object
Struct = dict[int, Value]

_BYTE, _DOUBLE, _BINARY, _LIST, _SET, _STRUCT = 3, 7, 8, 9, 10, 12
_BOOLS, _INTEGERS = (1, 2), (4, 5, 6)
_MAX_DEPTH = 8


class Reader:
    """Reads values from the start of ``data``; ``position`` is where the next one begins."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def struct(self, depth: int = 0) -> Struct:
        """A struct. Raises ``PayloadCorruptError`` when there is none or it does not end."""
        fields: Struct = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._signed()
            kind = header & 0x0F
            fields[number] = kind == 1 if kind in _BOOLS else self._value(kind, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> Value:
        if depth > _MAX_DEPTH:
            raise PayloadCorruptError("a Parquet structure is nested too deeply")
        if kind in _INTEGERS:
            return self._signed()
        if kind == _BINARY:
            return self._take(self._varint())
        if kind in (_LIST, _SET):
            return self._list(depth)
        if kind == _STRUCT:
            return self.struct(depth)
        if kind in (_BYTE, _DOUBLE, *_BOOLS):  # booleans take a byte inside lists
            self._take(8 if kind == _DOUBLE else 1)
            return None
        raise PayloadCorruptError(f"a Parquet structure has a field of type {kind}")

    def _list(self, depth: int) -> list[Value]:
        header = self._byte()
        size = header >> 4 if header >> 4 != 15 else self._varint()
        if size > len(self._data) - self.position:  # every element takes a byte at least
            raise PayloadCorruptError("a list in a Parquet structure is longer than its file")
        return [self._value(header & 0x0F, depth + 1) for _ in range(size)]

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise PayloadCorruptError("a Parquet structure does not end")
        self.position += 1
        return self._data[self.position - 1]

    def _take(self, length: int) -> bytes:
        if length > len(self._data) - self.position:
            raise PayloadCorruptError("a Parquet structure does not end")
        self.position += length
        return self._data[self.position - length : self.position]

    def _varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return result
            shift += 7
            if shift > 63:
                raise PayloadCorruptError("a number in a Parquet structure is too long")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)


def integer(fields: Struct, number: int) -> int:
    """An integer field. Raises ``PayloadCorruptError`` when it is absent or something else."""
    value = fields.get(number)
    if not isinstance(value, int):
        raise PayloadCorruptError(f"a Parquet structure lacks number {number}")
    return value


def struct(value: Value) -> Struct:
    """``value`` if it is a struct. Raises ``PayloadCorruptError`` otherwise."""
    if not isinstance(value, dict):
        raise PayloadCorruptError("a Parquet structure lacks a part")
    return value


def items(fields: Struct, number: int) -> list[Value]:
    """A list field. Raises ``PayloadCorruptError`` when it is absent or something else."""
    value = fields.get(number)
    if not isinstance(value, list):
        raise PayloadCorruptError(f"a Parquet structure lacks list {number}")
    return value


def write_number(value: int, spare: int = 0) -> bytes:
    """A signed number, with ``spare`` bytes more than it needs: leading zeros, which readers skip."""
    data = bytearray(_unsigned(value << 1 if value >= 0 else ~(value << 1)))
    if spare:
        data[-1] |= 0x80
        data += b"\x80" * (spare - 1) + b"\x00"
    return bytes(data)


def _unsigned(value: int) -> bytes:
    data = bytearray()
    while value > 0x7F:
        data.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*data, value])


def write_bytes(value: bytes) -> bytes:
    """A string with its length before it."""
    return _unsigned(len(value)) + value


def write_list(kind: int, values: Sequence[bytes]) -> bytes:
    """A list of values of one kind, already written."""
    count = len(values)
    head = bytes([count << 4 | kind]) if count < 15 else bytes([0xF0 | kind]) + _unsigned(count)
    return head + b"".join(values)


def write_struct(*fields: tuple[int, int, bytes]) -> bytes:
    """A struct of fields ``(number, kind, value already written)``, numbers rising by at most 15."""
    data, last = [], 0
    for number, kind, value in fields:
        data += [bytes([(number - last) << 4 | kind]), value]
        last = number
    return b"".join(data) + b"\x00"
