"""Places within a fixed piece of memory. Pure bookkeeping over offsets; it owns no memory."""

from __future__ import annotations

from bisect import bisect_left, insort


class Arena:
    """Hands out byte ranges of ``[0, capacity)`` that never overlap, the best fitting hole first. Not thread-safe.

    Args:
        capacity: bytes; what is beyond the last multiple of ``alignment`` is not used.
        alignment: of the places and their sizes.
    """

    def __init__(self, capacity: int, *, alignment: int = 64) -> None:
        self.alignment = alignment
        self.capacity = capacity - capacity % alignment
        self.free_bytes = self.capacity
        self._taken: dict[int, int] = {}
        # The same holes twice: by size to find one that fits, by either end to join neighbours.
        self._by_size = [(self.capacity, 0)] if self.capacity else []
        self._end_of = {0: self.capacity} if self.capacity else {}
        self._start_of = {self.capacity: 0} if self.capacity else {}

    def rounded(self, nbytes: int) -> int:
        """What a request of ``nbytes`` takes."""
        return max(1, -(-nbytes // self.alignment)) * self.alignment

    @property
    def largest_hole(self) -> int:
        """The most that ``take`` would give now."""
        return self._by_size[-1][0] if self._by_size else 0

    def take(self, nbytes: int) -> int | None:
        """Where ``nbytes`` are from now on taken; ``None`` when no hole is large enough."""
        size = self.rounded(nbytes)
        index = bisect_left(self._by_size, (size, 0))
        if index == len(self._by_size):
            return None
        _, start = self._by_size[index]
        end = self._end_of[start]
        self._remove_hole(start, end)
        if end - start > size:
            self._add_hole(start + size, end)
        self._taken[start] = size
        self.free_bytes -= size
        return start

    def give(self, start: int) -> None:
        """Make the place at ``start`` free again."""
        size = self._taken.pop(start)
        self.free_bytes += size
        end = start + size
        if start in self._start_of:
            before = self._start_of[start]
            self._remove_hole(before, start)
            start = before
        if end in self._end_of:
            after = self._end_of[end]
            self._remove_hole(end, after)
            end = after
        self._add_hole(start, end)

    def _add_hole(self, start: int, end: int) -> None:
        insort(self._by_size, (end - start, start))
        self._end_of[start] = end
        self._start_of[end] = start

    def _remove_hole(self, start: int, end: int) -> None:
        del self._by_size[bisect_left(self._by_size, (end - start, start))]
        del self._end_of[start]
        del self._start_of[end]
