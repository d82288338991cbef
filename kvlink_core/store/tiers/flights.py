"""Documents on their way here: each is read once, for everybody who wants it at that time."""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Literal

from kvlink_core.errors import StoreUnavailableError
from kvlink_core.store.tiers.found import Flight, Found, Round, Trip, Wanted
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.loading import Loader
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.store.tiers.planner import SOURCES, Candidate, Planner, Source
from kvlink_core.store.tiers.workers import Workers

logger = logging.getLogger(__name__)


class Flights:
    """Sets off for what is worth loading. Safe to use from several threads.

    Args:
        loader: reads; ``None`` where there is no store.
        memories: looked at first.
        guard: says whether the store may be asked.
        planner: says what is worth loading.
        workers: for each source.
        recompute: ``never`` loads whatever can be loaded.
    """

    def __init__(
        self,
        loader: Loader | None,
        memories: Memories,
        guard: StoreGuard,
        planner: Planner,
        workers: dict[Source, Workers],
        recompute: Literal["auto", "never"],
    ) -> None:
        self._loader = loader
        self._memories = memories
        self._guard = guard
        self._planner = planner
        self._workers = workers
        self._recompute = recompute
        self._lock = threading.Lock()
        self._flying: dict[CacheKey, Flight] = {}

    def close(self) -> None:
        """Let everybody go who still waits."""
        with self._lock:
            stranded = list(self._flying.values())
            self._flying.clear()
        for flight in stranded:
            flight.land(_CLOSED)

    def begin(self, wanted: Iterable[Wanted]) -> Trip:
        """Find what is in memory, join what is on its way, and set off for what is worth loading. Does not wait."""
        trip = Trip()
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
            unstarted = [item for item in missing if not self._join(item, trip)]
            rounds = self._set_off(unstarted, trip)
        for flights in rounds:
            if not self._workers[flights[0].source].submit(functools.partial(self._fly, flights)):
                self._end(flights, _CLOSED)
        return trip

    def candidates(self, wanted: Iterable[Wanted]) -> list[tuple[Wanted, Candidate]]:
        """Those that ``begin`` would have to set off for, as the planner sees them."""
        there: list[tuple[Wanted, Candidate]] = []
        for item in wanted:
            with self._lock:
                near = item.key in self._flying or item.key in self._memories
            if not near and item.row is not None and self._loader is not None:
                source = self._loader.source(item.row)
                there.append((item, Candidate(source, item.row.nbytes, item.tokens, item.computable)))
        return there

    def note_late(self, flight: Flight) -> None:
        """Somebody stopped waiting for it."""
        with self._lock:
            first, flight.round.slow = not flight.round.slow, True
        waited_s, nbytes = time.monotonic() - flight.round.started, flight.round.nbytes
        if first and waited_s > self._planner.read[flight.source].seconds(nbytes):
            # It takes at least so long, which is worth knowing before it is there.
            self._planner.observe_read(flight.source, nbytes, waited_s)

    def _join(self, item: Wanted, trip: Trip) -> bool:
        """Whether ``item`` is on its way already, or has just landed. With the lock held."""
        flight = self._flying.get(item.key)
        if flight is not None:
            if flight.round.slow and item.computable and not flight.found.done():
                trip.found[item.key] = Found()
            else:
                trip.flights[item.key] = flight
            return True
        # What landed since the first look is in memory now: a flight ends only after that.
        found = self._memories.get(item.key, promote=False)
        if found is not None:
            trip.found[item.key] = found
        return found is not None

    def _set_off(self, wanted: Sequence[Wanted], trip: Trip) -> list[list[Flight]]:
        """Decide which of them to load; the rounds that are to begin. With the lock held."""
        stored: list[Flight] = []
        for item in wanted:
            trip.found[item.key] = Found()  # to be computed, unless something better is said below
            if item.row is not None and self._loader is not None:
                alone = Round(time.monotonic(), item.row.nbytes)
                stored.append(Flight(item, item.row, self._loader.source(item.row), alone))
        loads = self._choose(stored)
        waited = [f for f, load in zip(stored, loads, strict=True) if load]
        avoided = [f for f, load in zip(stored, loads, strict=True) if not load]
        trip.avoided = len(avoided)
        # One of those avoided, if it is time to see how fast its source is now.
        probe = next((f for f in avoided if self._planner.source_probe_due(f.source)), None)
        beside = [probe] if probe is not None else []
        if any(f.source == "store" for f in waited + beside):
            permission = self._guard.allow()
            if permission == "no":
                error = self._guard.left_alone()
                trip.found |= {f.wanted.key: Found(unavailable=error) for f in waited if f.source == "store"}
                waited, beside = ([f for f in flights if f.source != "store"] for flights in (waited, beside))
            elif permission == "trial":  # nobody waits for it who can do without
                beside += [f for f in waited if f.source == "store" and f.wanted.computable]
                waited = [f for f in waited if f not in beside]
        trip.flights |= {f.wanted.key: f for f in waited}
        rounds = [
            self._round([f for f in flights if f.source == source], slow)
            for source in SOURCES
            for flights, slow in ((waited, False), (beside, True))
        ]
        return [flights for flights in rounds if flights]

    def _round(self, flights: list[Flight], slow: bool) -> list[Flight]:
        together = Round(time.monotonic(), sum(f.row.nbytes for f in flights), slow)
        for flight in flights:
            flight.round = together
            self._flying[flight.wanted.key] = flight
        return flights

    def _choose(self, stored: Sequence[Flight]) -> list[bool]:
        """Which of them to load."""
        if self._recompute == "never" or not stored:
            return [True] * len(stored)
        candidates = [Candidate(f.source, f.row.nbytes, f.wanted.tokens, f.wanted.computable) for f in stored]
        loads = self._planner.choose(candidates)
        probe = self._planner.encode_probe(candidates, loads)
        return loads if probe is None else [load and i != probe for i, load in enumerate(loads)]

    def _fly(self, flights: Sequence[Flight]) -> None:
        """On a worker: load, let those who wait go on, and keep what was loaded."""
        assert self._loader is not None
        ended = _CLOSED
        try:
            self._loader.keep(self._loader.load(flights))
        # Broad on purpose: whatever it is, a document that cannot be loaded is computed, and those who wait must know.
        except Exception as error:
            logger.exception("loading %d documents failed", len(flights))
            ended = Found(unavailable=StoreUnavailableError(f"loading failed: {type(error).__name__}"))
        finally:
            self._end(flights, ended)

    def _end(self, flights: Sequence[Flight], found: Found) -> None:
        """They are in memory, or never will be; those of which nothing was heard end with ``found``."""
        with self._lock:
            for flight in flights:
                if self._flying.get(flight.wanted.key) is flight:
                    del self._flying[flight.wanted.key]
        for flight in flights:  # without the lock: whoever waits may want it next
            flight.land(found)


_CLOSED = Found(unavailable=StoreUnavailableError("the tiers were closed"))
