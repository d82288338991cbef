"""What is learnt of speeds, and what is chosen from it."""

from __future__ import annotations

import random
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tier_scene import Clock

from kvlink_core.store.tiers.cost import LinearCost
from kvlink_core.store.tiers.planner import Candidate, Planner

# Costs


def test_a_fixed_part_and_a_part_per_unit_are_told_apart() -> None:
    cost = LinearCost()
    for amount in (100, 2000, 700, 1500):
        cost.observe(amount, 0.25 + amount / 1000)
    assert cost.fixed == pytest.approx(0.25)
    assert cost.per_unit == pytest.approx(1e-3)
    assert cost.seconds(10_000) == pytest.approx(10.25)


def test_equal_amounts_say_nothing_about_a_fixed_part() -> None:
    cost = LinearCost()
    for _ in range(5):
        cost.observe(100, 1.0)
    assert (cost.fixed, cost.seconds(50)) == (0.0, pytest.approx(0.5))


def test_it_forgets() -> None:
    cost = LinearCost()
    for _ in range(50):
        cost.observe(100, 1.0)
    for _ in range(10):
        cost.observe(100, 0.1)
    assert 0.1 < cost.seconds(100) < 0.25


@given(st.lists(st.tuples(st.floats(1, 1e9), st.floats(0, 1e3)), min_size=1, max_size=30))
def test_no_part_is_ever_negative(seen: list[tuple[float, float]]) -> None:
    cost = LinearCost()
    assert not cost.known
    for amount, seconds in seen:
        cost.observe(amount, seconds)
    assert cost.known
    assert cost.fixed >= 0
    assert cost.per_unit >= 0
    assert cost.seconds(1e9) >= cost.seconds(1) >= 0


# Choices


def candidate(source: str = "store", nbytes: int = 1000, tokens: int = 10, *, computable: bool = True) -> Candidate:
    return Candidate(source, nbytes, tokens, computable)  # type: ignore[arg-type]


def planner(*, store: float = 0.0, disk: float = 0.0, decode: float = 0.0, encode: float = 0.0) -> Planner:
    """One that has seen seconds per byte, or per token; 0 leaves it unknown."""
    made = Planner()
    for cost, slope in (
        (made.read["store"], store),
        (made.read["disk"], disk),
        (made.decode, decode),  # by tokens
        (made.encode, encode),
    ):
        for amount in (100, 200) if slope else ():
            cost.observe(amount, slope * amount)
    return made


def test_what_is_unknown_is_tried() -> None:
    assert planner(store=1e9).choose([candidate()]) == [True]  # never computed: loading is all that is known
    assert planner(encode=1e-9).choose([candidate()]) == [True]  # never loaded: may be fast


@pytest.mark.parametrize(
    ("costs", "load"),
    [
        ({"store": 1e-6, "encode": 1e-3}, True),  # 1 ms against 10
        ({"store": 1e-4, "encode": 1e-3}, False),  # 100 against 10
        ({"store": 1e-6, "encode": 1e-3, "decode": 2e-3}, False),  # 1 + 20 for decoding
    ],
)
def test_the_faster_one_is_chosen(costs: dict[str, float], load: bool) -> None:
    assert planner(**costs).choose([candidate()]) == [load]


def test_it_depends_on_the_document() -> None:
    made = planner(store=1e-5, encode=1e-3)
    assert made.choose([candidate(nbytes=500), candidate(nbytes=5000)]) == [True, False]
    assert made.choose([candidate("disk", nbytes=5000)]) == [True]


def test_what_cannot_be_computed_is_loaded_whatever_it_costs() -> None:
    made = planner(store=1.0, encode=1e-9)
    assert made.choose([candidate(computable=False), candidate()]) == [True, False]


def test_a_round_that_is_waited_for_anyway_carries_others_along() -> None:
    made = Planner()
    for nbytes in (1000, 9000):
        made.read["store"].observe(nbytes, 0.1 + nbytes * 1e-6)  # 100 ms for any round
    for tokens in (10, 20):
        made.encode.observe(tokens, tokens * 1e-3)
    assert made.choose([candidate(tokens=50)]) == [False]
    assert made.choose([candidate(tokens=50)] * 4) == [True] * 4  # 104 ms against 200
    assert made.choose([candidate(tokens=50), candidate(computable=False)]) == [True, True]


DOCUMENTS = st.lists(
    st.builds(
        Candidate, st.sampled_from(["disk", "store"]),
        st.integers(1, 1000), st.integers(1, 50), st.booleans(),
    ),
    max_size=5,
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(documents=DOCUMENTS, seed=st.integers(0, 10**6))
def test_no_other_choice_is_expected_to_be_faster(documents: list[Candidate], seed: int) -> None:
    rng = random.Random(seed)
    made = Planner()
    truth = {
        name: (rng.choice([0, rng.random()]), rng.random() / 300) for name in ("disk", "store", "decode", "encode")
    }
    truth["encode"] = (truth["encode"][0], truth["encode"][1] * 20)
    for name, cost in ({**made.read, "decode": made.decode, "encode": made.encode}).items():
        for amount in (100, 300):
            cost.observe(amount, truth[name][0] + truth[name][1] * amount)

    def seconds(loads: tuple[bool, ...]) -> float:
        total = 0.0
        loaded = [d for d, load in zip(documents, loads, strict=True) if load]
        computed = [d for d, load in zip(documents, loads, strict=True) if not load]
        for source in ("disk", "store"):
            if here := [d for d in loaded if d.source == source]:
                total += truth[source][0] + truth[source][1] * sum(d.nbytes for d in here)
        if loaded:
            total += truth["decode"][0] + truth["decode"][1] * sum(d.tokens for d in loaded)
        if computed:
            total += truth["encode"][0] + truth["encode"][1] * sum(d.tokens for d in computed)
        return total

    allowed = [
        loads
        for loads in product([True, False], repeat=len(documents))
        if all(load or d.computable for load, d in zip(loads, documents, strict=True))
    ]
    chosen = tuple(made.choose(documents))
    assert chosen in allowed
    assert seconds(chosen) <= min(map(seconds, allowed)) * (1 + 1e-6) + 1e-9


def test_an_avoided_source_is_tried_now_and_then() -> None:
    clock = Clock()
    made = Planner(probe_every_s=10, clock=clock)
    made.observe_read("store", 100, 1.0)
    due = made.source_probe_due
    assert not due("store")
    clock.now += 10
    assert [due("store"), due("store"), due("disk")] == [True, False, True]
    clock.now += 9
    assert not due("store")


def test_computing_is_tried_now_and_then_where_it_may_be_a_rival() -> None:
    clock = Clock()
    made = Planner(probe_every_s=10, clock=clock)
    for amount in (10, 20):
        made.observe_encode(amount, amount * 1e-3)
        made.observe_read("store", amount * 100, amount * 5e-4)  # half of that
    small, large = candidate(nbytes=1000, tokens=10), candidate(nbytes=2000, tokens=20)
    assert made.choose([large, small]) == [True, True]
    assert made.encode_probe([large, small], [True, True]) is None
    clock.now += 10
    assert made.encode_probe([large, small], [False, False]) is None
    assert made.encode_probe([candidate(nbytes=400, tokens=10)], [True]) is None  # a fifth: no rival
    assert made.encode_probe([candidate(computable=False)], [True]) is None
    assert made.encode_probe([large, small, small], [True, True, True]) == 2
    assert made.encode_probe([large, small], [True, True]) is None


def test_what_is_seen_seldom_counts_for_more() -> None:
    """Computing was slow while something else ran. Three looks, ten seconds apart, and it is believed to be fast."""
    clock = Clock()
    made = Planner(probe_every_s=10, clock=clock)
    for _ in range(10):
        made.observe_encode(100, 10.0)
        clock.now += 0.1
    for expected in (6.0, 3.5, 2.0):
        clock.now += 10
        made.observe_encode(100, 1.0)
        assert made.encode_s(100) < expected


def test_token_ids_are_worth_asking_for_if_the_asking_pays_too() -> None:
    made = planner(store=1e-4, encode=1e-3)  # 100 ms to load, 10 to compute
    by_id, fast = candidate(computable=False), candidate(nbytes=10, computable=False)
    assert made.worth_asking([by_id, candidate(), fast]) == [True, False, False]
    for documents in (1, 2):
        made.ask.observe(documents, documents * 0.08)
    assert made.worth_asking([by_id]) == [True]  # 80 + 10
    for documents in (1, 2) * 10:
        made.ask.observe(documents, documents * 0.1)
    assert made.worth_asking([by_id]) == [False]
    assert Planner().worth_asking([by_id]) == [False]
