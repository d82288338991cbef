"""What a Parquet file says about its columns and pages, held against what the manifest allows, before Arrow acts on it.

Field numbers are those of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa

from kvlink_core.errors import PayloadCorruptError
from kvlink_core.store.thrift import Reader, integer, items, struct

_MAX_HEADER_BYTES = 512  # without statistics about 30
_INT32, _BYTE_ARRAY = 1, 6
_REQUIRED, _OPTIONAL = 0, 1
_PLAIN, _RLE = 0, 3
_UNCOMPRESSED = 0
_DATA_PAGE = 0

#: Fields of ColumnMetaData that a shard may have: type, encodings, path, codec, values, sizes, data page offset, counts
#: of pages by encoding. Not: dictionaries, statistics, bloom filters. Size statistics (16) are Arrow's and ignored.
_REQUIRED_FIELDS = {1, 2, 3, 4, 5, 6, 7, 9}
_ALLOWED_FIELDS = _REQUIRED_FIELDS | {8, 13, 16}


@dataclass(frozen=True, slots=True)
class Chunk:
    """One column of one row group: where its pages are, and how many values they hold."""

    begin: int
    end: int
    values: int


def read_chunks(footer: bytes, columns: Sequence[str]) -> list[list[Chunk]]:
    """The chunks of every row group, from Parquet's FileMetaData.

    ``columns`` are all of the file: an int32, an optional binary, and required binaries. Raises ``PayloadCorruptError``
    unless the file has exactly these, plainly encoded, uncompressed, and lying one after the other.
    """
    reader = Reader(footer)
    file = reader.struct()
    if reader.position != len(footer):
        raise PayloadCorruptError("a footer is longer than what it holds")
    _check_schema([struct(s) for s in items(file, 2)][1:], columns)
    return [_chunks(struct(group), columns) for group in items(file, 4)]


def _check_schema(leaves: Sequence[dict[int, object]], columns: Sequence[str]) -> None:
    found = [(leaf.get(4), leaf.get(1), leaf.get(3)) for leaf in leaves]
    wanted = [
        (name.encode(), _INT32 if i == 0 else _BYTE_ARRAY, _OPTIONAL if i == 1 else _REQUIRED)
        for i, name in enumerate(columns)
    ]
    if found != wanted or any(leaf.get(5) for leaf in leaves):
        raise PayloadCorruptError("its columns are not those of its codec")


def _chunks(group: dict[int, object], columns: Sequence[str]) -> list[Chunk]:
    rows, found = integer(group, 3), [struct(c) for c in items(group, 1)]
    chunks: list[Chunk] = []
    if len(found) != len(columns):
        raise PayloadCorruptError("a row group has too few or too many columns")
    for index, (name, column) in enumerate(zip(columns, found, strict=True)):
        meta = struct(column.get(3))
        sound = (
            1 not in column  # a path of another file
            and _REQUIRED_FIELDS <= set(meta) <= _ALLOWED_FIELDS
            and meta[1] == (_INT32 if index == 0 else _BYTE_ARRAY)
            and set(items(meta, 2)) <= {_PLAIN, _RLE}
            and meta[3] == [name.encode()]
            and meta[4] == _UNCOMPRESSED
            and meta[5] == rows
        )
        begin, stored, plain = integer(meta, 9), integer(meta, 7), integer(meta, 6)
        if not sound or begin < 4 or not 0 < stored == plain or (chunks and chunks[-1].end != begin):
            raise PayloadCorruptError(f"column {name!r} is not stored as it must be")
        chunks.append(Chunk(begin, begin + stored, rows))
    return chunks


def check_pages(source: pa.NativeFile, chunk: Chunk) -> None:
    """Walk the page headers of ``chunk`` in ``source``.

    Raises ``PayloadCorruptError`` unless they fill it exactly, are uncompressed data pages of version 1, and have its
    number of values in all.
    """
    at, values = chunk.begin, 0
    while at < chunk.end:
        source.seek(at)
        reader = Reader(bytes(source.read(min(_MAX_HEADER_BYTES, chunk.end - at))))
        header = reader.struct()
        kind, plain, stored = (integer(header, number) for number in (1, 2, 3))
        if kind != _DATA_PAGE or not 0 <= stored == plain:
            raise PayloadCorruptError("a page is not an uncompressed data page")
        values += integer(struct(header.get(5)), 1)
        at += reader.position + stored
    if at != chunk.end or values != chunk.values:
        raise PayloadCorruptError("pages do not add up to their column")
