"""Ways to decide what a cache gives up, to compare ours with; all by bytes, over keys without contents."""

from __future__ import annotations

import heapq
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

from kvlink_core.store.tiers.s3fifo import S3Fifo


class Policy(Protocol):
    """A cache of some capacity."""

    def ask(self, key: int, size: int) -> bool:
        """Whether ``key`` is there; from now on it is, if there was room or room was made."""
        ...


class Ours:
    """S3-FIFO as the tiers have it."""

    def __init__(self, capacity: int) -> None:
        self._policy: S3Fifo[int] = S3Fifo(capacity)

    def ask(self, key: int, size: int) -> bool:
        """See ``Policy``."""
        policy = self._policy
        if key in policy:
            policy.hit(key)
            return True
        if size <= policy.capacity:
            while policy.nbytes + size > policy.capacity:
                policy.evict()
            policy.add(key, size)
        return False


class Queue:
    """The oldest leaves first: the longest unused one (LRU), or the one that came first (FIFO)."""

    def __init__(self, capacity: int, *, refresh: bool) -> None:
        self._free = capacity
        self._capacity = capacity
        self._refresh = refresh
        self._items: OrderedDict[int, int] = OrderedDict()

    def ask(self, key: int, size: int) -> bool:
        """See ``Policy``."""
        if key in self._items:
            if self._refresh:
                self._items.move_to_end(key)
            return True
        if size <= self._capacity:
            while size > self._free:
                self._free += self._items.popitem(last=False)[1]
            self._items[key] = size
            self._free -= size
        return False


class TinyLfu:
    """W-TinyLFU (Einziger, Friedman, Manes, 2017), with sizes as in its sequel of 2022.

    What would enter must have been asked for at least as often as all that would leave for it together. A window of
    1 % by LRU, the rest as a segmented LRU with four fifths protected. Frequencies are counted exactly and halved from
    time to time, which is kinder to it than its sketch.
    """

    def __init__(self, capacity: int) -> None:
        self._window: OrderedDict[int, int] = OrderedDict()
        self._probation: OrderedDict[int, int] = OrderedDict()
        self._protected: OrderedDict[int, int] = OrderedDict()
        self._window_size = max(1, capacity // 100)
        self._main_size = capacity - self._window_size
        self._protected_size = self._main_size * 4 // 5
        self._in_window = self._in_main = self._in_protected = 0
        self._seen: Counter[int] = Counter()
        self._asked = 0

    def ask(self, key: int, size: int) -> bool:
        """See ``Policy``."""
        self._count(key)
        if key in self._window:
            self._window.move_to_end(key)
            return True
        if key in self._protected:
            self._protected.move_to_end(key)
            return True
        if key in self._probation:
            self._protect(key)
            return True
        self._window[key] = size
        self._in_window += size
        while self._in_window > self._window_size:
            candidate, its_size = self._window.popitem(last=False)
            self._in_window -= its_size
            self._admit(candidate, its_size)
        return False

    def _count(self, key: int) -> None:
        self._seen[key] += 1
        self._asked += 1
        held = len(self._window) + len(self._probation) + len(self._protected)
        if self._asked >= 10 * max(100, held):
            self._asked = 0
            self._seen = Counter({k: n // 2 for k, n in self._seen.items() if n > 1})

    def _protect(self, key: int) -> None:
        size = self._protected[key] = self._probation.pop(key)
        self._in_protected += size
        while self._in_protected > self._protected_size:
            demoted, its_size = self._protected.popitem(last=False)
            self._in_protected -= its_size
            self._probation[demoted] = its_size

    def _admit(self, key: int, size: int) -> None:
        if size > self._main_size:
            return
        victims: list[int] = []
        room = self._main_size - self._in_main
        for queue in (self._probation, self._protected):
            for victim, its_size in queue.items():
                if room >= size:
                    break
                victims.append(victim)
                room += its_size
        if victims and self._seen[key] < sum(self._seen[v] for v in victims):
            return
        for victim in victims:
            if victim in self._protected:
                self._in_protected -= self._protected[victim]
            gone = self._probation.pop(victim, None) or self._protected.pop(victim)
            self._in_main -= gone
        self._probation[key] = size
        self._in_main += size


class Clairvoyant:
    """Gives up what will not be asked for the longest (Belady, 1966), which no policy can know.

    A bound for documents of one size, and close to one for others.
    """

    def __init__(self, capacity: int, keys: Sequence[int]) -> None:
        self._free = capacity
        self._next = [0] * len(keys)
        later: dict[int, int] = {}
        for at in range(len(keys) - 1, -1, -1):
            self._next[at] = later.get(keys[at], len(keys))
            later[keys[at]] = at
        self._never = len(keys)
        self._at = 0
        self._items: dict[int, tuple[int, int]] = {}  # when next, and size
        self._farthest: list[tuple[int, int]] = []

    def ask(self, key: int, size: int) -> bool:
        """See ``Policy``; the requests must be those that were announced."""
        due, self._at = self._next[self._at], self._at + 1
        hit = key in self._items
        if hit:
            self._free += self._items.pop(key)[1]
        leaving: list[tuple[int, int]] = []
        room = self._free
        while room < size and self._farthest and -self._farthest[0][0] > due:
            when, other = heapq.heappop(self._farthest)
            if other in self._items and self._items[other][0] == -when:
                leaving.append((when, other))
                room += self._items[other][1]
        if room >= size and due < self._never:
            for _, other in leaving:
                self._free += self._items.pop(other)[1]
            self._items[key] = (due, size)
            self._free -= size
            heapq.heappush(self._farthest, (-due, key))
        else:
            for entry in leaving:
                heapq.heappush(self._farthest, entry)
        return hit


#: How to make each, from a capacity and the keys that will be asked for.
POLICIES: dict[str, Callable[[int, Sequence[int]], Policy]] = {
    "s3-fifo": lambda capacity, _: Ours(capacity),
    "lru": lambda capacity, _: Queue(capacity, refresh=True),
    "fifo": lambda capacity, _: Queue(capacity, refresh=False),
    "w-tinylfu": lambda capacity, _: TinyLfu(capacity),
    "clairvoyant": Clairvoyant,
}
