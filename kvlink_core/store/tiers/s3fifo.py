"""Which document to give up: S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", 2023), by bytes.

New entries pass through a small queue, from which only those that were asked for again reach the main queue; so what is
read once, a scan of a whole corpus for instance, leaves without displacing what is read often. Pure bookkeeping:
no memory, no clock, no lock.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)

#: Hits are counted up to here: two bits, as in the paper.
MAX_HITS = 3

#: Part of the capacity that the small queue may fill before it has to give first.
SMALL_SHARE = 0.1

#: Hits in the small queue that earn a place in the main one.
PROMOTING_HITS = 1


class _Entry:
    __slots__ = ("hits", "nbytes")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.hits = 0


class S3Fifo(Generic[K]):
    """The entries of a cache and the order in which they leave it. Not thread-safe.

    The caller makes room before it adds: ``evict`` until there is enough, then ``add``.

    Args:
        capacity: bytes; what ``add`` would bring beyond it is a programming error.
        ghosts: the most keys to remember of entries that left the small queue. By bytes, as many are remembered as
            the main queue may hold.
    """

    def __init__(self, capacity: int, *, ghosts: int = 100_000, promoting_hits: int = PROMOTING_HITS) -> None:
        assert capacity >= 0
        self.capacity = capacity
        self.nbytes = 0
        self._small_target = int(capacity * SMALL_SHARE)
        self._small: OrderedDict[K, _Entry] = OrderedDict()
        self._main: OrderedDict[K, _Entry] = OrderedDict()
        self._small_bytes = 0
        self._ghosts: OrderedDict[K, int] = OrderedDict()
        self._ghost_bytes = 0
        self._ghost_limit = ghosts
        self._promoting_hits = promoting_hits

    def __contains__(self, key: K) -> bool:
        return key in self._small or key in self._main

    def __len__(self) -> int:
        return len(self._small) + len(self._main)

    def __iter__(self) -> Iterator[K]:
        yield from self._small
        yield from self._main

    def hit(self, key: K) -> None:
        """Note that ``key``, which must be there, was asked for."""
        entry = self._small.get(key) or self._main[key]
        entry.hits = min(MAX_HITS, entry.hits + 1)

    def add(self, key: K, nbytes: int) -> None:
        """Add ``key``, which must not be there and must fit."""
        assert key not in self
        assert 0 <= nbytes <= self.capacity - self.nbytes
        if key in self._ghosts:
            self._ghost_bytes -= self._ghosts.pop(key)
            self._main[key] = _Entry(nbytes)
        else:
            self._small[key] = _Entry(nbytes)
            self._small_bytes += nbytes
        self.nbytes += nbytes

    def remove(self, key: K) -> None:
        """Take ``key``, which must be there, out, without remembering it."""
        if key in self._small:
            self._small_bytes -= self._small[key].nbytes
            self.nbytes -= self._small.pop(key).nbytes
        else:
            self.nbytes -= self._main.pop(key).nbytes

    def evict(self, may_leave: Callable[[K], bool] = lambda _: True) -> K | None:
        """Take out the entry whose turn it is, among those that ``may_leave``; ``None`` when none of them may.

        One that may not keeps its place in the order for another round.
        """
        if not any(may_leave(key) for key in self):
            return None
        while True:  # ends: what the small queue promotes, the main one gives up once its hits are used up
            small_first = self._small_bytes > self._small_target or not self._main
            for turn in (self._evict_small, self._evict_main) if small_first else (self._evict_main, self._evict_small):
                key = turn(may_leave)
                if key is not None:
                    return key

    def _evict_small(self, may_leave: Callable[[K], bool]) -> K | None:
        """Look once through the small queue, promoting what was hit, until an entry leaves the cache."""
        for _ in range(len(self._small)):
            key, entry = self._small.popitem(last=False)
            if not may_leave(key):
                self._small[key] = entry
                continue
            self._small_bytes -= entry.nbytes
            if entry.hits >= self._promoting_hits:
                entry.hits = 0
                self._main[key] = entry
                continue
            self.nbytes -= entry.nbytes
            self._remember(key, entry.nbytes)
            return key
        return None

    def _evict_main(self, may_leave: Callable[[K], bool]) -> K | None:
        """Turn the main queue, a hit less for each entry each time, until an entry leaves; ``None`` if none may."""
        for _ in range((MAX_HITS + 1) * len(self._main)):
            key, entry = self._main.popitem(last=False)
            if entry.hits or not may_leave(key):
                entry.hits = max(0, entry.hits - 1)
                self._main[key] = entry
                continue
            self.nbytes -= entry.nbytes
            return key
        return None

    def _remember(self, key: K, nbytes: int) -> None:
        self._ghosts[key] = nbytes
        self._ghost_bytes += nbytes
        while self._ghost_bytes > self.capacity - self._small_target or len(self._ghosts) > self._ghost_limit:
            _, forgotten = self._ghosts.popitem(last=False)
            self._ghost_bytes -= forgotten
