"""The arena against a map of single bytes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.store.tiers.arena import Arena


@settings(max_examples=150, deadline=None)
@given(
    capacity=st.integers(0, 300),
    alignment=st.sampled_from([1, 4, 16]),
    steps=st.lists(st.tuples(st.booleans(), st.integers(0, 90)), max_size=80),
)
def test_places_never_overlap_and_holes_are_whole(capacity: int, alignment: int, steps: list[tuple[bool, int]]) -> None:
    arena = Arena(capacity, alignment=alignment)
    usable = capacity // alignment * alignment
    owner: list[int | None] = [None] * usable
    taken: list[tuple[int, int]] = []
    for take, number in steps:
        if take:
            size = max(alignment, (number + alignment - 1) // alignment * alignment)
            runs = "".join("." if o is None else "x" for o in owner).split("x")
            start = arena.take(number)
            assert (start is not None) == any(len(run) >= size for run in runs)
            if start is not None:
                assert start % alignment == 0
                assert owner[start : start + size] == [None] * size
                owner[start : start + size] = [len(taken)] * size
                taken.append((start, size))
        elif taken:
            start, size = taken.pop(number % len(taken))
            arena.give(start)
            owner[start : start + size] = [None] * size
        runs = "".join("." if o is None else "x" for o in owner).split("x")
        assert arena.free_bytes == owner.count(None)
        assert arena.largest_hole == max(map(len, runs))


def test_the_smallest_hole_that_fits_is_taken() -> None:
    arena = Arena(100, alignment=1)
    places = [arena.take(n) for n in (10, 1, 30, 1, 20, 38)]
    for index in (0, 2, 4):
        arena.give(places[index])  # type: ignore[arg-type]
    assert arena.take(15) == places[4]
    assert arena.take(10) == places[0]
    assert arena.take(31) is None
    assert arena.take(30) == places[2]
