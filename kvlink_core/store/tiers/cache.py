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
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store.tiers.breaker import CircuitBreaker, State
from kvlink_core.store.tiers.computing import Computing, Documents, Encode
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.found import Flight, Found, Round, Tier, Wanted
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.loading import Loader, Payloads
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.store.tiers.memory_tier import TierStats
from kvlink_core.store.tiers.planner import SOURCES, Candidate, Planner
from kvlink_core.store.tiers.settings import TierSettings
from kvlink_core.types import DocumentCache

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: The least time that a document is waited for which could be computed: what a scheduler may take to run a thread.
_LEAST_PATIENCE_S = 0.02


@dataclass(frozen=True, slots=True)
class CacheStats:
    """What the tiers hold, and what happened since start.

    Attributes:
        tiers: by name, those that there are.
        reads: documents read from disk or the store.
        computed: documents computed because that was expected to be faster.
        late: documents computed because loading them took longer than that.
        failures: times that the store failed or hung.
        circuit: whether the store is asked at present.
        circuit_opened: how often it was left alone.
    """

    tiers: Mapping[Tier, TierStats]
    reads: int
    computed: int
    late: int
    failures: int
    circuit: State
    circuit_opened: int


@dataclass(slots=True)
class _Counts:
    reads: int = 0
    computed: int = 0
    late: int = 0


@dataclass(slots=True)
class _Trip:
    """What one call of ``fetch`` set in motion."""

    found: dict[CacheKey, Found] = field(default_factory=dict)
    flights: dict[CacheKey, Flight] = field(default_factory=dict)


class TieredCache:
    """Keeps document caches in tiers of fixed size. Safe to use from several threads; ``close`` it.

    Args:
        settings: sizes and times.
        device: the model's.
        payloads: the store; ``None`` keeps only what is computed here.
        accept: why a cache is not one of the model's, if so; what it refuses is never kept.
        cache_bytes: bytes of K and V of a document of so many tokens.

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
        cache_bytes: Callable[[int], int],
    ) -> None:
        self.settings = settings
        self.planner = Planner(probe_every_s=settings.probe_every_s)
        self._cache_bytes = cache_bytes
        breaker = CircuitBreaker(
            failures=settings.failures, retry_after_s=settings.retry_after_s, trial_s=settings.timeout_s
        )
        self._guard = StoreGuard(breaker, settings.timeout_s)
        self._memories = Memories(settings.device_bytes, settings.host_bytes, device)
        self._computing = Computing(self._memories, self.planner.encode)
        self._disk = DiskTier(Path(settings.disk_path), settings.disk_bytes) if settings.disk_path is not None else None
        self._loader = Loader(payloads, self._disk, self._guard, self.planner, accept) if payloads is not None else None
        self._pool = ThreadPoolExecutor(settings.threads, thread_name_prefix="kvlink-tiers")
        self._lock = threading.Lock()
        self._flights: dict[CacheKey, Flight] = {}
        self._prefetching = 0
        self._counts = _Counts()

    def close(self) -> None:
        """Wait for what is being read, end the threads and free the memory. It must not be used afterwards."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            stranded = [f for f in self._flights.values() if not f.found.done()]
            self._flights.clear()
        for flight in stranded:
            flight.found.set_result(Found(unavailable=StoreUnavailableError("the tiers were closed")))
        self._memories.close()
        if self._disk is not None:
            self._disk.close()

    @property
    def stats(self) -> CacheStats:
        """What the tiers hold now, and what happened since start."""
        there = self._memories.stats()
        if self._disk is not None:
            there["disk"] = self._disk.stats
        breaker = self._guard.breaker
        with self._lock:
            counts = self._counts
            return CacheStats(
                there, counts.reads, counts.computed, counts.late, self._guard.failures, breaker.state, breaker.opened
            )

    # Looking up

    def fetch(self, wanted: Iterable[Wanted]) -> dict[CacheKey, Found]:
        """Each document's cache, or why it has to be computed; by key. Raises nothing that concerns the store.

        A document that could be computed is waited for as long as computing it is expected to take, the others as long
        as the time-out says.
        """
        items = {item.key: item for item in wanted}
        trip = self._begin(items.values())
        started = time.monotonic()
        for computable, patience_s in ((True, self._patience_s(items, trip.flights)), (False, self.settings.timeout_s)):
            awaited = [f.found for key, f in trip.flights.items() if items[key].computable is computable]
            wait(awaited, timeout=max(0.0, started + patience_s - time.monotonic()))
        for key, flight in trip.flights.items():
            if flight.found.done():
                trip.found[key] = flight.found.result()
            else:
                self._note_late(flight, items[key])
                trip.found[key] = Found(unavailable=self._guard.late())
        return trip.found

    def prefetch(self, wanted: Iterable[Wanted]) -> None:
        """Begin to load what ``fetch`` would load, and return. Does nothing when enough is being prefetched already."""
        with self._lock:
            if self._prefetching >= max(1, self.settings.threads // 2):
                return
            self._prefetching += 1
        trip = self._begin({item.key: item for item in wanted}.values())
        left = [f.found for f in trip.flights.values()]
        if not left:
            self._prefetched()
        remaining = [len(left)]

        def landed(_: Future[Found]) -> None:
            with self._lock:
                remaining[0] -= 1
                last = remaining[0] == 0
            if last:
                self._prefetched()

        for future in left:
            future.add_done_callback(landed)

    def _prefetched(self) -> None:
        with self._lock:
            self._prefetching -= 1

    def _begin(self, wanted: Iterable[Wanted]) -> _Trip:
        """Find what is in memory, join what is on its way, and set off for what is worth loading."""
        trip = _Trip()
        missing: list[Wanted] = []
        for item in wanted:
            found = self._memories.get(item.key)
            if found is None:
                missing.append(item)
            else:
                trip.found[item.key] = found
        if not missing:
            return trip
        with self._lock:
            unstarted: list[Wanted] = []
            for item in missing:
                flight = self._flights.get(item.key)
                # What landed since the first look is in memory now: a flight ends only after that.
                found = None if flight is not None else self._memories.get(item.key, promote=False)
                if flight is not None:
                    trip.flights[item.key] = flight
                elif found is not None:
                    trip.found[item.key] = found
                else:
                    unstarted.append(item)
            self._set_off(unstarted, trip)
        return trip

    def _set_off(self, wanted: Sequence[Wanted], trip: _Trip) -> None:
        """Decide which of them to load, and begin. With the lock held."""
        stored: list[Flight] = []
        for item in wanted:
            trip.found[item.key] = Found()  # to be computed, unless something better is said below
            if item.row is not None and self._loader is not None:
                alone = Round(time.monotonic(), item.row.nbytes)
                stored.append(Flight(item, item.row, self._loader.source(item.row), alone))
        loads = self._choose(stored)
        waited = [f for f, load in zip(stored, loads, strict=True) if load]
        avoided = [f for f, load in zip(stored, loads, strict=True) if not load]
        self._counts.computed += len(avoided)
        # One of those avoided, if it is time to see how fast its source is now: nobody waits for it.
        started = waited + [f for f in avoided[:1] if self.planner.probe_due(f.source)]
        if any(f.source == "store" for f in started):
            permission = self._guard.allow()
            if permission == "no":
                error = self._guard.left_alone()
                trip.found |= {f.wanted.key: Found(unavailable=error) for f in waited if f.source == "store"}
                started = [f for f in started if f.source != "store"]
            if permission != "yes":  # nobody waits for a trial who can do without
                waited = [f for f in waited if f.source != "store" or not f.wanted.computable]
        trip.flights |= {f.wanted.key: f for f in waited if f in started}
        for source in SOURCES:
            self._begin_round([f for f in started if f.source == source])

    def _begin_round(self, flights: Sequence[Flight]) -> None:
        if not flights:
            return
        together = Round(time.monotonic(), sum(f.row.nbytes for f in flights))
        for flight in flights:
            flight.round = together
            self._flights[flight.wanted.key] = flight
        self._pool.submit(self._fly, flights)

    def _choose(self, stored: Sequence[Flight]) -> list[bool]:
        if self.settings.recompute == "never" or not stored:
            return [True] * len(stored)
        return self.planner.choose([self._candidate(f) for f in stored])

    def _candidate(self, flight: Flight) -> Candidate:
        item = flight.wanted
        return Candidate(flight.source, flight.row.nbytes, self._cache_bytes(item.tokens), item.tokens, item.computable)

    def _patience_s(self, items: Mapping[CacheKey, Wanted], flights: Iterable[CacheKey]) -> float:
        """How long documents that could be computed are waited for: as long as computing them would take.

        So at the worst, when a store that was fast hangs, a request takes twice what computing takes.
        """
        if self.settings.recompute == "never":
            return self.settings.timeout_s
        tokens = sum(items[k].tokens for k in flights if items[k].computable)
        return min(self.settings.timeout_s, max(_LEAST_PATIENCE_S, self.planner.encode_s(tokens)))

    def _note_late(self, flight: Flight, item: Wanted) -> None:
        with self._lock:
            self._counts.late += item.computable
            first, flight.round.late = not flight.round.late, True
        waited_s, nbytes = time.monotonic() - flight.round.started, flight.round.nbytes
        if first and waited_s > self.planner.read[flight.source].seconds(nbytes):
            # It takes at least so long, which is worth knowing before it is there.
            self.planner.observe_read(flight.source, nbytes, waited_s)

    # Loading

    def _fly(self, flights: Sequence[Flight]) -> None:
        """On a thread of the pool: load, let those who wait go on, and keep what was loaded."""
        try:
            assert self._loader is not None
            read = self._loader.load(flights)
            there = [(f.wanted.key, cache) for f in flights if (cache := f.found.result().cache) is not None]
            with self._lock:
                self._counts.reads += len(there)
            for key, cache in there:
                self._memories.keep(key, cache)
            self._loader.keep(read)
        # Broad on purpose: whatever it is, those who wait must learn of it, and it must not be lost with the thread.
        except BaseException as error:
            logger.exception("loading %d documents failed", len(flights))
            for flight in flights:
                if not flight.found.done():
                    flight.found.set_exception(error)
        finally:
            with self._lock:
                for flight in flights:
                    self._flights.pop(flight.wanted.key, None)

    # Computing, and what else the store is asked

    def compute(self, documents: Documents, encode: Encode) -> dict[CacheKey, DocumentCache]:
        """Compute documents of known token ids and keep them; each only once, however many threads want it.

        Raises what ``encode`` raises, for documents of this call alone.
        """
        return self._computing.compute(documents, encode)

    def ask(self, question: Callable[[], T], *, wait_s: float | None = None) -> T:
        """Ask the store something else through the circuit breaker.

        Args:
            question: may hang.
            wait_s: how long to wait; by default, and at most, the time-out. The question goes on beyond that.

        Raises ``StoreUnavailableError``, also at once, and what ``question`` raises.
        """
        if self._guard.allow() == "no":
            raise self._guard.left_alone()
        future = self._pool.submit(self._guard.watch, question)
        patience_s = self.settings.timeout_s if wait_s is None else min(wait_s, self.settings.timeout_s)
        if not wait([future], timeout=patience_s).done:
            raise self._guard.late()
        return future.result()
