"""Memory tiers: the limit holds at every instant, nothing changes under a reader, and what is lent is not evicted."""

from __future__ import annotations

import gc
import mmap
import random
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from store_places import make_cache, same

from kvlink_core.errors import ConfigError
from kvlink_core.store.tiers import memory_tier
from kvlink_core.store.tiers.arena import Arena
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memory import Block, HeapMemory, open_memory
from kvlink_core.store.tiers.memory_tier import MemoryTier
from kvlink_core.types import DocumentCache

PAGE = mmap.PAGESIZE


def key(name: object) -> CacheKey:
    return CacheKey("tenant", "f" * 64, str(name), "raw")


class Watch:
    """Allocates, and knows what of it is still alive; takes its time, and fails now and then."""

    def __init__(self, limit: int, *, seed: int = 0, failing: float = 0.0) -> None:
        self.limit = limit
        self.alive = self.most = 0
        self.exceeded = False
        self._random = random.Random(seed)
        self._failing = failing
        self._lock = threading.RLock()

    def __call__(self, nbytes: int) -> np.ndarray:
        if self._random.random() < self._failing:
            raise MemoryError
        with self._lock:
            self.alive += nbytes
            self.most = max(self.most, self.alive)
            self.exceeded |= self.alive > self.limit
        time.sleep(0)
        array = np.full(nbytes, 0xAA, np.uint8)
        weakref.finalize(array, self._freed, nbytes)
        return array

    def _freed(self, nbytes: int) -> None:
        with self._lock:
            self.alive -= nbytes


class ArenaMemory:
    """What ``PinnedMemory`` does, without a GPU: one piece of memory, with parts of it lent."""

    on_device = False

    def __init__(self, capacity: int) -> None:
        self._heap = HeapMemory(10**9)
        self._whole = np.zeros(capacity, np.uint8)
        self._arena = Arena(capacity)
        self.capacity = self._arena.capacity

    @property
    def nbytes(self) -> int:
        return self.capacity - self._arena.free_bytes

    def counted(self, nbytes: int) -> int:
        return self._arena.rounded(nbytes)

    def take(self, nbytes: int) -> Block | None:
        start = self._arena.take(nbytes)
        return None if start is None else Block(self._arena.rounded(nbytes), start)

    def give(self, block: Block) -> None:
        self._arena.give(block.place)
        self._whole[block.place : block.place + block.nbytes] = 0xEE  # whoever still reads it will notice

    def lend(self, block: Block, ended) -> torch.Tensor:  # type: ignore[no-untyped-def]
        part = Block(block.nbytes, [self._whole[block.place : block.place + block.nbytes]])
        return self._heap.lend(part, ended)

    def close(self) -> None:
        pass


def test_a_cache_comes_back_as_it_was() -> None:
    tier = MemoryTier(HeapMemory(2**20))
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        cache = make_cache(7, 1, dtype)
        assert tier.put(key(dtype), cache)
        assert same(tier.get(key(dtype)), cache)
    assert tier.get(key("other")) is None
    with torch.inference_mode():  # as the encoder makes them
        made = DocumentCache(torch.arange(3), torch.ones(2, 2, 3, 4), torch.rand(2, 3, 2, 4).transpose(1, 2))
    assert tier.put(key("made"), made)
    assert same(tier.get(key("made")), made)


@pytest.mark.parametrize("other", ["namespace", "fingerprint", "token_digest", "codec"])
def test_every_part_of_the_key_counts(other: str) -> None:
    tier = MemoryTier(HeapMemory(2**20))
    tier.put(key("x"), make_cache(3, 1))
    assert key("x")._replace(**{other: "another"}) not in tier
    assert tier.get(key("x")._replace(**{other: "another"})) is None
    assert key("x")._replace(**{other: "another"}).digest != key("x").digest


def test_what_is_lent_stays_and_when_all_is_lent_nothing_is_kept() -> None:
    tier = MemoryTier(HeapMemory(8 * PAGE))  # room for two
    caches = {n: make_cache(30, n) for n in range(4)}  # 2.5 pages: 3, and one for the allocator
    assert tier.put(key(0), caches[0])
    assert tier.put(key(1), caches[1])
    held = [tier.get(key(0)), tier.get(key(1))]
    assert not tier.put(key(2), caches[2])
    assert tier.stats.refused == 1
    assert tier.stats.evictions == 0
    assert same(held[0], caches[0])
    part = held[1].values[0, 0, 5:6]  # type: ignore[union-attr]  # a view of a view is enough to hold it
    held.clear()
    assert tier.put(key(2), caches[2])
    assert key(0) not in tier
    assert key(1) in tier
    assert not tier.put(key(3), make_cache(200, 3))
    del part
    assert tier.put(key(3), caches[3])
    assert tier.stats.documents == 2


@pytest.mark.parametrize("tokens", [1000, 94])  # 94 tokens take less than 8 pages, but not less than 7 and one
def test_one_that_is_larger_than_all_evicts_nothing(tokens: int) -> None:
    tier = MemoryTier(HeapMemory(8 * PAGE))
    tier.put(key(0), make_cache(10, 0))
    assert not tier.put(key(1), make_cache(tokens, 1))
    assert key(0) in tier


@pytest.mark.parametrize("kind", ["heap", "arena"])
@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(st.tuples(st.sampled_from(["put", "get", "drop"]), st.integers(0, 9)), max_size=60),
    sizes=st.lists(st.integers(1, 120), min_size=10, max_size=10),
)
def test_what_readers_hold_is_never_touched(kind: str, steps: list[tuple[str, int]], sizes: list[int]) -> None:
    watch = Watch(10 * PAGE)
    tier = MemoryTier(HeapMemory(watch.limit, watch) if kind == "heap" else ArenaMemory(10 * PAGE))
    caches = [make_cache(size, seed) for seed, size in enumerate(sizes)]
    held: dict[int, DocumentCache] = {}
    for step, n in steps:
        if step == "put":
            tier.put(key(n), caches[n])
        elif step == "get" and (found := tier.get(key(n))) is not None:
            held[n] = found
        elif step == "drop":
            held.pop(n, None)
        found = None
        assert tier.stats.nbytes <= 10 * PAGE
        assert all(same(cache, caches[m]) for m, cache in held.items())
        assert all(key(m) in tier for m in held)
    assert not watch.exceeded


@pytest.mark.parametrize("failing", [0.0, 0.1])
def test_eight_threads_never_exceed_the_limit(failing: float) -> None:
    limit = 40 * PAGE
    watch = Watch(limit, failing=failing)
    tier = MemoryTier(HeapMemory(limit, watch))
    caches = [make_cache(20 + 13 * n, n) for n in range(24)]  # 1 to 12 pages each
    deadline = time.monotonic() + 1.5

    def work(seed: int) -> int:
        choose, held, checked = random.Random(seed), [], 0
        while time.monotonic() < deadline:
            n = int(24 * choose.random() ** 2)
            found = tier.get(key(n))
            if found is None:
                tier.put(key(n), caches[n])
            else:
                held.append((n, found))
            if len(held) > 3:
                m, found = held.pop(0)
                assert same(found, caches[m])
                checked += 1
            found = None
        return checked

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(work, range(8))) > 100
    assert not watch.exceeded
    assert watch.most > limit / 2
    assert tier.stats.evictions > 10
    gc.collect()
    assert tier.put(key("last"), make_cache(200, 99)) or failing


def test_a_failure_while_copying_frees_the_room(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no")

    watch = Watch(10 * PAGE)
    tier = MemoryTier(HeapMemory(10 * PAGE, watch))
    monkeypatch.setattr(memory_tier, "_copy", fail)
    with pytest.raises(RuntimeError):
        tier.put(key(0), make_cache(10, 0))
    monkeypatch.undo()
    gc.collect()
    assert (tier.stats.nbytes, watch.alive) == (0, 0)
    assert tier.put(key(0), make_cache(10, 0))


def test_closing_leaves_what_is_lent_alone() -> None:
    tier = MemoryTier(HeapMemory(2**20))
    tier.put(key(0), make_cache(10, 0))
    held = tier.get(key(0))
    tier.close()
    assert same(held, make_cache(10, 0))
    assert tier.get(key(0)) is None
    assert not tier.put(key(1), make_cache(10, 1))


def test_a_device_tier_wants_a_gpu() -> None:
    with pytest.raises(ConfigError, match="use the host tier alone"):
        open_memory(2**20, torch.device("cpu"), pinned=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
@pytest.mark.parametrize("where", ["device", "pinned"])
def test_memory_of_and_for_a_gpu(where: str) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    before = torch.cuda.memory_allocated()
    capacity = 2**20
    tier = MemoryTier(open_memory(capacity, device if where == "device" else None, pinned=True))
    assert torch.cuda.memory_allocated() - before == (capacity if where == "device" else 0)
    caches = {n: make_cache(100 + n, n, torch.bfloat16) for n in range(60)}
    held = {}
    for n, cache in caches.items():
        on_gpu = DocumentCache(cache.token_ids, cache.keys.to(device), cache.values.to(device))
        assert tier.put(key(n), on_gpu if n % 2 else cache)
        if n % 10 == 0:
            held[n] = tier.get(key(n))
    assert tier.stats.evictions > 10
    assert tier.stats.nbytes <= capacity
    for n, found in held.items():
        assert found is not None
        assert found.keys.device.type == ("cuda" if where == "device" else "cpu")
        assert found.keys.is_pinned() == (where == "pinned")
        assert found.token_ids.device.type == "cpu"
        assert same(DocumentCache(found.token_ids, found.keys.cpu(), found.values.cpu()), caches[n])
    tier.close()
    assert same(DocumentCache(found.token_ids, found.keys.cpu(), found.values.cpu()), caches[n])
