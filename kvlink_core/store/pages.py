"""A look at Parquet page headers before Arrow acts on them.

A page header says how large the page becomes once decompressed, and Arrow allocates that much on its word. So the
headers are walked first, and their claims held against what the manifest allows. This is Thrift's compact protocol, as
little of it as a page header uses: https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

import pyarrow as pa

from kvlink_core.errors import PayloadCorruptError

_MAX_HEADER_BYTES = 512  # without statistics about 30
_BOOL_TRUE, _BOOL_FALSE, _BYTE, _I16, _I32, _I64, _DOUBLE, _BINARY, _LIST, _STRUCT = 1, 2, 3, 4, 5, 6, 7, 8, 9, 12
_DATA_PAGE, _DATA_PAGE_HEADER = 0, 5
_MAX_DEPTH = 4


def check_pages(source: pa.NativeFile, begin: int, end: int, *, values: int, plain: int) -> None:
    """Walk the pages of a column chunk at ``begin`` to ``end`` of ``source``.

    Raises ``PayloadCorruptError`` unless they fill it exactly, are version 1 data pages, have ``values`` values in all
    and claim to become at most ``plain`` bytes.
    """
    at, found, claimed = begin, 0, 0
    while at < end:
        source.seek(at)
        header = _Reader(bytes(source.read(min(_MAX_HEADER_BYTES, end - at))))
        fields = header.struct()
        kind, uncompressed, compressed = (_number(fields, i) for i in (1, 2, 3))
        data = fields.get(_DATA_PAGE_HEADER)
        if kind != _DATA_PAGE or not isinstance(data, dict) or uncompressed < 0 or compressed < 0:
            raise PayloadCorruptError("a page is not a data page")
        found += _number(data, 1)
        claimed += uncompressed
        at += header.position + compressed
        if claimed > plain:
            raise PayloadCorruptError(f"pages claim {claimed} bytes, and {plain} is all there can be")
    if at != end or found != values:
        raise PayloadCorruptError("pages do not add up to their column")


def _number(fields: dict[int, object], field: int) -> int:
    value = fields.get(field)
    if not isinstance(value, int):
        raise PayloadCorruptError(f"a page header lacks field {field}")
    return value


class _Reader:
    """Thrift compact values from the start of ``data``; ``position`` is where the next one begins."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.position = 0

    def _byte(self) -> int:
        if self.position >= len(self._data):
            raise PayloadCorruptError("a page header does not end")
        self.position += 1
        return self._data[self.position - 1]

    def _varint(self) -> int:
        result = shift = 0
        while True:
            byte = self._byte()
            result |= (byte & 0x7F) << shift
            if not byte & 0x80:
                return result
            shift += 7
            if shift > 63:
                raise PayloadCorruptError("a number in a page header is too long")

    def _signed(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def struct(self, depth: int = 0) -> dict[int, object]:
        """Fields of a struct by number; binaries and lists are skipped and come as ``None``."""
        fields: dict[int, object] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._signed()
            fields[number] = self._value(header & 0x0F, depth + 1)
        return fields

    def _value(self, kind: int, depth: int) -> object:
        if depth > _MAX_DEPTH:
            raise PayloadCorruptError("a page header is nested too deeply")
        if kind in (_BOOL_TRUE, _BOOL_FALSE):
            return kind == _BOOL_TRUE
        if kind in (_I16, _I32, _I64):
            return self._signed()
        if kind == _STRUCT:
            return self.struct(depth)
        if kind == _BINARY:
            self.position += self._varint()
        elif kind in (_BYTE, _DOUBLE):
            self.position += 1 if kind == _BYTE else 8
        elif kind == _LIST:
            self._skip_list(depth)
        else:
            raise PayloadCorruptError(f"a page header has a field of type {kind}")
        return None

    def _skip_list(self, depth: int) -> None:
        header = self._byte()
        size = header >> 4 if header >> 4 != 15 else self._varint()
        for _ in range(min(size, len(self._data) + 1)):
            if header & 0x0F in (_BOOL_TRUE, _BOOL_FALSE):
                self.position += 1
            else:
                self._value(header & 0x0F, depth)
