"""One round of reading: from rows to caches that can be linked, from disk or from the store."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Protocol

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.found import Flight, Found
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.store.tiers.planner import SOURCES, Planner, Source
from kvlink_core.types import DocumentCache

logger = logging.getLogger(__name__)


class Payloads(Protocol):
    """What the tiers need of a ``DocumentStore``."""

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        """The payload of each row, not decoded. Raises ``StoreUnavailableError``."""
        ...

    def decode(self, documents: Sequence[EncodedDocument]) -> list[DocumentCache | PayloadError]:
        """The cache of each payload."""
        ...

    def write_copy(self, file: IO[bytes], row: CatalogRow, document: EncodedDocument) -> str:
        """Write a shard of this document alone, and return its name."""
        ...


@dataclass(frozen=True, slots=True)
class ReadStats:
    """What was read since start, sound or not."""

    documents: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Loaded:
    """A document that has arrived: as it was stored, decoded, and the same where the model is."""

    flight: Flight
    document: EncodedDocument
    source: Source
    cache: DocumentCache
    placed: DocumentCache


class Loader:
    """Reads, decodes, checks and keeps; measures how long that takes. Safe to use from several threads.

    Args:
        payloads: the store.
        disk: the disk tier, if there is one.
        memories: keep what was loaded.
        guard: through which the store is asked.
        planner: is told how long it took.
        accept: why a cache is not one of the model's, if so.
    """

    def __init__(
        self,
        payloads: Payloads,
        disk: DiskTier | None,
        memories: Memories,
        guard: StoreGuard,
        planner: Planner,
        accept: Callable[[DocumentCache], PayloadError | None],
    ) -> None:
        self._payloads = payloads
        self._disk = disk
        self._memories = memories
        self._guard = guard
        self._planner = planner
        self._accept = accept
        self._lock = threading.Lock()
        self._read: dict[Source, ReadStats] = {source: ReadStats(0, 0) for source in SOURCES}

    @property
    def stats(self) -> Mapping[Source, ReadStats]:
        """By source."""
        with self._lock:
            return dict(self._read)

    def source(self, row: CatalogRow) -> Source:
        """Where ``load`` would look first."""
        return "disk" if self._disk is not None and CacheKey.of(row) in self._disk else "store"

    def load(self, flights: Sequence[Flight]) -> list[Loaded]:
        """Set what was found of every flight, all of one source, and return what arrived, for ``keep``.

        Raises nothing that concerns the store; what else goes wrong is passed on, with flights not set.
        """
        absent = list(flights)
        loaded: list[Loaded] = []
        if flights[0].source == "disk":
            read, absent = self._from_disk(flights)
            loaded = self._decode(read, "disk")
            if absent and self._guard.allow() == "no":
                _give_up(absent, self._guard.left_alone())
                absent = []
        if absent:
            try:
                loaded += self._decode(self._from_store(absent), "store")
            except StoreUnavailableError as error:
                logger.warning("the store does not answer for %d documents: %s", len(absent), error)
                _give_up(absent, error)
        return loaded

    def keep(self, loaded: Sequence[Loaded]) -> None:
        """Keep copies of what ``load`` returned, in the tiers before the one that it came from."""
        for item in loaded:
            self._memories.keep(item.flight.wanted.key, item.cache, item.placed)
        for item in loaded:
            if self._disk is not None and item.source == "store":
                self._write(self._disk, item.flight.row, item.document)

    def _write(self, disk: DiskTier, row: CatalogRow, document: EncodedDocument) -> None:
        nbytes = sum(c.data.numel() for c in document.columns.values()) + 4 * document.shape.tokens
        disk.put(CacheKey.of(row), nbytes, lambda file: self._payloads.write_copy(file, row, document))

    def _from_disk(self, flights: Sequence[Flight]) -> tuple[list[tuple[Flight, EncodedDocument]], list[Flight]]:
        """What is on disk, and what is not, or not any more."""
        assert self._disk is not None
        started = time.perf_counter()
        read: list[tuple[Flight, EncodedDocument]] = []
        absent: list[Flight] = []
        for flight in flights:
            document = self._disk.get(flight.row)
            if document is None:
                absent.append(flight)
            else:
                read.append((flight, document))
        self._observe("disk", read, started)
        return read, absent

    def _from_store(self, flights: Sequence[Flight]) -> list[tuple[Flight, EncodedDocument]]:
        started = time.perf_counter()
        documents = self._guard.watch(lambda: self._payloads.load_encoded([f.row for f in flights]))
        read: list[tuple[Flight, EncodedDocument]] = []
        for flight, document in zip(flights, documents, strict=True):
            if isinstance(document, PayloadError):
                flight.land(Found(refused=document))
            else:
                read.append((flight, document))
        self._observe("store", read, started)
        return read

    def _observe(self, source: Source, read: Sequence[tuple[Flight, EncodedDocument]], started: float) -> None:
        nbytes = sum(flight.row.nbytes for flight, _ in read)
        with self._lock:
            before = self._read[source]
            self._read[source] = ReadStats(before.documents + len(read), before.nbytes + nbytes)
        if nbytes:
            self._planner.observe_read(source, nbytes, time.perf_counter() - started)

    def _decode(self, read: Sequence[tuple[Flight, EncodedDocument]], source: Source) -> list[Loaded]:
        if not read:
            return []
        started = time.perf_counter()
        loaded: list[Loaded] = []
        refused: list[tuple[Flight, PayloadError]] = []
        for (flight, document), cache in zip(read, self._payloads.decode([d for _, d in read]), strict=True):
            error = cache if isinstance(cache, PayloadError) else self._accept(cache)
            if error is None and isinstance(cache, DocumentCache):
                loaded.append(Loaded(flight, document, source, cache, self._memories.place(cache)))
            elif error is not None:
                refused.append((flight, error))
        if loaded:
            tokens = sum(item.cache.tokens for item in loaded)
            self._planner.decode.observe(tokens, time.perf_counter() - started)
        for item in loaded:
            item.flight.land(Found(item.placed, source))
        for flight, error in refused:
            flight.land(Found(refused=error))
        return loaded


def _give_up(flights: Sequence[Flight], error: StoreUnavailableError) -> None:
    for flight in flights:
        flight.land(Found(unavailable=error))
