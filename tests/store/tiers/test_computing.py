"""Computing: each document once for all who want it, nobody waits for ever, and failures stay where they belong."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from store_places import make_cache, same

from kvlink_core.store.tiers.computing import Computing
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.types import DocumentCache


def key(name: str) -> CacheKey:
    return CacheKey("default", "f", name, "raw")


class Encoder:
    """A document's only token id is the seed of its cache; 13 is a document that cannot be computed."""

    def __init__(self) -> None:
        self.computed: list[int] = []
        self.open = threading.Event()
        self.open.set()
        self._lock = threading.Lock()

    def __call__(self, documents: list[Sequence[int]]) -> list[DocumentCache]:
        with self._lock:
            self.computed += [ids[0] for ids in documents]
        assert self.open.wait(30)
        if any(ids[0] == 13 for ids in documents):
            raise ValueError("thirteen")
        return [make_cache(5, ids[0]) for ids in documents]


def computing(host_bytes: int = 2**20) -> Computing:
    return Computing(Memories(0, host_bytes, torch.device("cpu")), lambda tokens, seconds: None)


@pytest.mark.parametrize("host_bytes", [2**20, 0])
def test_a_hundred_threads_compute_a_document_once(host_bytes: int) -> None:
    made, encode = computing(host_bytes), Encoder()
    encode.open.clear()
    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(made.compute, {key("x"): [3]}, encode) for _ in range(100)]
        while not encode.computed:
            time.sleep(0.001)
        time.sleep(0.1)
        encode.open.set()
        assert all(same(a.result(10)[key("x")], make_cache(5, 3)) for a in answers)
    if host_bytes:
        assert encode.computed == [3]
    else:  # one that came only after the first had ended has nowhere to find it
        assert len(encode.computed) < 100


def test_two_that_want_the_same_in_another_order_do_not_wait_for_each_other() -> None:
    made, encode = computing(), Encoder()
    encode.open.clear()
    with ThreadPoolExecutor(3) as pool:
        pairs = [("a", "b"), ("b", "a"), ("b", "c")]
        answers = [
            pool.submit(made.compute, {key(n): [ord(n)] for n in pair}, encode)
            for pair in pairs
            if not time.sleep(0.01)
        ]
        encode.open.set()
        for pair, answer in zip(pairs, answers, strict=True):
            assert all(same(answer.result(10)[key(n)], make_cache(5, ord(n))) for n in pair)
    assert sorted(encode.computed) == [ord(n) for n in "abc"]


def test_a_failure_is_of_the_call_that_has_the_document() -> None:
    made, encode = computing(), Encoder()
    encode.open.clear()
    with ThreadPoolExecutor(2) as pool:
        bad = pool.submit(made.compute, {key("x"): [3], key("bad"): [13]}, encode)
        while len(encode.computed) < 2:
            time.sleep(0.001)
        good = pool.submit(made.compute, {key("x"): [3]}, encode)
        time.sleep(0.02)
        encode.open.set()
        with pytest.raises(ValueError, match="thirteen"):
            bad.result(10)
        assert same(good.result(10)[key("x")], make_cache(5, 3))
    with pytest.raises(ValueError, match="thirteen"):
        made.compute({key("bad"): [13]}, encode)


def test_what_it_took_is_told() -> None:
    told: list[tuple[int, float]] = []
    made = Computing(Memories(0, 2**20, torch.device("cpu")), lambda *seen: told.append(seen))
    made.compute({key("a"): [1], key("b"): [2]}, Encoder())
    assert [tokens for tokens, _ in told] == [10]
    assert told[0][1] > 0
    made.compute({key("a"): [1]}, Encoder())  # kept
    assert len(told) == 1
