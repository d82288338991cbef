"""Token ids that are remembered: exact, and never more than there may be."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from kvlink_core.store.token_memory import TokenMemory


def test_what_is_remembered_is_exact() -> None:
    memory = TokenMemory()
    memory.add("a", [0, 1, 2**32 - 1])
    memory.add("a", [9])  # a digest has one meaning
    assert memory.get("a") == [0, 1, 2**32 - 1]
    assert (memory.get("b"), "a" in memory, "b" in memory) == (None, True, False)


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 8), st.integers(0, 12)), max_size=60))
def test_the_longest_unused_are_forgotten(steps: list[tuple[bool, int, int]]) -> None:
    memory, held = TokenMemory(20), {}
    for add, name, length in steps:
        if add:
            memory.add(str(name), range(length))
            if str(name) not in held and length <= 20:
                held[str(name)] = length
            while sum(held.values()) > 20:
                del held[next(iter(held))]
        elif memory.get(str(name)) is not None:
            held[str(name)] = held.pop(str(name))
        assert {n: memory._items[n].buffer_info()[1] for n in memory._items} == held
    memory.add("long", range(21))
    assert "long" not in memory
