"""Load or compute again: whichever is expected to be ready first, document by document.

A cache is worth loading only where that is faster than prefill, which depends on the store, the codec, the model and
the moment. So all three speeds are measured while they are used.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from kvlink_core.store.tiers.cost import LinearCost

#: What has to be read before it can be linked.
Source = Literal["disk", "store"]
SOURCES: tuple[Source, ...] = ("disk", "store")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that could be loaded.

    Attributes:
        source: where it is.
        nbytes: bytes to read.
        decoded: bytes of K and V.
        tokens: its length.
        computable: whether its token ids are known; otherwise it is loaded, whatever that costs.
    """

    source: Source
    nbytes: int
    decoded: int
    tokens: int
    computable: bool


class Planner:
    """Knows the speeds and decides. Safe to use from several threads.

    What was never observed is assumed to take no time when it is loading, and for ever when it is computing: a store is
    tried until it is known to be slow.

    Args:
        probe_every_s: a source that is avoided is tried this often, beside the request that avoids it.
        clock: seconds that only grow.
    """

    def __init__(self, *, probe_every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.read: Mapping[Source, LinearCost] = {source: LinearCost() for source in SOURCES}
        self.decode = LinearCost()
        self.encode = LinearCost()
        self._probe_every_s = probe_every_s
        self._clock = clock
        self._tried: dict[Source, float] = {}
        self._lock = threading.Lock()

    def observe_read(self, source: Source, nbytes: int, seconds: float) -> None:
        """One round of reading took ``seconds`` for ``nbytes`` of one or several documents."""
        self.read[source].observe(nbytes, seconds)
        with self._lock:
            self._tried[source] = self._clock()

    def load_s(self, candidates: Sequence[Candidate]) -> float:
        """Expected seconds to load these together, one round for each source."""
        if not candidates:
            return 0.0
        fixed = self.decode.fixed + sum(self.read[s].fixed for s in {c.source for c in candidates})
        return fixed + sum(self._load_part(c) for c in candidates)

    def encode_s(self, tokens: int) -> float:
        """Expected seconds to compute documents of as many tokens; infinite while that was never done."""
        return self.encode.seconds(tokens) if self.encode.known else float("inf")

    def choose(self, candidates: Sequence[Candidate]) -> list[bool]:
        """Which to load: the choice with the least expected time in all, of equal ones the one that loads more.

        Fixed parts are shared: a round of reading is waited for once, however many documents are in it. So a document
        is decided together with the others of its request.
        """
        everything = [True] * len(candidates)
        if not self.encode.known:
            return everything
        best, best_s = everything, self.load_s(candidates)
        # Given which sources are used at all, each document's choice is its own.
        used = sorted({c.source for c in candidates})
        for subset in product((True, False), repeat=len(used)):
            allowed = {source for source, there in zip(used, subset, strict=True) if there}
            loads = [
                not c.computable or (c.source in allowed and self._load_part(c) <= self.encode.per_unit * c.tokens)
                for c in candidates
            ]
            seconds = self._total(candidates, loads)
            if seconds < best_s:
                best, best_s = loads, seconds
        return best

    def _total(self, candidates: Sequence[Candidate], loads: Sequence[bool]) -> float:
        computed = sum(c.tokens for c, load in zip(candidates, loads, strict=True) if not load)
        loaded = [c for c, load in zip(candidates, loads, strict=True) if load]
        return self.load_s(loaded) + (self.encode_s(computed) if computed else 0.0)

    def _load_part(self, candidate: Candidate) -> float:
        reading = self.read[candidate.source].per_unit * candidate.nbytes
        return reading + self.decode.per_unit * candidate.decoded

    def probe_due(self, source: Source) -> bool:
        """Whether a source that is being avoided should be tried again; true for one caller at a time."""
        now = self._clock()
        with self._lock:
            if now - self._tried.get(source, float("-inf")) < self._probe_every_s:
                return False
            self._tried[source] = now
            return True
