"""Which replica gets a request: the mathematics, and the router on replicas that are only named. No Ray started."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from serve.router import DocumentRouter, documents_of, rank_by_documents, within_bound
from serve.wire import EngineRequest, NewDocument, WireDocument, WireMessage, WireSampling

REPLICAS = ["r0", "r1", "r2", "r3"]
SAMPLING = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=4, stop=())


def test_the_same_set_goes_to_the_same_replica_in_whatever_order() -> None:
    names = [f"doc{n}" for n in range(10)]
    expected = rank_by_documents(names, REPLICAS)
    for _ in range(5):
        random.shuffle(names)
        assert rank_by_documents(names, random.sample(REPLICAS, 4)) == expected
    assert sorted(expected) == REPLICAS


def test_documents_spread_evenly_and_only_those_of_a_lost_replica_move() -> None:
    homes = {f"doc{n}": rank_by_documents([f"doc{n}"], REPLICAS)[0] for n in range(2000)}
    counts = Counter(homes.values())
    assert all(400 < counts[r] < 600 for r in REPLICAS)
    left = REPLICAS[:-1]
    moved = {n for n, home in homes.items() if rank_by_documents([n], left)[0] != home}
    assert moved == {n for n, home in homes.items() if home == "r3"}


def test_the_replica_that_is_home_to_most_wins() -> None:
    home = {f"doc{n}": rank_by_documents([f"doc{n}"], REPLICAS)[0] for n in range(200)}
    of = {r: [n for n, h in home.items() if h == r] for r in REPLICAS}
    assert rank_by_documents([*of["r2"][:3], *of["r1"][:2], of["r0"][0]], REPLICAS)[:2] == ["r2", "r1"]


def test_sets_that_come_again_find_their_documents() -> None:
    """Caches that are still held where they are asked for again, against sending requests anywhere."""
    random.seed(0)
    documents = [f"doc{n}" for n in range(400)]
    sets = [random.sample(documents, 5) for _ in range(200)]
    asked = random.choices(sets, [1 / (n + 1) for n in range(200)], k=3000)

    def hits(choose: Callable[[list[str]], str]) -> float:
        held: dict[str, list[str]] = {r: [] for r in REPLICAS}
        hit = 0
        for wanted in asked:
            replica = choose(wanted)
            hit += sum(name in held[replica] for name in wanted)
            held[replica] = [*(d for d in held[replica] if d not in wanted), *wanted][-100:]  # a quarter of all
        return hit / (5 * len(asked))

    assert hits(lambda wanted: rank_by_documents(wanted, REPLICAS)[0]) > 0.8
    assert hits(lambda wanted: random.choice(REPLICAS)) < 0.7


@pytest.mark.parametrize(
    ("queues", "fits"),
    [
        ({"r0": 0, "r1": 0}, True),
        ({"r0": 1, "r1": 0}, True),  # the mean would be 1, and 1.25 is rounded up
        ({"r0": 2, "r1": 0}, False),
        ({"r0": 3, "r1": 3}, True),
        ({"r0": 6, "r1": 2}, False),
        ({"r0": 4, "r1": 4, "r2": 4, "r3": 4}, True),
        ({"r0": 8, "r1": 4, "r2": 4, "r3": 4}, False),
    ],
)
def test_the_load_bound(queues: dict[str, int], fits: bool) -> None:
    assert within_bound(queues, "r0", load_factor=1.25) is fits


def request(*ids: str, namespace: str = "default") -> EngineRequest:
    documents = tuple(WireDocument(i) for i in ids)
    return EngineRequest("r", (WireMessage("user", "q"),), documents, None, SAMPLING, True, namespace=namespace)


def pending(*args: Any, **kwargs: Any) -> Any:
    return SimpleNamespace(args=args, kwargs=kwargs, routing_context=SimpleNamespace(should_backoff=False))


def test_documents_of_a_call() -> None:
    assert documents_of(pending(request("a", "b"))) == ("default\0a", "default\0b")
    assert documents_of(pending(request=request("a"))) == ("default\0a",)
    assert documents_of(pending(request("a", namespace="acme"))) == ("acme\0a",)
    assert documents_of(pending("acme", (NewDocument("a", "x"),))) == ("acme\0a",)
    assert documents_of(pending("acme", ("a", "b"))) == ("acme\0a", "acme\0b")
    assert documents_of(pending()) == documents_of(None) == ()
    turns = (WireMessage("user", "q", (WireDocument("m"), WireDocument(None, "text"))),)
    asked = EngineRequest("r", turns, (WireDocument("a"),), None, SAMPLING, True)
    assert documents_of(pending(asked)) == ("default\0m", "default\0None\0text", "default\0a")


class Router(DocumentRouter):
    """The policy alone."""

    def __init__(self, queues: dict[str, int | None]) -> None:
        self._replica_queue_len_cache = queues
        self.initialize_state(load_factor=1.25)

    @property
    def replica_queue_len_cache(self) -> Any:
        return self._replica_queue_len_cache


def choose(queues: dict[str, int | None], *args: Any) -> list[list[str]]:
    replicas: Any = [SimpleNamespace(replica_id=ReplicaName(name)) for name in queues]
    router = Router({ReplicaName(n): q for n, q in queues.items()})  # type: ignore[misc]
    ranks = asyncio.run(router.choose_replicas(replicas, pending(*args)))
    return [[r.replica_id.unique_id for r in rank] for rank in ranks]


class ReplicaName(str):
    __slots__ = ()

    @property
    def unique_id(self) -> str:
        return str(self)


def test_the_favourite_first_then_two_drawn() -> None:
    favourite = rank_by_documents(["default\0a"], REPLICAS)[0]
    idle: dict[str, int | None] = dict.fromkeys(REPLICAS, 0)
    ranks = choose(idle, request("a"))
    assert ranks[0] == [favourite]
    assert len(ranks[1]) == 2
    assert choose(dict.fromkeys(REPLICAS), request("a"))[0] == [favourite]  # nothing known of queues


def test_a_favourite_with_too_much_to_do_is_passed_over() -> None:
    favourite = rank_by_documents(["default\0a"], REPLICAS)[0]
    ranks = choose({r: 9 if r == favourite else 1 for r in REPLICAS}, request("a"))
    assert len(ranks) == 1
    assert len(ranks[0]) == 2


def test_calls_without_documents_go_by_power_of_two() -> None:
    seen = {name for _ in range(50) for rank in choose(dict.fromkeys(REPLICAS, 0)) for name in rank}
    assert seen == set(REPLICAS)
    assert choose({}, request("a")) == []
