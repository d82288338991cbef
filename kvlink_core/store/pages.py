"""What a shard says about its columns and pages, held against what the manifest allows; and where its values are.

Field numbers are those of https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from kvlink_core.errors import PayloadCorruptError
from kvlink_core.store.thrift import Reader, integer, items, struct

_MAX_HEADER_BYTES = 512  # without statistics about 30
_INT32, _BYTE_ARRAY = 1, 6
_REQUIRED, _OPTIONAL = 0, 1
_PLAIN, _RLE = 0, 3
_UNCOMPRESSED = 0
_DATA_PAGE = 0

#: A page header as Arrow writes it without statistics: an uncompressed data page, sizes, number of values, encodings.
_USUAL_HEADER = re.compile(
    rb"\x15\x00\x15([\x80-\xff]{0,4}[\x00-\x7f])\x15([\x80-\xff]{0,4}[\x00-\x7f])"
    rb"\x2c\x15([\x80-\xff]{0,4}[\x00-\x7f])"
    rb"\x15\x00\x15\x06\x15\x06(?:\x1c\x00)?\x00\x00",
    re.DOTALL,
)

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


@dataclass(frozen=True, slots=True)
class Page:
    """Where the content of a data page is, without its header, and how many values it holds."""

    begin: int
    end: int
    values: int


def data_pages(data: memoryview, begin: int, end: int, values: int) -> list[Page]:
    """The pages between ``begin`` and ``end`` of ``data``.

    Raises ``PayloadCorruptError`` unless they fill that exactly, are uncompressed data pages of version 1 with plain
    values, and have that number of values in all.
    """
    at, left = begin, values
    pages: list[Page] = []
    while at < end:
        length, stored, count = _usual_header(data, at) or _header(data, at, end)
        page = Page(at + length, at + length + stored, count)
        at, left = page.end, left - count
        if count < 0 or left < 0:
            break
        pages.append(page)
    if at != end or left:
        raise PayloadCorruptError("pages do not add up to their column")
    return pages


def _usual_header(data: memoryview, at: int) -> tuple[int, int, int] | None:
    """Length of a page header, of its page, and number of values, if it is one as Arrow and this store write it.

    There is one for each column of each document, and the general way takes twenty times as long.
    """
    match = _USUAL_HEADER.match(data, at)
    if match is None:
        return None
    plain, stored, count = (_number(varint) for varint in match.groups())
    return (match.end() - at, stored, count) if plain == stored >= 0 else None


def _number(varint: bytes) -> int:
    value = 0
    for byte in reversed(varint):
        value = value << 7 | byte & 0x7F
    return (value >> 1) ^ -(value & 1)


def _header(data: memoryview, at: int, end: int) -> tuple[int, int, int]:
    reader = Reader(bytes(data[at : min(at + _MAX_HEADER_BYTES, end)]))
    header = reader.struct()
    kind, plain, stored = (integer(header, number) for number in (1, 2, 3))
    if kind != _DATA_PAGE or not 0 <= stored == plain:
        raise PayloadCorruptError("a page is not an uncompressed data page")
    described = struct(header.get(5))
    if integer(described, 2) != _PLAIN or integer(described, 3) != _RLE:
        raise PayloadCorruptError("a page is not plainly encoded")
    return reader.position, stored, integer(described, 1)


@dataclass(frozen=True, slots=True)
class Run:
    """Values of one length, at equal distances: where the first begins, how many, and bytes between two of them."""

    begin: int
    count: int
    length: int
    gap: int = 4


def read_values(data: memoryview, pages: Sequence[Page]) -> Run | list[tuple[int, int]]:
    """Where the values of a required binary column are: begin and end of each, or a run where one page has equal ones.

    Raises ``PayloadCorruptError`` unless they fill their pages exactly.
    """
    if len(pages) == 1 and pages[0].values:
        (page,) = pages
        length = int.from_bytes(data[page.begin : page.begin + 4], "little")
        if page.end - page.begin == page.values * (4 + length):
            lengths = np.frombuffer(data[page.begin : page.end], dtype=np.uint8).reshape(page.values, -1)[:, :4]
            if (lengths == lengths[0]).all():
                return Run(page.begin + 4, page.values, length)
    return [value for page in pages for value in _values(data, page)]


def _values(data: memoryview, page: Page) -> Iterator[tuple[int, int]]:
    at = page.begin
    for _ in range(page.values):
        begin = at + 4
        at = begin + int.from_bytes(data[begin - 4 : begin], "little")
        if at > page.end:  # also where the length itself would lie beyond it
            break
        yield begin, at
    if at != page.end:
        raise PayloadCorruptError("values do not fill their page")


def read_only_value(data: memoryview, pages: Sequence[Page]) -> tuple[int, int]:
    """Begin and end of the value of an optional binary column of which the first alone is not null.

    Raises ``PayloadCorruptError`` for anything else.
    """
    found: list[tuple[int, int]] = []
    for number, page in enumerate(p for p in pages if p.values):
        levels = page.begin + 4
        begin = levels + int.from_bytes(data[page.begin : levels], "little")
        if begin > page.end or not _only_first(bytes(data[levels:begin]), page.values, number == 0):
            raise PayloadCorruptError("token ids are not in the first row alone")
        found += _values(data, Page(begin, page.end, int(number == 0)))
    if not found:
        raise PayloadCorruptError("there are no token ids")
    return found[0]


@functools.lru_cache(1024)
def _only_first(levels: bytes, count: int, first: bool) -> bool:
    """Whether definition levels (a run-length hybrid of bits) say of ``count`` values: none but, maybe, the first.

    https://parquet.apache.org/docs/file-format/data-pages/encodings/#RLE
    """
    at, seen = 0, 0
    while at < len(levels) and seen < count:
        header = shift = 0
        while True:
            if at == len(levels) or shift > 63:
                return False
            header |= (levels[at] & 0x7F) << shift
            at, shift = at + 1, shift + 7
            if not levels[at - 1] & 0x80:
                break
        run = header >> 1
        packed = levels[at : at + (run if header & 1 else 1)]
        if not packed or len(packed) < (run if header & 1 else 1):
            return False
        at += len(packed)
        if header & 1:
            here = min(8 * run, count - seen)
            bits = int.from_bytes(packed, "little") & ((1 << here) - 1)
        else:
            here = min(run, count - seen)
            bits = ((1 << here) - 1) * (packed[0] & 1)
            if packed[0] > 1:
                return False
        if bits != int(first and seen == 0):
            return False
        seen += here
    return seen == count and at == len(levels)
