"""All tiers together: never more than there is room for, and nothing changes under a reader."""

from __future__ import annotations

import random
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from store_places import make_cache, same
from tier_scene import CACHES, Scene, on_disk, soon

from kvlink_core.store.tiers import CacheKey, Wanted
from kvlink_core.types import DocumentCache


def test_a_scan_leaves_what_is_asked_for_again(scene: Scene) -> None:
    """40 documents that are asked for again and again, then 400 that are asked for once."""
    tiers = scene.tiers(
        alone=True, host_bytes=60 * 4 * 4096
    )  # a document of 20 tokens takes 3 pages and one for the allocator
    keys = [CacheKey("default", "f", str(n), "raw") for n in range(440)]

    def ask(key: CacheKey) -> bool:
        found = tiers.fetch([Wanted(key, None, 20, True)])[key].cache
        if found is None:
            tiers.compute({key: [1]}, lambda _: [make_cache(20, int(key.token_digest))])
        return found is not None

    for key in keys[:40] * 3:
        ask(key)
    for key in keys[40:]:
        assert not ask(key)
    assert sum(map(ask, keys[:40])) >= 38


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["fetch", "hold", "drop", "compute", "prefetch"]),
            st.sets(st.integers(0, 7), min_size=1, max_size=4),
        ),
        max_size=25,
    ),
    host=st.integers(1, 40),
    disk=st.integers(20, 120),
)
def test_no_sequence_of_requests_exceeds_a_size(
    scene: Scene, tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, set[int]]], host: int, disk: int
) -> None:
    directory = tmp_path_factory.mktemp("near")
    tiers = scene.tiers(host_bytes=host * 4096, disk_bytes=disk * 4096, disk_path=directory)
    held: dict[int, DocumentCache] = {}
    for step, numbers in steps:
        names = [f"d{n}" for n in sorted(numbers)]
        if step in ("fetch", "hold"):
            found = tiers.fetch(scene.wanted(*names))
            assert all(same(found[scene.key(n)].cache, CACHES[n]) for n in names)
            if step == "hold":
                held |= {n: found[scene.key(f"d{n}")].cache for n in numbers}  # type: ignore[misc]
            del found
        elif step == "drop":
            held = {n: cache for n, cache in held.items() if n not in numbers}
        elif step == "compute":
            tiers.compute({scene.key(f"d{n}"): [n] for n in numbers}, lambda asked: [CACHES[f"d{n}"] for (n,) in asked])
        else:
            tiers.prefetch(scene.wanted(*names))
        stats = tiers.stats.tiers
        assert stats["host"].nbytes <= host * 4096
        assert stats["disk"].nbytes <= disk * 4096
        assert on_disk(directory) <= disk * 4096
        assert all(same(cache, CACHES[f"d{n}"]) for n, cache in held.items())
    tiers.close()
    assert on_disk(directory) <= disk * 4096


def test_neither_do_eight_threads(scene: Scene, tmp_path: Path) -> None:
    directory, host, disk = tmp_path / "near", 250_000, 260_000
    tiers = scene.tiers(host_bytes=host, disk_bytes=disk, disk_path=directory, threads=4)
    over, ended = [], threading.Event()

    def watch() -> None:
        while not ended.is_set():
            stats = tiers.stats.tiers
            if stats["host"].nbytes > host or stats["disk"].nbytes > disk or on_disk(directory) > disk:
                over.append(stats)
            time.sleep(0.001)

    def work(seed: int) -> int:
        choose, held, checked = random.Random(seed), [], 0
        for _ in range(60):
            names = choose.sample(list(CACHES), choose.randint(1, 3))
            if choose.random() < 0.2:
                tiers.prefetch(scene.wanted(*names))
            found = tiers.fetch(scene.wanted(*names))
            held += [(n, found[scene.key(n)].cache) for n in names]
            while len(held) > 4:
                name, cache = held.pop(0)
                assert same(cache, CACHES[name])
                checked += 1
        return checked

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        with ThreadPoolExecutor(8) as pool:
            assert sum(pool.map(work, range(8))) > 500
    finally:
        ended.set()
        watcher.join()
    assert over == []
    assert tiers.stats.tiers["host"].evictions > 2
    assert tiers.stats.tiers["disk"].evictions > 2


def test_a_document_is_not_evicted_under_its_reader(scene: Scene) -> None:
    """Its bytes stay as they are while it is held, though everything else has to find a place beside it."""
    tiers = scene.tiers(host_bytes=90_000)  # d0 takes a quarter of it
    tiers.fetch(scene.wanted("d0"))
    soon(lambda: tiers.stats.tiers["host"].documents == 1)
    held = tiers.fetch(scene.wanted("d0"))[scene.key("d0")]
    assert held.tier == "host"
    for _ in range(3):
        for name in ("d1", "d2", "d3", "d4"):
            tiers.fetch(scene.wanted(name))
    soon(lambda: tiers.stats.tiers["host"].evictions > 3)
    assert same(held.cache, CACHES["d0"])
    reads = len(scene.store.reads)
    assert tiers.fetch(scene.wanted("d0"))[scene.key("d0")].tier == "host"
    assert len(scene.store.reads) == reads
    tiers.close()
    assert same(held.cache, CACHES["d0"])
