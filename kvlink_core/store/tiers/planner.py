"""Load or compute again: whichever is expected to be ready first, document by document.

A cache is worth loading only where that is faster than prefill, which depends on the store, the codec, the model and
the moment. So all of these speeds are measured while they are used, and what is not used is tried now and then.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Literal

from kvlink_core.store.tiers.cost import LinearCost

#: What has to be read before it can be linked.
Source = Literal["disk", "store"]
SOURCES: tuple[Source, ...] = ("disk", "store")

#: While loading is expected to take less than this part of computing, it is not doubted that it is faster.
_DOUBT = 0.25

#: What an observation is still worth after the interval in which what is avoided is tried.
_KEPT = 0.25
_LEAST_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class Candidate:
    """A document that could be loaded.

    Attributes:
        source: where it is.
        nbytes: bytes to read.
        tokens: its length.
        computable: whether its token ids are known; otherwise it is loaded, whatever that costs.
    """

    source: Source
    nbytes: int
    tokens: int
    computable: bool


class Planner:
    """Knows the speeds and decides. Safe to use from several threads.

    What was never observed is assumed to take no time when it is loading, and for ever when it is computing: a store is
    tried until it is known to be slow.

    Attributes:
        read: seconds by bytes read, for each source.
        decode: seconds by tokens, from bytes read to a cache where the model is.
        encode: seconds by tokens computed.
        ask: seconds by documents whose token ids are asked for.

    Args:
        probe_every_s: what is avoided is tried this often.
        clock: seconds that only grow.
    """

    def __init__(self, *, probe_every_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        self.read: Mapping[Source, LinearCost] = {source: LinearCost() for source in SOURCES}
        self.decode = LinearCost()
        self.encode = LinearCost()
        self.ask = LinearCost()
        self._probe_every_s = probe_every_s
        self._clock = clock
        self._tried: dict[str, float] = {}
        self._observed: dict[str, float] = {}
        self._lock = threading.Lock()

    def observe_read(self, source: Source, nbytes: int, seconds: float) -> None:
        """One round of reading took ``seconds`` for ``nbytes`` of one or several documents."""
        self._observe(source, self.read[source], nbytes, seconds)

    def observe_encode(self, tokens: int, seconds: float) -> None:
        """Computing ``tokens`` of one or several documents took ``seconds``."""
        self._observe("encode", self.encode, tokens, seconds)

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

    def worth_asking(self, candidates: Sequence[Candidate]) -> list[bool]:
        """Of which to ask the token ids first, because computing them then is faster than loading, asking included."""
        loads = self.choose([replace(c, computable=True) for c in candidates])
        asked = [not load and not c.computable for c, load in zip(candidates, loads, strict=True)]
        now_s = self._total(candidates, self.choose(candidates))
        then_s = self._total(candidates, loads) + self.ask.seconds(sum(asked))
        return asked if any(asked) and then_s < now_s else [False] * len(asked)

    def source_probe_due(self, source: Source) -> bool:
        """Whether a source that is being avoided should be tried again; true for one caller at a time."""
        return self._due(source)

    def encode_probe(self, candidates: Sequence[Candidate], loads: Sequence[bool]) -> int | None:
        """Which of those that ``loads`` would load to compute instead, to see if that is as slow as it was.

        ``None`` but for now and then, and only where loading takes long enough for computing to be a rival; true for
        one caller at a time.
        """
        chosen = [i for i, (c, load) in enumerate(zip(candidates, loads, strict=True)) if load and c.computable]
        if not chosen or not self.encode.known:
            return None
        # One of middling length: the shortest would say little about a token, the longest cost most.
        middle = sorted(chosen, key=lambda i: candidates[i].tokens)[len(chosen) // 2]
        if self._load_part(candidates[middle]) < _DOUBT * self.encode_s(candidates[middle].tokens):
            return None
        return middle if self._due("encode") else None

    def _total(self, candidates: Sequence[Candidate], loads: Sequence[bool]) -> float:
        computed = sum(c.tokens for c, load in zip(candidates, loads, strict=True) if not load)
        loaded = [c for c, load in zip(candidates, loads, strict=True) if load]
        return self.load_s(loaded) + (self.encode_s(computed) if computed else 0.0)

    def _load_part(self, candidate: Candidate) -> float:
        reading = self.read[candidate.source].per_unit * candidate.nbytes
        return reading + self.decode.per_unit * candidate.tokens

    def _due(self, what: str) -> bool:
        now = self._clock()
        with self._lock:
            if now - self._tried.get(what, float("-inf")) < self._probe_every_s:
                return False
            self._tried[what] = now
            return True

    def _observe(self, what: str, cost: LinearCost, amount: int, seconds: float) -> None:
        # What is avoided is seen once in each interval: that must count for more than one of many in a second.
        with self._lock:
            now = self._clock()
            age_s = now - self._observed.get(what, now)
            self._tried[what] = self._observed[what] = now
        cost.observe(amount, seconds, keep=_KEPT ** (age_s / max(self._probe_every_s, _LEAST_INTERVAL_S)))
