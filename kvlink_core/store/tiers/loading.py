"""One round of reading: from rows to caches that can be linked, from disk or from the store."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import IO, Protocol

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.found import Flight, Found
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.planner import Planner, Source
from kvlink_core.types import DocumentCache

logger = logging.getLogger(__name__)

#: A flight and what was read for it.
Read = tuple[Flight, EncodedDocument]


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


class Loader:
    """Reads, decodes and checks; measures both. Safe to use from several threads.

    Args:
        payloads: the store.
        disk: the disk tier, if there is one.
        guard: through which the store is asked.
        planner: is told how long it took.
        accept: why a cache is not one of the model's, if so.
    """

    def __init__(
        self,
        payloads: Payloads,
        disk: DiskTier | None,
        guard: StoreGuard,
        planner: Planner,
        accept: Callable[[DocumentCache], PayloadError | None],
    ) -> None:
        self._payloads = payloads
        self._disk = disk
        self._guard = guard
        self._planner = planner
        self._accept = accept

    def source(self, row: CatalogRow) -> Source:
        """Where ``load`` would look first."""
        return "disk" if self._disk is not None and CacheKey.of(row) in self._disk else "store"

    def load(self, flights: Sequence[Flight]) -> list[Read]:
        """Set what was found of every flight, all of one source, and return what came from the store, for ``keep``.

        Raises nothing that concerns the store; what else goes wrong is passed on, with flights not set.
        """
        absent = list(flights)
        if flights[0].source == "disk":
            read, absent = self._from_disk(flights)
            self._decode(read, "disk")
            if not absent:
                return []
            if self._guard.allow() == "no":
                _give_up(absent, self._guard.left_alone())
                return []
        try:
            read = self._from_store(absent)
        except StoreUnavailableError as error:
            logger.warning("the store does not answer for %d documents: %s", len(absent), error)
            _give_up(absent, error)
            return []
        self._decode(read, "store")
        return read

    def keep(self, read: Sequence[Read]) -> None:
        """Write to disk what ``load`` returned and did not refuse."""
        for flight, document in read if self._disk is not None else ():
            if flight.found.result().cache is not None:
                self._write(flight.wanted.key, flight.row, document)

    def _write(self, key: CacheKey, row: CatalogRow, document: EncodedDocument) -> None:
        assert self._disk is not None
        nbytes = row.nbytes + 4 * document.shape.tokens
        self._disk.put(key, nbytes, lambda file: self._payloads.write_copy(file, row, document))

    def _from_disk(self, flights: Sequence[Flight]) -> tuple[list[Read], list[Flight]]:
        """What is on disk, and what is not, or not any more."""
        assert self._disk is not None
        started = time.perf_counter()
        read: list[Read] = []
        absent: list[Flight] = []
        for flight in flights:
            document = self._disk.get(flight.row)
            if document is None:
                absent.append(flight)
            else:
                read.append((flight, document))
        self._observe("disk", read, started)
        return read, absent

    def _from_store(self, flights: Sequence[Flight]) -> list[Read]:
        started = time.perf_counter()
        documents = self._guard.watch(lambda: self._payloads.load_encoded([f.row for f in flights]))
        read: list[Read] = []
        for flight, document in zip(flights, documents, strict=True):
            if isinstance(document, PayloadError):
                flight.found.set_result(Found(refused=document))
            else:
                read.append((flight, document))
        self._observe("store", read, started)
        return read

    def _observe(self, source: Source, read: Sequence[Read], started: float) -> None:
        nbytes = sum(flight.row.nbytes for flight, _ in read)
        if nbytes:
            self._planner.observe_read(source, nbytes, time.perf_counter() - started)

    def _decode(self, read: Sequence[Read], source: Source) -> None:
        if not read:
            return
        started = time.perf_counter()
        caches = self._payloads.decode([document for _, document in read])
        decoded = sum(c.nbytes for c in caches if isinstance(c, DocumentCache))
        if decoded:
            self._planner.decode.observe(decoded, time.perf_counter() - started)
        for (flight, _), cache in zip(read, caches, strict=True):
            refused = cache if isinstance(cache, PayloadError) else self._accept(cache)
            if refused is None and isinstance(cache, DocumentCache):
                flight.found.set_result(Found(cache, source))
            else:
                flight.found.set_result(Found(refused=refused))


def _give_up(flights: Sequence[Flight], error: StoreUnavailableError) -> None:
    for flight in flights:
        flight.found.set_result(Found(unavailable=error))
