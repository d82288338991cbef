"""``TieredCache``: document caches on their way from the store to the model, kept where they are met again.

Device memory, host memory, local disk, store: each is asked before the next, and what comes from one is kept in those
before it. Nothing is looked up by document id here. Ids are the catalog's, and everything here is known by what
it was made from, so a document that is replaced or deleted is never served under its id again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tiers.breaker import CircuitBreaker, State
from kvlink_core.store.tiers.computing import Computing, Documents, Encode
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.flights import Flights
from kvlink_core.store.tiers.found import Found, Tier, Wanted
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.loading import Loader, Payloads, ReadStats
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.store.tiers.memory_tier import TierStats
from kvlink_core.store.tiers.planner import SOURCES, Planner, Source
from kvlink_core.store.tiers.settings import TierSettings
from kvlink_core.store.tiers.workers import Workers
from kvlink_core.types import DocumentCache

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The least time that a document is waited for which could be computed: what a scheduler may take to run a thread.
_LEAST_PATIENCE_S = 0.02

#: How long ``close`` waits for reads that are under way; those of a store that hangs are left to end by themselves.
_CLOSING_S = 5.0


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the tiers hold, and what happened since start.

    Attributes:
        tiers: by name, those that there are.
        read: documents and bytes read, by source.
        computed: documents computed because that was expected to be faster.
        late: documents computed because loading them took longer than that.
        failures: times that the store failed or hung.
        circuit: whether the store is asked at present.
        circuit_opened: how often it was left alone.
    """

    tiers: Mapping[Tier, TierStats]
    read: Mapping[Source, ReadStats]
    computed: int
    late: int
    failures: int
    circuit: State
    circuit_opened: int


class TieredCache:
    """Keeps document caches in tiers of fixed size. Safe to use from several threads; ``close`` it.

    Args:
        settings: sizes and times.
        device: the model's.
        payloads: the store; ``None`` keeps only what is computed here.
        accept: why a cache is not one of the model's, if so; what it refuses is never kept.

    Raises:
        ConfigError: memory or directory cannot be had.
    """

    def __init__(
        self,
        settings: TierSettings,
        *,
        device: torch.device,
        payloads: Payloads | None,
        accept: Callable[[DocumentCache], PayloadError | None],
    ) -> None:
        self.settings = settings
        self.planner = Planner(probe_every_s=settings.probe_every_s)
        breaker = CircuitBreaker(
            failures=settings.failures, retry_after_s=settings.retry_after_s, trial_s=settings.timeout_s
        )
        self._guard = StoreGuard(breaker, settings.timeout_s)
        self._memories = Memories(settings.device_bytes, settings.host_bytes, device)
        self._computing = Computing(self._memories, self.planner.observe_encode)
        self._disk: DiskTier | None = None
        if settings.disk_path is not None:
            try:
                self._disk = DiskTier(Path(settings.disk_path), settings.disk_bytes)
            except BaseException:
                self._memories.close()
                raise
        self._loader: Loader | None = None
        if payloads is not None:
            self._loader = Loader(payloads, self._disk, self._memories, self._guard, self.planner, accept)
        # Each has threads of its own, so that a store that hangs keeps nobody from the disk.
        self._workers = {s: Workers(f"kvlink-{s}", settings.threads, settings.timeout_s) for s in SOURCES}
        self._flights = Flights(
            self._loader, self._memories, self._guard, self.planner, self._workers, settings.recompute
        )
        self._lock = threading.Lock()
        self._prefetching = self._computed = self._late = 0

    def close(self) -> None:
        """End the threads, waiting a little for what is being read, and free the memory; not to be used afterwards."""
        deadline = time.monotonic() + _CLOSING_S
        for workers in self._workers.values():
            workers.close(max(0.0, deadline - time.monotonic()))
        self._flights.close()
        self._memories.close()
        if self._disk is not None:
            self._disk.close()

    @property
    def stats(self) -> CacheStats:
        """What the tiers hold now, and what happened since start."""
        there = self._memories.stats()
        if self._disk is not None:
            there["disk"] = self._disk.stats
        read = self._loader.stats if self._loader is not None else {}
        breaker = self._guard.breaker
        with self._lock:
            return CacheStats(
                there, read, self._computed, self._late, self._guard.failures, breaker.state, breaker.opened
            )

    # Looking up

    def where(self, key: CacheKey) -> list[Tier]:
        """The tiers near the model that hold a document, the fastest first; looking does not count as use."""
        disk: list[Tier] = ["disk"] if self._disk is not None and key in self._disk else []
        return [*self._memories.where(key), *disk]

    def fetch(self, wanted: Iterable[Wanted]) -> dict[CacheKey, Found]:
        """Each document's cache, or why it has to be computed; by key. Raises nothing that concerns the store.

        A document that could be computed is waited for as long as computing it is expected to take, the others as long
        as the time-out says.
        """
        items = {item.key: item for item in wanted}
        trip = self._flights.begin(items.values())
        flights = trip.flights.items()
        computable = [key for key in trip.flights if items[key].computable]
        if computable:
            patience_s = self._patience_s(sum(items[key].tokens for key in computable))
            wait([trip.flights[key].found for key in computable], timeout=patience_s)
        if others := [flight for key, flight in flights if not items[key].computable]:
            deadline = max(flight.round.started for flight in others) + self.settings.timeout_s
            wait([f.found for f in others], timeout=max(_LEAST_PATIENCE_S, deadline - time.monotonic()))
        late = [(key, flight) for key, flight in flights if not flight.found.done()]
        for _, flight in late:
            self._flights.note_late(flight)
        with self._lock:
            self._computed += trip.avoided
            self._late += sum(items[key].computable for key, _ in late)
        error = self._guard.late()
        return (
            trip.found
            | {key: flight.found.result() for key, flight in flights if flight.found.done()}
            | {key: Found(unavailable=error) for key, _ in late}
        )

    def prefetch(self, wanted: Iterable[Wanted]) -> None:
        """Begin to load what ``fetch`` would load, and return. Does nothing when enough is being prefetched already."""
        with self._lock:
            if self._prefetching >= max(1, self.settings.threads // 2):
                return
            self._prefetching += 1
        trip = self._flights.begin({item.key: item for item in wanted}.values())
        left = [flight.found for flight in trip.flights.values()]
        remaining = [len(left)]

        def landed(_: Future[Found] | None = None) -> None:
            with self._lock:
                remaining[0] -= 1
                if remaining[0] <= 0:
                    self._prefetching -= 1

        if not left:
            landed()
        for future in left:
            future.add_done_callback(landed)

    def token_ids(
        self, wanted: Iterable[Wanted], read: Callable[[list[CatalogRow]], list[list[int]]]
    ) -> dict[CacheKey, list[int]]:
        """Token ids of those documents that are better computed than loaded, if only their token ids were known.

        Asks the store for them with ``read`` where that pays as well. Empty when it does not answer, or not soon.
        """
        if self.settings.recompute == "never":
            return {}
        there = self._flights.candidates({item.key: item for item in wanted}.values())
        worth = self.planner.worth_asking([candidate for _, candidate in there])
        asked = [item for (item, _), ask in zip(there, worth, strict=True) if ask]
        if not asked:
            return {}
        started = time.perf_counter()
        try:
            found = self.ask(lambda: read([i.row for i in asked if i.row]))
        except (PayloadError, StoreUnavailableError) as error:
            logger.info("no token ids of %d documents, loading them: %s", len(asked), error)
            return {}
        finally:
            self.planner.ask.observe(len(asked), time.perf_counter() - started)
        return {item.key: ids for item, ids in zip(asked, found, strict=True)}

    def _patience_s(self, tokens: int) -> float:
        """How long documents of so many tokens are waited for that could be computed: as long as that would take.

        So at the worst, when a store that was fast hangs, a request takes twice what computing takes.
        """
        if self.settings.recompute == "never":
            return self.settings.timeout_s
        return min(self.settings.timeout_s, max(_LEAST_PATIENCE_S, self.planner.encode_s(tokens)))

    # Computing, and what else the store is asked

    def compute(self, documents: Documents, encode: Encode) -> dict[CacheKey, DocumentCache]:
        """Compute documents of known token ids and keep them; each only once, however many threads want it.

        Raises what ``encode`` raises, for documents of this call alone.
        """
        return self._computing.compute(documents, encode)

    def calibrate(self, encode: Encode, lengths: Sequence[int]) -> None:
        """Learn how long documents of these lengths take to compute. Raises what ``encode`` raises."""
        self._computing.calibrate(lengths, encode)

    def ask(self, question: Callable[[], T], *, wait_s: float | None = None) -> T:
        """Ask the store something else through the circuit breaker.

        Args:
            question: may hang.
            wait_s: how long to wait; by default, and at most, the time-out. The question goes on beyond that.

        Raises ``StoreUnavailableError``, also at once, and what ``question`` raises.
        """
        if self._guard.allow() == "no":
            raise self._guard.left_alone()
        answer: Future[T] = Future()

        def work() -> None:
            try:
                answer.set_result(self._guard.watch(question))
            except BaseException as error:
                answer.set_exception(error)

        if not self._workers["store"].submit(work):
            raise StoreUnavailableError("the tiers were closed")
        patience_s = self.settings.timeout_s if wait_s is None else min(wait_s, self.settings.timeout_s)
        if not wait([answer], timeout=patience_s).done:
            raise self._guard.late()
        return answer.result()
