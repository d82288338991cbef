"""A store that is slow, fails or hangs: no request pays for it more than computing would have cost, and it recovers."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from store_places import make_cache, same
from tier_scene import CACHES, Scene, kept, soon

from kvlink_core.errors import PayloadMissingError, StoreUnavailableError
from kvlink_core.store.tiers import TieredCache
from kvlink_core.types import DocumentCache

NAMES = list(CACHES)


def knowing(tiers: TieredCache, *, token_s: float) -> TieredCache:
    """It has seen that computing a token takes so long."""
    for tokens in (32, 128):
        tiers.planner.observe_encode(tokens, tokens * token_s)
    return tiers


# Failing


def test_a_store_that_fails_is_left_alone_then_tried_and_asked_again(scene: Scene) -> None:
    tiers = scene.tiers(failures=3, retry_after_s=0.2, host_bytes=0)
    scene.store.failing = True
    for attempt in range(1, 6):
        found = tiers.fetch(scene.wanted("d0"))[scene.key("d0")]
        assert found.unavailable is not None
        assert tiers.stats.circuit == ("closed" if attempt < 3 else "open")
    assert "left alone" in str(found.unavailable)
    assert len(scene.store.reads) == 3
    assert (tiers.stats.failures, tiers.stats.circuit_opened) == (3, 1)
    time.sleep(0.25)
    assert tiers.stats.circuit == "half-open"
    tiers.fetch(scene.wanted("d0"))  # the trial, which nobody waits for who can do without
    soon(lambda: tiers.stats.circuit_opened == 2)
    scene.store.failing = False
    soon(lambda: tiers.fetch(scene.wanted("d1"))[scene.key("d1")].cache is not None)
    assert tiers.stats.circuit == "closed"
    assert tiers.fetch(scene.wanted("d0"))[scene.key("d0")].tier == "store"


def test_disk_and_memory_go_on_without_the_store(scene: Scene, tmp_path: Path) -> None:
    tiers = scene.tiers(host_bytes=60_000, disk_bytes=2**20, disk_path=tmp_path / "near", failures=1, retry_after_s=60)
    tiers.fetch(scene.wanted(*NAMES))
    kept(tiers)
    assert tiers.stats.tiers["disk"].documents == 8
    scene.store.failing = True
    with pytest.raises(StoreUnavailableError):
        tiers.ask(scene.store.refresh)
    found = tiers.fetch(scene.wanted(*NAMES, computable=False))
    assert all(same(found[scene.key(n)].cache, CACHES[n]) for n in NAMES)
    assert {found[scene.key(n)].tier for n in NAMES} == {"host", "disk"}


def test_a_damaged_copy_while_the_store_is_away_says_so(scene: Scene, tmp_path: Path) -> None:
    tiers = scene.tiers(host_bytes=0, disk_bytes=2**20, disk_path=tmp_path / "near", failures=1, retry_after_s=60)
    tiers.fetch(scene.wanted("d0"))
    kept(tiers)
    assert tiers.stats.tiers["disk"].documents == 1
    (copy,) = (tmp_path / "near").rglob("*.parquet")
    copy.unlink()
    scene.store.failing = True
    for said in ("the wire is cut", "left alone"):
        found = tiers.fetch(scene.wanted("d0", "d1"))
        assert said in str(found[scene.key("d0")].unavailable) + str(found[scene.key("d1")].unavailable)
        assert found[scene.key("d0")].cache is None


# Hanging


def test_a_store_that_hangs_costs_a_time_out_then_nothing_and_recovers(scene: Scene, tmp_path: Path) -> None:
    tiers = scene.tiers(
        timeout_s=0.3, failures=2, retry_after_s=0.5, threads=1, disk_bytes=2**20, disk_path=tmp_path / "near",
        host_bytes=0,
    )  # fmt: skip
    tiers.fetch(scene.wanted("d7"))
    kept(tiers)
    assert tiers.stats.tiers["disk"].documents == 1
    scene.store.gate.clear()
    took = []
    for name in ("d0", "d1", "d2", "d3", "d4"):
        started = time.monotonic()
        assert tiers.fetch(scene.wanted(name))[scene.key(name)].unavailable is not None
        took.append(time.monotonic() - started)
    assert max(took) < 5
    assert tiers.stats.circuit_opened > 0
    assert min(took) < 0.3  # not asked at all
    # The disk has threads of its own.
    assert tiers.fetch(scene.wanted("d7"))[scene.key("d7")].tier == "disk"
    # It goes on hanging for those that hang, and answers the others: they find a thread all the same.
    hanging, scene.store.gate = scene.store.gate, threading.Event()
    scene.store.gate.set()
    soon(lambda: tiers.fetch(scene.wanted("d6"))[scene.key("d6")].cache is not None)
    assert tiers.stats.circuit == "closed"
    hanging.set()


def test_a_request_by_id_waits_as_long_as_the_time_out_says_in_all(scene: Scene) -> None:
    tiers = scene.tiers(timeout_s=1.0)
    scene.store.gate.clear()
    started = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(tiers.fetch, scene.wanted("d0", computable=False))
        time.sleep(0.7)
        second = pool.submit(tiers.fetch, scene.wanted("d0", computable=False))
        assert first.result()[scene.key("d0")].unavailable is not None
        assert second.result()[scene.key("d0")].unavailable is not None
    assert time.monotonic() - started < 1.6  # not another second for the one that came later


def test_other_questions_go_through_the_same_circuit(scene: Scene) -> None:
    tiers = scene.tiers(timeout_s=1.0, failures=2, retry_after_s=60)
    assert tiers.ask(lambda: 7) == 7
    with pytest.raises(PayloadMissingError):  # an answer
        tiers.ask(raising(PayloadMissingError("gone")))
    scene.store.gate.clear()
    for _ in range(2):
        started = time.monotonic()
        with pytest.raises(StoreUnavailableError, match="not answered within"):
            tiers.ask(scene.store.refresh, wait_s=0.05)
        assert time.monotonic() - started < 0.9
    time.sleep(1.0)
    with pytest.raises(StoreUnavailableError, match="left alone"):
        tiers.ask(scene.store.refresh)


def raising(error: Exception):  # type: ignore[no-untyped-def]
    def question() -> None:
        raise error

    return question


# Slow


def test_it_is_waited_for_as_long_as_computing_takes_and_then_computed(scene: Scene) -> None:
    tiers = knowing(scene.tiers(recompute="auto", timeout_s=20), token_s=0.4 / 40)  # d0 takes 0.4 s
    scene.store.gate.clear()
    started = time.monotonic()
    found = tiers.fetch(scene.wanted("d0"))[scene.key("d0")]
    assert found.unavailable is not None
    assert 0.39 < time.monotonic() - started < 5
    assert tiers.stats.late == 1
    started = time.monotonic()
    assert tiers.fetch(scene.wanted("d0"))[scene.key("d0")].cache is None  # it is known to be slow by now
    assert time.monotonic() - started < 0.39
    scene.store.gate.set()
    soon(lambda: tiers.fetch(scene.wanted("d0"))[scene.key("d0")].tier == "host")  # what came late is kept


def test_a_slow_source_is_avoided_probed_beside_and_used_again(scene: Scene) -> None:
    tiers = knowing(scene.tiers(recompute="auto", host_bytes=0, probe_every_s=0.1), token_s=1e-3)
    scene.store.latency_s = 1.0
    tiers.fetch(scene.wanted("d0"))  # unknown, so it is tried: too slow
    soon(lambda: tiers.stats.read["store"].documents == 1)
    started = time.monotonic()
    assert all(f.cache is None and f.unavailable is None for f in tiers.fetch(scene.wanted("d1", "d2")).values())
    assert time.monotonic() - started < 0.9
    assert tiers.stats.computed == 2
    scene.store.latency_s = 0.0
    soon(lambda: tiers.fetch(scene.wanted("d3"))[scene.key("d3")].tier == "store")
    assert len(scene.store.reads) < 10  # one each tenth of a second


def test_what_cannot_be_computed_is_loaded_however_slow(scene: Scene) -> None:
    tiers = knowing(scene.tiers(recompute="auto", host_bytes=0), token_s=1e-6)
    scene.store.latency_s = 0.1
    for _ in range(2):
        found = tiers.fetch([*scene.wanted("d0", computable=False), *scene.wanted("d1")])
        assert found[scene.key("d0")].tier == "store"


def test_a_slow_computer_is_tried_again_too(scene: Scene) -> None:
    """It was slow once, while something else ran; and a store half as fast would be used for ever."""
    tiers = knowing(scene.tiers(recompute="auto", host_bytes=0, probe_every_s=0.1), token_s=2e-3)
    scene.store.latency_s = 0.05

    def encode(documents: list[Sequence[int]]) -> list[DocumentCache]:
        return [make_cache(40, 0) for _ in documents]  # at once

    def ask() -> bool:
        found = tiers.fetch(scene.wanted("d0"))[scene.key("d0")].cache
        if found is None:
            tiers.compute({scene.key("d0"): [1]}, encode)
        return found is None

    assert not ask()
    soon(ask)
    soon(lambda: all(ask() for _ in range(20)))


def test_token_ids_are_asked_for_where_computing_is_worth_that(scene: Scene) -> None:
    tiers = knowing(scene.tiers(recompute="auto", host_bytes=0), token_s=1e-4)
    rows = scene.rows
    wanted = scene.wanted("d0", "d1", computable=False)
    assert tiers.token_ids(wanted, scene.store.token_ids) == {}  # nothing is known of the store
    for nbytes in (10_000, 40_000):
        tiers.planner.observe_read("store", nbytes, nbytes * 1e-5)  # 100 KB/s
    found = tiers.token_ids(wanted, scene.store.token_ids)
    assert found == {scene.key(n): CACHES[n].token_ids.tolist() for n in ("d0", "d1")}
    scene.store.failing = True
    assert tiers.token_ids(wanted, scene.store.token_ids) == {}
    assert tiers.stats.failures == 1
    for documents in (2, 1, 2, 1, 2, 1):
        tiers.planner.ask.observe(documents, 60.0)  # and asking takes longer than loading
    scene.store.failing = False
    asked = len(scene.store.asked)
    assert tiers.token_ids(wanted, scene.store.token_ids) == {}
    assert len(scene.store.asked) == asked
    assert rows["d0"].tokens == 40
