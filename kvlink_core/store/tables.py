"""Small Parquet files that no name vouches for: the catalog's, and the copies of token ids.

They are looked at before Arrow is: it ends the process on some impossible values, and allocates what a page claims.
"""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from kvlink_core.errors import PayloadCorruptError
from kvlink_core.store.parquet import MAGIC
from kvlink_core.store.thrift import Reader, Struct, integer, items, struct

#: What Parquet knows: types, repetitions, compressions, encodings.
_TYPES, _REPETITIONS, _COMPRESSIONS = range(8), range(2), range(8)
_ENCODINGS = {0, *range(2, 10)}
_BYTE_ARRAY = 6

#: Kinds of pages, and the field of a page header that describes each.
_PAGE, _DICTIONARY, _PAGE_V2 = 0, 2, 3
_DESCRIBED = {_PAGE: 5, _DICTIONARY: 7, _PAGE_V2: 8}

_MAX_HEADER_BYTES = 64 * 2**10  # with statistics of long ids

#: How much larger than the file its content may be, beyond what is fine in any. Ids that begin alike shrink to a tenth.
_MOST_SHRUNK, _SMALL = 64, 2**20

#: No text of a column is longer: an id has 1,024 bytes at most.
_MAX_TEXT = 4096

#: Each row has a checksum or token ids, which nothing shrinks to less.
_LEAST_ROW_BYTES = 4


class UnsoundTableError(pa.ArrowInvalid):  # type: ignore[misc]
    """A file that must not be given to Arrow."""


def read_table(data: bytes, columns: Sequence[str]) -> pa.Table:
    """Columns of a Parquet file, in this order.

    Never allocates more than some multiple of what the file takes. Raises what Arrow raises for a file that cannot be
    read or lacks a column.
    """
    packed = check_table(data)
    table = pq.read_table(
        pa.BufferReader(data), columns=list(columns), partitioning=None, use_threads=False,
        # As dictionaries first: a long text that is named by a number is not laid out as often as it is named.
        read_dictionary=[name for name in columns if name in packed],
    )  # fmt: skip
    for at, column in enumerate(table.columns):
        if pa.types.is_dictionary(column.type):
            lengths = [pc.max(pc.binary_length(chunk.dictionary)).as_py() or 0 for chunk in column.chunks]
            if max(lengths, default=0) > _MAX_TEXT:
                raise UnsoundTableError(f"column {table.column_names[at]!r} holds a text that is too long")
            table = table.set_column(at, table.column_names[at], column.cast(column.type.value_type))
    return table


def check_table(data: bytes) -> set[str]:
    """Look at a Parquet file's structures; returns the names of text columns that have a dictionary.

    Raises ``UnsoundTableError`` where a structure has an impossible value, lies outside the file, or claims so much
    that it can't be honest.
    """
    try:
        return _check(data)
    except PayloadCorruptError as error:
        raise UnsoundTableError(str(error)) from error


def _check(data: bytes) -> set[str]:
    length = int.from_bytes(data[-8:-4], "little")
    if len(data) < 12 or data[-4:] != MAGIC or length + 12 > len(data):
        raise PayloadCorruptError("it does not end as a Parquet file does")
    footer = Reader(data[-8 - length : -8]).struct()
    root, *leaves = [struct(s) for s in items(footer, 2)]
    groups = [struct(g) for g in items(footer, 4)]
    rows = sum(integer(group, 3) for group in groups)
    if (
        any(leaf.get(5) or leaf.get(1) not in _TYPES or leaf.get(3) not in _REPETITIONS for leaf in leaves)
        or integer(root, 5) != len(leaves)
        or any(integer(group, 3) < 0 for group in groups)
        or integer(footer, 3) != rows
        or rows * _LEAST_ROW_BYTES > len(data)
    ):
        raise PayloadCorruptError("it has an impossible schema or more rows than bytes")
    packed: set[str] = set()
    plain = 0
    for group in groups:
        chunks = [struct(c) for c in items(group, 1)]
        if len(chunks) != len(leaves):
            raise PayloadCorruptError("a row group has too few or too many columns")
        for leaf, chunk in zip(leaves, chunks, strict=True):
            meta = struct(chunk.get(3))
            if 1 in chunk or meta.get(1) != leaf.get(1) or meta.get(3) != [leaf.get(4)]:
                raise PayloadCorruptError("a column is not what the schema says")
            size, has_dictionary = _chunk(data, len(data) - 8 - length, meta, integer(group, 3))
            plain += size
            if has_dictionary and meta[1] == _BYTE_ARRAY:
                packed.add(_text(leaf.get(4)))
    if plain > _SMALL + _MOST_SHRUNK * len(data):
        raise PayloadCorruptError(f"it claims to hold {plain} bytes")
    return packed


def _chunk(data: bytes, end_of_data: int, meta: Struct, rows: int) -> tuple[int, bool]:
    """Plain bytes of the pages of a column chunk, and whether it has a dictionary."""
    stored, begin = integer(meta, 7), integer(meta, 9)
    if 11 in meta:
        begin = min(begin, integer(meta, 11))
    end = begin + stored
    if (
        meta.get(4) not in _COMPRESSIONS
        or not all(encoding in _ENCODINGS for encoding in items(meta, 2))
        or integer(meta, 5) != rows
        or not 4 <= begin <= end <= end_of_data
    ):
        raise PayloadCorruptError("a column is outside the file, or compressed in a way that there is not")
    plain, values, has_dictionary, at = 0, 0, False, begin
    while at < end:
        reader = Reader(data[at : min(at + _MAX_HEADER_BYTES, end)])
        header = reader.struct()
        kind, size, within = (integer(header, n) for n in (1, 2, 3))
        described = struct(header.get(_DESCRIBED.get(kind, -1)))
        count = integer(described, 1)
        at += reader.position + within
        if min(size, within, count) < 0 or at > end or described.get(4 if kind == _PAGE_V2 else 2) not in _ENCODINGS:
            raise PayloadCorruptError("a page has an impossible size or encoding")
        has_dictionary |= kind == _DICTIONARY
        values += count if kind != _DICTIONARY else 0
        plain += size
    if values != rows:
        raise PayloadCorruptError("pages do not add up to their column")
    return plain, has_dictionary


def _text(name: object) -> str:
    if not isinstance(name, bytes):
        raise PayloadCorruptError("a column has no name")
    try:
        return name.decode()
    except UnicodeDecodeError as error:
        raise PayloadCorruptError("a column has no name") from error
