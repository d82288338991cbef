"""One shard, written and read as FORMAT.md sections 2 to 4 say. Knows Parquet, not where files are."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from kvlink_core.compress import Codec, EncodedColumn, EncodedDocument, codec_spec, make_codec
from kvlink_core.errors import (
    CorpusError,
    FormatVersionError,
    PayloadCorruptError,
    PayloadError,
    PayloadForeignError,
    UnknownCodecError,
)
from kvlink_core.fingerprint import token_bytes, token_digest
from kvlink_core.store.buffers import checksum, checksum_of_run, column_of_values, tensor_of_buffer, tokens_of_bytes
from kvlink_core.store.manifest import (
    FINGERPRINT_KEY,
    FORMAT_KEY,
    FORMAT_VERSION,
    MANIFEST_KEY,
    DocumentEntry,
    Manifest,
    check_belongs,
    parse_manifest,
    shard_name,
)
from kvlink_core.store.pages import Chunk, Run, data_pages, read_chunks, read_only_value, read_values
from kvlink_core.store.parquet import ALIGNMENT, MAGIC, ShardWriter
from kvlink_core.store.rows import CatalogRow

MAX_FOOTER_BYTES = 64 * 2**20

#: Parquet's limit for one value is 2 GiB; half of it keeps sums of lengths away from every 32-bit corner.
_MAX_VALUE_BYTES = 2**30

#: The column of token ids; those of the codec follow.
_TOKENS = 1

#: What page headers, value lengths and levels may add to a column chunk, and per value.
_CHUNK_SLACK, _VALUE_SLACK = 1024, 64


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the values of a document are, from the beginning of what ``PayloadFile.read`` returns."""

    token_ids: tuple[int, int]
    columns: Sequence[Run | Sequence[tuple[int, int]]]


@dataclass(frozen=True, slots=True)
class Footer:
    """The parsed end of a shard, checked against the shard's name. Immutable, so it can be kept and shared."""

    shard: str
    metadata: pq.FileMetaData
    chunks: Sequence[Sequence[Chunk]]  # by row group and column
    manifest: Manifest
    codec: Codec
    fingerprint_json: str
    data_end: int | None  # where the footer begins, so where data must end; None when the size is not known
    spec: str  # the codec with its parameters, as rows name it
    places: dict[int, tuple[int, int]] = field(default_factory=dict, compare=False)  # what ``locate`` has accepted
    layouts: dict[int, Layout] = field(default_factory=dict, compare=False)  # what ``read_document`` has found


def write_payload(
    sink: IO[bytes],
    manifest: bytes,
    fingerprint_json: str,
    codec: Codec,
    documents: Sequence[EncodedDocument],
    extra: Mapping[bytes, bytes] | None = None,
) -> str:
    """Write a shard to an empty file, and return the name that it must have.

    The documents are those of the manifest, in its order; ``extra`` is further key-value metadata.

    Raises ``CorpusError`` for a document too large for Parquet.
    """
    largest = max(max(c.lengths) for d in documents for c in d.columns.values())
    if largest > _MAX_VALUE_BYTES:
        raise CorpusError(
            f"a document's layer takes {largest} bytes, and at most {_MAX_VALUE_BYTES} can be stored; "
            "split documents into smaller chunks."
        )
    metadata = {
        FORMAT_KEY: str(FORMAT_VERSION).encode(),
        MANIFEST_KEY: manifest,
        FINGERPRINT_KEY: fingerprint_json.encode(),
        **(extra or {}),
    }
    writer = ShardWriter(sink, codec.columns, metadata)
    for document in documents:
        writer.add(token_bytes(document.token_ids.tolist()), [document.columns[name] for name in codec.columns])
    return shard_name(writer.end())


def _columns(codec: Codec) -> list[str]:
    return ["layer", "token_ids", *codec.columns]


class corrupt:  # used as a statement: with corrupt(shard)
    """Turn whatever reading a hostile or damaged file may raise into ``PayloadCorruptError``.

    Broad on purpose: given wrong bytes, libraries raise ArrowInvalid, OSError, OverflowError, MemoryError,
    NotImplementedError, UnicodeDecodeError and more. All mean one thing here: these bytes are not to be served.
    """

    __slots__ = ("_shard",)

    def __init__(self, shard: str) -> None:
        self._shard = shard

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, PayloadError):
            text = " ".join(str(error).split())[:200]
            raise PayloadCorruptError(f"shard {self._shard}: {type(error).__name__}: {text}") from error


def footer_length(tail: bytes, shard: str, size: int | None) -> int:
    """Bytes of the footer with its eight closing bytes, from a file's last eight bytes or more.

    Raises ``PayloadCorruptError`` when the file has no such end or the footer would not fit into it.
    """
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise PayloadCorruptError(f"shard {shard} is torn: it does not end as a Parquet file does")
    length = int.from_bytes(tail[-8:-4], "little") + 8
    if length > MAX_FOOTER_BYTES or (size is not None and length + 4 > size):
        raise PayloadCorruptError(f"shard {shard}: a footer of {length} bytes does not fit")
    return length


def parse_footer(shard: str, tail: bytes, size: int | None) -> Footer:
    """Parse a shard's footer, of which ``tail`` is at least all, and check it against the name.

    Raises:
        PayloadCorruptError, PayloadForeignError: see FORMAT.md section 4.
        FormatVersionError: a newer format, or a codec that this version does not have.
    """
    length = footer_length(tail, shard, size)
    footer = tail[-length:]
    # Before parsing, not only because nothing else should be trusted: Arrow ends the process, rather than raise, when
    # some fields of a footer (the compression, for one) have impossible values.
    if shard_name(footer[:-8]) != shard:
        raise PayloadCorruptError(f"shard {shard}: its footer does not hash to its name")
    with corrupt(shard):
        # Every list element takes a byte at least, so no honest list is longer than the footer.
        metadata = pq.ParquetFile(
            pa.BufferReader(footer), thrift_string_size_limit=length, thrift_container_size_limit=length
        ).metadata
        pairs = metadata.metadata or {}
        if FORMAT_KEY not in pairs:
            raise PayloadForeignError(f"shard {shard} is a Parquet file, but not one of KVLink's")
        version = int(pairs[FORMAT_KEY])
        if version > FORMAT_VERSION:
            raise FormatVersionError(
                f"shard {shard} has format {version}, and this version of KVLink reads up to {FORMAT_VERSION}. "
                "Upgrade KVLink."
            )
        manifest = parse_manifest(pairs[MANIFEST_KEY], shard)
        if hashlib.sha256(pairs[FINGERPRINT_KEY]).hexdigest() != manifest.fingerprint:
            raise PayloadCorruptError(f"shard {shard}: its fingerprint does not hash to its digest")
        try:
            codec = make_codec(manifest.codec.name, manifest.codec.params)
        except UnknownCodecError as error:
            raise FormatVersionError(f"shard {shard}: {error}") from error
        if dict(codec.params) != manifest.codec.params:  # a default may have been another when this was written
            raise PayloadCorruptError(f"shard {shard}: its codec's parameters are not all there")
        if metadata.num_row_groups != len(manifest.documents):  # before they are looked at, which takes time
            raise PayloadCorruptError(f"shard {shard}: not as many row groups as documents")
        chunks = read_chunks(footer[:-8], _columns(codec))
        data_end = None if size is None else size - length
        text = pairs[FINGERPRINT_KEY].decode()
        return Footer(shard, metadata, chunks, manifest, codec, text, data_end, codec_spec(codec))


def check_asked(footer: Footer, row: CatalogRow) -> DocumentEntry:
    """The manifest's entry for ``row``. Raises ``PayloadForeignError`` when it is of another document."""
    manifest = footer.manifest
    if not 0 <= row.row_group < len(manifest.documents):
        raise PayloadForeignError(f"shard {footer.shard} has no row group {row.row_group}")
    entry = manifest.documents[row.row_group]
    found = (entry.token_digest, entry.tokens, footer.spec, manifest.fingerprint, manifest.namespace)
    if found == (row.token_digest, row.tokens, row.codec, row.fingerprint, row.namespace):
        return entry
    pairs = {
        "namespace": (manifest.namespace, row.namespace),
        "fingerprint": (manifest.fingerprint, row.fingerprint),
        "codec": (footer.spec, row.codec),
        "token digest": (entry.token_digest, row.token_digest),
        "tokens": (str(entry.tokens), str(row.tokens)),
    }
    check_belongs(f"shard {footer.shard}, row group {row.row_group},", pairs)
    return entry


def locate(footer: Footer, row_group: int) -> tuple[int, int]:
    """Where a row group's bytes begin and end in the file, after checking that they are as the manifest implies.

    Reads nothing and allocates nothing. Raises ``PayloadCorruptError``.
    """
    if row_group in footer.places:
        return footer.places[row_group]
    manifest, entry, chunks = footer.manifest, footer.manifest.documents[row_group], footer.chunks[row_group]
    columns = footer.codec.columns
    ok = set(entry.columns) == set(columns) and all(c.values == manifest.layers for c in chunks)
    if ok:
        limits = footer.codec.value_bytes(manifest.shape(entry))
        stated = {name: entry.columns[name].bytes for name in columns}
        sizes = [4 * manifest.layers, 4 * entry.tokens, *stated.values()]
        slack = _CHUNK_SLACK + _VALUE_SLACK * manifest.layers
        ok = all(size <= c.end - c.begin <= size + slack for size, c in zip(sizes, chunks, strict=True)) and all(
            manifest.layers * limits[name][0] <= size <= manifest.layers * limits[name][1]
            for name, size in stated.items()
        )
    begin, end = chunks[0].begin, chunks[-1].end
    if not ok or (footer.data_end is not None and end > footer.data_end):
        raise PayloadCorruptError(f"shard {footer.shard}: row group {row_group} is not as its manifest says")
    footer.places[row_group] = begin, end
    return begin, end


class PayloadFile:
    """An open shard. For one thread at a time."""

    def __init__(self, source: pa.NativeFile, footer: Footer) -> None:
        self.footer = footer
        self._source = source

    def read(self, row_group: int, last: int) -> pa.Buffer:
        """The bytes of a row group that ``locate`` has accepted, from ``_origin`` up to column ``last``; no copy."""
        begin, end = self._origin(row_group), self.footer.chunks[row_group][last].end
        self._source.seek(begin)
        data = self._source.read_buffer(end - begin)
        if data.size != end - begin:
            raise PayloadCorruptError(f"shard {self.footer.shard} ends within row group {row_group}")
        return data

    def layout(self, data: memoryview, row_group: int, last: int) -> Layout:
        """Where the values are in what ``read`` returned. Raises ``PayloadCorruptError``."""
        origin, chunks = self._origin(row_group), self.footer.chunks[row_group]
        pages = [data_pages(data, c.begin - origin, c.end - origin, c.values) for c in chunks[_TOKENS : last + 1]]
        return Layout(read_only_value(data, pages[0]), [read_values(data, p) for p in pages[1:]])

    def _origin(self, row_group: int) -> int:
        begin = self.footer.chunks[row_group][_TOKENS].begin
        return begin - begin % ALIGNMENT  # so that what is aligned in the file is so in the memory that it comes in


def read_document(file: PayloadFile, row_group: int, *, verify: bool) -> EncodedDocument:
    """Read one document that ``locate`` has accepted. What the codec can take as it lies there is not copied.

    Where the values are is looked at once: shards do not change, and what is found there is checked each time.

    Raises ``PayloadCorruptError`` for wrong lengths, token ids that are not those of the digest, and, with ``verify``,
    bytes that do not match their checksum.
    """
    footer = file.footer
    with corrupt(footer.shard):
        names = footer.codec.columns
        entry = footer.manifest.documents[row_group]
        buffer = file.read(row_group, _TOKENS + len(names))
        data = memoryview(buffer)
        layout = footer.layouts.get(row_group) or file.layout(data, row_group, _TOKENS + len(names))
        token_ids = _token_ids(data, layout, entry)
        whole = tensor_of_buffer(buffer)
        columns: dict[str, EncodedColumn] = {}
        for name, values in zip(names, layout.columns, strict=True):
            columns[name] = column = column_of_values(whole, values)
            stated = entry.columns[name]
            if column.data.numel() != stated.bytes:
                raise PayloadCorruptError(f"{column.data.numel()} bytes in column {name!r}, not {stated.bytes}")
            # Of what is served: the values where they lie, or the copy that was made of them.
            if verify and stated.checksum != (
                checksum_of_run(data, values) if isinstance(values, Run) else checksum(column.data)
            ):
                raise PayloadCorruptError(
                    f"shard {footer.shard}: column {name!r} of row group {row_group} does not match its checksum"
                )
        footer.layouts[row_group] = layout
        return EncodedDocument(footer.manifest.shape(entry), token_ids, columns, entry.params)


def read_token_ids(file: PayloadFile, row_group: int) -> list[int]:
    """Only the token ids of one document, checked against its digest. Raises ``PayloadCorruptError``."""
    with corrupt(file.footer.shard):
        data = memoryview(file.read(row_group, _TOKENS))
        layout = file.layout(data, row_group, _TOKENS)
        return _token_ids(data, layout, file.footer.manifest.documents[row_group]).tolist()


def _token_ids(data: memoryview, layout: Layout, entry: DocumentEntry) -> torch.Tensor:
    ids = bytes(data[slice(*layout.token_ids)])
    if len(ids) != 4 * entry.tokens or token_digest(ids) != entry.token_digest:
        raise PayloadCorruptError("the token ids do not match their digest")
    return tokens_of_bytes(ids)
