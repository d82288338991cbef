"""The memory for keys and values: a budget in bytes that is never exceeded, and lanes in it for what requests own.

A lane has room for a number of slots: a power of two, or some thousand. Lanes of a size lie side by side in slabs, so
that requests that decode are attended to in few calls. A slab without a lane in use is kept for the next request and
let go when the budget is needed for something else; so are documents that nobody reads (``documents``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

import torch

from kvlink_core.models import LoadedModel
from kvlink_core.models.flat_parts import Slots

#: The smallest lane, in slots.
SMALLEST_LANE = 64

#: Slots of a slab, unless one lane is longer; and the most lanes in it.
_SLAB_SLOTS, _SLAB_LANES = 1024, 16


class Budget:
    """Bytes that are in use, of a fixed number.

    What is ``idle`` counts as used, but is given up, the longest idle first, when something else needs the room.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.used = 0
        self.peak = 0
        self._idle: OrderedDict[object, tuple[int, Callable[[], None]]] = OrderedDict()

    @property
    def idle(self) -> int:
        """Bytes of ``used`` that would be given up for something else."""
        return sum(nbytes for nbytes, _ in self._idle.values())

    def take(self, nbytes: int) -> bool:
        """Reserve bytes, giving up idle ones for them; false, and nothing given up, if that would not do."""
        if self.used - self.idle + nbytes > self.limit:
            return False
        while self.used + nbytes > self.limit:
            self._drop_oldest()
        self.used += nbytes
        self.peak = max(self.peak, self.used)
        return True

    def give(self, nbytes: int) -> None:
        """Return reserved bytes."""
        self.used -= nbytes
        assert self.used >= 0

    def rest(self, key: object, nbytes: int, drop: Callable[[], None]) -> None:
        """Something that holds ``nbytes`` is idle; ``drop`` lets it go, and need not return the bytes."""
        self._idle[key] = (nbytes, drop)

    def wake(self, key: object) -> None:
        """It is in use again."""
        del self._idle[key]

    def trim(self) -> None:
        """Give up all that is idle."""
        while self._idle:
            self._drop_oldest()

    def _drop_oldest(self) -> None:
        _, (nbytes, drop) = self._idle.popitem(last=False)
        drop()
        self.give(nbytes)


class _Slab:
    """Lanes of one size."""

    def __init__(self, model: LoadedModel, lanes: int, capacity: int) -> None:
        (layers, heads, _, key_dim), (*_, value_dim) = model.recipes.shapes(1)
        shape = (layers, lanes, heads, capacity)
        # Zeros, because slots that are masked must still be finite.
        self.slots = Slots(
            torch.zeros(*shape, key_dim, dtype=model.dtype, device=model.device),
            torch.zeros(*shape, value_dim, dtype=model.dtype, device=model.device),
            torch.zeros(lanes, capacity, dtype=torch.int64, device=model.device),
        )
        self.capacity = capacity
        self.free = list(range(lanes - 1, -1, -1))
        self.lanes = lanes


@dataclass(frozen=True, slots=True, eq=False)
class Lane:
    """Slots of one request."""

    slab: _Slab
    index: int

    @property
    def slots(self) -> Slots:
        """The memory that it is a part of."""
        return self.slab.slots

    @property
    def capacity(self) -> int:
        """How many slots."""
        return self.slab.capacity

    def copy_from(self, other: Lane, count: int) -> None:
        """Take over the first ``count`` slots of another lane."""
        for name in ("keys", "values"):
            mine, theirs = getattr(self.slots, name), getattr(other.slots, name)
            mine[:, self.index, :, :count] = theirs[:, other.index, :, :count]
        self.slots.positions[self.index, :count] = other.slots.positions[other.index, :count]


class Lanes:
    """Hands out lanes of one model within a budget."""

    def __init__(self, model: LoadedModel, budget: Budget) -> None:
        self._model = model
        self._budget = budget
        self._slabs: dict[int, list[_Slab]] = {}
        keys, values = model.recipes.shapes(1)
        self._slot_bytes = sum(torch.Size(s).numel() for s in (keys, values)) * model.dtype.itemsize + 8

    def slab_bytes(self, slots: int) -> int:
        """What the first lane for ``slots`` takes of the budget: a whole slab."""
        capacity = _capacity(slots)
        return self._lanes(capacity) * capacity * self._slot_bytes

    def most_bytes(self, first: int, last: int) -> int:
        """The most that a lane takes that is to grow from ``first`` slots to ``last``."""
        capacity = _capacity(first)
        most = self.slab_bytes(capacity)
        while capacity < last:
            capacity = _capacity(capacity + 1)
            most = max(most, self.slab_bytes(capacity))
        return most

    def _lanes(self, capacity: int) -> int:
        # A slab is a small part of the budget, or of one lane.
        share = self._budget.limit // 16 // (capacity * self._slot_bytes)
        return max(1, min(_SLAB_LANES, _SLAB_SLOTS // capacity, share))

    def take(self, slots: int) -> Lane | None:
        """A lane for at least ``slots``; ``None`` where the budget has no room."""
        capacity = _capacity(slots)
        slabs = self._slabs.setdefault(capacity, [])
        slab = next((s for s in slabs if s.free), None)
        if slab is None:
            nbytes = self.slab_bytes(slots)
            if not self._budget.take(nbytes):
                return None
            slab = _Slab(self._model, self._lanes(capacity), capacity)
            slabs.append(slab)
        elif len(slab.free) == slab.lanes:
            self._budget.wake(slab)
        return Lane(slab, slab.free.pop())

    def give(self, lane: Lane) -> None:
        """Return a lane."""
        slab = lane.slab
        assert lane.index not in slab.free
        slab.free.append(lane.index)
        slab.free.sort(reverse=True)  # the lowest first: lanes in use stay close together
        if len(slab.free) == slab.lanes:
            self._budget.rest(slab, self.slab_bytes(slab.capacity), lambda: self._slabs[slab.capacity].remove(slab))


def _capacity(slots: int) -> int:
    if slots > _SLAB_SLOTS:
        return -(-slots // _SLAB_SLOTS) * _SLAB_SLOTS
    capacity = SMALLEST_LANE
    while capacity < slots:
        capacity *= 2
    return capacity
