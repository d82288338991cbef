"""Reads documents out of many shards at once: footers kept, requests in one round, decoding in threads."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pyarrow as pa

from kvlink_core.compress import Codec, EncodedDocument
from kvlink_core.errors import PayloadCorruptError, PayloadError, PayloadMissingError, StoreUnavailableError
from kvlink_core.store.manifest import check_shard_name
from kvlink_core.store.parquet import ALIGNMENT
from kvlink_core.store.payload import (
    Footer,
    PayloadFile,
    check_asked,
    corrupt,
    footer_length,
    locate,
    parse_footer,
    read_document,
    read_token_ids,
)
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import Range, Storage, Tail, describe
from kvlink_core.store.tokens import read_tokens
from kvlink_core.types import DocumentCache

Loaded = TypeVar("Loaded")

#: Enough for the footers of shards of some two hundred documents in the first request.
_TAIL_BYTES = 128 * 2**10

#: Footers kept, in bytes of their serialized form; parsed ones take a few times that.
_FOOTER_CACHE_BYTES = 32 * 2**20


#: From this size of a document on, on average, several are read at the same time.
_THREADS_FROM_BYTES = 2**20

#: A shard and a row group of it.
_Key = tuple[str, int]


class FooterCache:
    """Footers by shard, least recently used out first. Safe to use from several threads.

    A shard's name is the hash of its footer, so a kept one is never outdated.
    """

    def __init__(self, limit: int = _FOOTER_CACHE_BYTES) -> None:
        self._limit = limit
        self._held = 0
        self._items: OrderedDict[str, Footer] = OrderedDict()
        self._lock = threading.Lock()

    def get(self, shard: str) -> Footer | None:
        """The footer, if it is kept."""
        with self._lock:
            if shard in self._items:
                self._items.move_to_end(shard)
            return self._items.get(shard)

    def put(self, footer: Footer) -> None:
        """Keep ``footer``, and forget the oldest ones beyond the limit."""
        with self._lock:
            if footer.shard in self._items:
                return
            self._items[footer.shard] = footer
            self._held += footer.metadata.serialized_size
            while self._held > self._limit and len(self._items) > 1:
                _, oldest = self._items.popitem(last=False)
                self._held -= oldest.metadata.serialized_size


class ShardReader:
    """Loads document caches by catalog row.

    Args:
        storage: where ``shards/`` and ``tokens/`` are.
        verify: whether checksums of K and V are verified (token ids always are).
    """

    def __init__(self, storage: Storage, *, verify: bool = True) -> None:
        self._storage = storage
        self._verify = verify
        self._footers = FooterCache()
        self._pool = ThreadPoolExecutor(min(8, os.cpu_count() or 1), thread_name_prefix="kvlink-load")

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    def load(self, rows: Sequence[CatalogRow]) -> list[DocumentCache | PayloadError]:
        """The cache of each row, in order; a payload that must not be served is its error instead.

        Raises ``StoreUnavailableError`` when the store does not answer for one of them.
        """
        return self._load(rows, self._decode)

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        """Like ``load``, but as the codec stored it; checksums are verified in any case."""
        return self._load(rows, lambda file, row_group: read_document(file, row_group, verify=True))

    def _load(
        self, rows: Sequence[CatalogRow], read: Callable[[PayloadFile, int], Loaded]
    ) -> list[Loaded | PayloadError]:
        footers = self.footers(list(dict.fromkeys(row.shard for row in rows)))
        places = [self._place(footers[row.shard], row) for row in rows]
        # By shard and row group, not by place in the file: row groups of a forged shard may lie in one place.
        keys = [(row.shard, row.row_group) for row in rows]
        wanted = {key: place for key, place in zip(keys, places, strict=True) if isinstance(place, Range)}
        done: dict[_Key, Loaded | PayloadError] = {}
        groups: dict[int, tuple[PayloadFile, list[_Key]]] = {}  # by file, since one thread at a time may read it
        opened = self._storage.open_ranges(list(wanted.values()))
        for key, source in zip(wanted, opened, strict=True):
            footer = footers[key[0]]
            assert isinstance(footer, Footer)
            if isinstance(source, Exception):
                done[key] = _unreadable(footer.shard, source)
            else:
                groups.setdefault(id(source), (PayloadFile(source, footer), []))[1].append(key)

        def decode(group: tuple[PayloadFile, list[_Key]]) -> None:
            file, here = group
            for key in here:
                try:
                    done[key] = read(file, key[1])
                except PayloadError as error:
                    done[key] = error

        # Of small documents most of the work is Python's, of which threads do one at a time, and no faster.
        large = sum(place.end - place.start for place in wanted.values()) > _THREADS_FROM_BYTES * len(wanted)
        list((self._pool.map if large and len(groups) > 1 else map)(decode, groups.values()))
        return [done[key] if isinstance(p, Range) else p for key, p in zip(keys, places, strict=True)]

    def _decode(self, file: PayloadFile, row_group: int) -> DocumentCache:
        document = read_document(file, row_group, verify=self._verify)
        with corrupt(file.footer.shard):
            return file.footer.codec.decode(document)

    def decode(self, codec: Codec, documents: Sequence[EncodedDocument]) -> list[DocumentCache | PayloadError]:
        """The cache of each document of ``load_encoded``, in order."""

        def decode(document: EncodedDocument) -> DocumentCache | PayloadError:
            try:
                with corrupt("that was read"):
                    return codec.decode(document)
            except PayloadError as error:
                return error

        return list((self._pool.map if len(documents) > 1 else map)(decode, documents))

    def token_ids(self, rows: Sequence[CatalogRow]) -> list[list[int]]:
        """Token ids of each row, without K and V, from the shard or, where that fails, from the copy beside it.

        Raises the shard's ``PayloadError`` when neither has them, and ``StoreUnavailableError`` when the store does not
        answer.
        """
        footers = self.footers(list(dict.fromkeys(row.shard for row in rows)))
        found: list[list[int]] = []
        for row in rows:
            try:
                found.append(self._token_ids(footers[row.shard], row))
            except PayloadError:
                copy = read_tokens(self._storage, row)
                if copy is None:
                    raise
                found.append(copy)
        return found

    def _token_ids(self, footer: Footer | PayloadError, row: CatalogRow) -> list[int]:
        place = self._place(footer, row)
        if isinstance(place, PayloadError):
            raise place
        assert isinstance(footer, Footer)
        end = footer.chunks[row.row_group][1].end  # only the bytes before the codec's first column
        (source,) = self._storage.open_ranges([Range(place.path, place.start, end)])
        if isinstance(source, Exception):
            raise _unreadable(row.shard, source)
        return read_token_ids(PayloadFile(source, footer), row.row_group)

    def _place(self, footer: Footer | PayloadError, row: CatalogRow) -> Range | PayloadError:
        if isinstance(footer, PayloadError):
            return footer
        try:
            check_asked(footer, row)
            begin, end = locate(footer, row.row_group)
            # From a multiple of the alignment, so that numbers are aligned in the memory that a bucket's answer is in.
            return Range(f"shards/{row.shard}", begin - begin % ALIGNMENT, end)
        except PayloadError as error:
            return error

    def footers(self, shards: Sequence[str]) -> dict[str, Footer | PayloadError]:
        """What each shard says of itself, or why it must not be believed.

        Raises ``StoreUnavailableError`` when the store does not answer.
        """
        found: dict[str, Footer | PayloadError] = {}
        for shard in shards:
            try:
                check_shard_name(shard)
            except PayloadCorruptError as error:
                found[shard] = error
                continue
            kept = self._footers.get(shard)
            if kept is not None:
                found[shard] = kept
        unknown = [s for s in shards if s not in found]
        tails = self._storage.tails([f"shards/{s}" for s in unknown], _TAIL_BYTES)
        for shard, tail in zip(unknown, tails, strict=True):
            try:
                found[shard] = footer = self._parse(shard, tail)
                self._footers.put(footer)
            except PayloadError as error:
                found[shard] = error
        return found

    def _parse(self, shard: str, tail: Tail | Exception) -> Footer:
        if isinstance(tail, Exception):
            raise _unreadable(shard, tail)
        length = footer_length(tail.data, shard, tail.size)
        if length > len(tail.data):
            (longer,) = self._storage.tails([f"shards/{shard}"], length)
            if isinstance(longer, Exception):
                raise _unreadable(shard, longer)
            if len(longer.data) < length:
                raise PayloadCorruptError(f"shard {shard} is torn: its footer is not all there")
            tail = longer
        return parse_footer(shard, tail.data, tail.size)


def _unreadable(shard: str, error: Exception) -> PayloadError:
    """What an error in the place of a shard's bytes says of the shard.

    Raises ``StoreUnavailableError`` for one that says nothing of it: a time-out, a refusal, a lost connection. To call
    the shard damaged then would have it computed again, or given up for lost, while it is sound.
    """
    if isinstance(error, EOFError):
        return PayloadCorruptError(f"shard {shard} is torn: {error}")
    if isinstance(error, FileNotFoundError):
        return PayloadMissingError(f"shard {shard} is not there")
    if isinstance(error, pa.ArrowInvalid):  # an emptied file cannot be mapped
        return PayloadCorruptError(f"shard {shard} cannot be read: {describe(error)}")
    raise StoreUnavailableError(f"shard {shard} cannot be read: {describe(error)}") from error
