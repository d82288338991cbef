"""All tiers together: what is found where, read once for all, ahead of time, and what is left in the end."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from store_places import same
from tier_scene import CACHES, Scene, kept, reading_threads, soon

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import ConfigError, PayloadCorruptError, PayloadError, PayloadForeignError
from kvlink_core.store.tiers import CacheKey, Found, TieredCache, Wanted
from kvlink_core.types import DocumentCache

# Found where


def test_each_tier_in_turn(scene: Scene, tmp_path: Path) -> None:
    tiers = scene.tiers(disk_bytes=2**20, disk_path=tmp_path / "near")
    (key,) = [w.key for w in scene.wanted("d3")]
    found = tiers.fetch(scene.wanted("d3"))[key]
    assert found.tier == "store"
    assert same(found.cache, CACHES["d3"])
    kept(tiers)
    assert {name: tier.documents for name, tier in tiers.stats.tiers.items()} == {"host": 1, "disk": 1}
    found = tiers.fetch(scene.wanted("d3"))[key]
    assert found.tier == "host"
    assert same(found.cache, CACHES["d3"])
    tiers.close()
    again = scene.tiers(disk_bytes=2**20, disk_path=tmp_path / "near")  # as after a restart
    scene.store.failing = True
    found = again.fetch(scene.wanted("d3"))[key]
    assert found.tier == "disk"
    assert same(found.cache, CACHES["d3"])
    soon(lambda: again.fetch(scene.wanted("d3"))[key].tier == "host")
    assert scene.store.reads == [["d3"]]
    assert again.stats.read["disk"].documents == 1
    assert again.stats.read["disk"].nbytes == scene.rows["d3"].nbytes


@pytest.mark.parametrize("scene", ["int8", "lossless"], indirect=True)
def test_codecs_are_decoded_once_and_not_again_from_memory(scene: Scene) -> None:
    tiers = scene.tiers()
    (expected,) = scene.store.load([scene.rows["d1"]])
    found = tiers.fetch(scene.wanted("d1"))[scene.key("d1")]
    assert same(found.cache, expected)  # type: ignore[arg-type]
    soon(lambda: tiers.stats.tiers["host"].documents == 1)
    assert same(tiers.fetch(scene.wanted("d1"))[scene.key("d1")].cache, expected)  # type: ignore[arg-type]


def test_a_damaged_copy_on_disk_is_read_from_the_store(scene: Scene, tmp_path: Path) -> None:
    tiers = scene.tiers(host_bytes=0, disk_bytes=2**20, disk_path=tmp_path / "near")
    tiers.fetch(scene.wanted("d0", "d1"))
    kept(tiers)
    assert tiers.stats.tiers["disk"].documents == 2
    for path in (tmp_path / "near").rglob("*.parquet"):
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.unlink()
        path.write_bytes(content)
    found = tiers.fetch(scene.wanted("d0", "d1"))
    assert [found[scene.key(n)].tier for n in ("d0", "d1")] == ["store", "store"]
    assert all(same(found[scene.key(n)].cache, CACHES[n]) for n in ("d0", "d1"))
    kept(tiers)
    assert tiers.stats.tiers["disk"].documents == 2
    assert tiers.fetch(scene.wanted("d1"))[scene.key("d1")].tier == "disk"


def test_without_a_store_only_what_was_computed_is_kept(scene: Scene) -> None:
    tiers = scene.tiers(alone=True)
    key = CacheKey("default", "f", "digest", "raw")
    wanted = [Wanted(key, None, 40, True)]
    assert tiers.fetch(wanted) == {key: Found()}
    tiers.compute({key: [1, 2]}, lambda _: [CACHES["d0"]])
    found = tiers.fetch(wanted)[key]
    assert found.tier == "host"
    assert same(found.cache, CACHES["d0"])
    assert tiers.stats.read == {}


def test_what_was_computed_is_found_whatever_codec_is_stored(scene: Scene) -> None:
    tiers = scene.tiers()
    key = scene.key("d0")._replace(codec="int4")
    tiers.compute({key: [1]}, lambda _: [CACHES["d0"]])
    row = replace(scene.rows["d0"], codec="int4")
    assert tiers.fetch([Wanted(key, row, 40, True)])[key].tier == "host"
    assert scene.store.reads == []


# Read once


@pytest.mark.parametrize("host_bytes", [2**20, 0])
def test_a_hundred_requests_for_a_cold_document_read_it_once(scene: Scene, host_bytes: int) -> None:
    tiers = scene.tiers(host_bytes=host_bytes)
    scene.store.gate.clear()
    start = threading.Barrier(101)

    def ask() -> Found:
        start.wait()
        return tiers.fetch(scene.wanted("d2"))[scene.key("d2")]

    with ThreadPoolExecutor(100) as pool:
        answers = [pool.submit(ask) for _ in range(100)]
        start.wait()
        soon(lambda: scene.store.reads)
        time.sleep(0.05)
        scene.store.gate.set()
        found = [answer.result(10) for answer in answers]
    assert scene.store.reads == [["d2"]]
    assert all(f.tier in ("store", "host") and same(f.cache, CACHES["d2"]) for f in found)


def test_requests_that_overlap_share_what_they_share(scene: Scene) -> None:
    tiers = scene.tiers()
    scene.store.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(tiers.fetch, scene.wanted("d0", "d1"))
        soon(lambda: len(scene.store.reads) == 1)
        second = pool.submit(tiers.fetch, scene.wanted("d1", "d2"))
        soon(lambda: len(scene.store.reads) == 2)
        scene.store.gate.set()
        assert same(first.result(10)[scene.key("d1")].cache, CACHES["d1"])
        assert same(second.result(10)[scene.key("d1")].cache, CACHES["d1"])
    assert scene.store.reads == [["d0", "d1"], ["d2"]]


def test_a_failure_is_shared_and_does_not_stick(scene: Scene) -> None:
    tiers = scene.tiers()
    scene.store.gate.clear()
    scene.store.failing = True
    with ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(tiers.fetch, scene.wanted("d0")) for _ in range(8)]
        soon(lambda: scene.store.reads)
        time.sleep(0.02)
        scene.store.gate.set()
        assert all(answer.result(10)[scene.key("d0")].unavailable is not None for answer in answers)
    assert len(scene.store.reads) <= 2
    scene.store.failing = False
    assert tiers.fetch(scene.wanted("d0"))[scene.key("d0")].tier == "store"


def test_what_must_not_be_served_is_refused_and_not_kept(scene: Scene) -> None:
    def misfit(cache: DocumentCache) -> PayloadError | None:
        return PayloadForeignError("of another model") if cache.tokens == CACHES["d1"].tokens else None

    tiers = scene.tiers(accept=misfit)
    damaged = PayloadCorruptError("flipped")
    scene.store.spoil = lambda d: damaged if isinstance(d, EncodedDocument) and d.shape.tokens == 40 else d
    for _ in range(2):
        found = tiers.fetch(scene.wanted("d0", "d1", "d2"))
        assert found[scene.key("d0")].refused is damaged
        assert isinstance(found[scene.key("d1")].refused, PayloadForeignError)
        assert same(found[scene.key("d2")].cache, CACHES["d2"])
    assert tiers.stats.failures == 0  # the store did answer


def test_a_fault_of_our_own_is_no_reason_to_hang(scene: Scene, caplog: pytest.LogCaptureFixture) -> None:
    tiers = scene.tiers()
    scene.store.spoil = lambda _: 1 / 0  # type: ignore[return-value]
    found = tiers.fetch(scene.wanted("d0"))[scene.key("d0")]
    assert "ZeroDivisionError" in str(found.unavailable)
    assert "Traceback" in caplog.text
    scene.store.spoil = lambda document: document
    assert tiers.fetch(scene.wanted("d0"))[scene.key("d0")].tier == "store"


# Ahead of time


def test_prefetching_does_not_wait_and_what_it_brought_is_in_memory(scene: Scene) -> None:
    tiers = scene.tiers(threads=2)
    scene.store.gate.clear()
    started = time.monotonic()
    tiers.prefetch(scene.wanted("d0", "d1"))
    tiers.prefetch(scene.wanted("d2"))  # one too many: half of the threads are left to those who wait
    assert time.monotonic() - started < 5
    soon(lambda: scene.store.reads)
    scene.store.gate.set()
    soon(lambda: tiers.stats.tiers["host"].documents == 2)
    found = tiers.fetch(scene.wanted("d0", "d1"))
    assert {f.tier for f in found.values()} == {"host"}
    assert scene.store.reads == [["d0", "d1"]]
    scene.store.failing = True
    tiers.prefetch(scene.wanted("d3"))
    soon(lambda: tiers.stats.failures == 1)
    scene.store.failing = False
    soon(
        lambda: tiers.prefetch(scene.wanted("d4")) or len(scene.store.reads) == 3
    )  # its turn is over, though it failed
    soon(lambda: tiers.stats.tiers["host"].documents == 3)


def test_a_request_joins_what_is_being_prefetched(scene: Scene) -> None:
    tiers = scene.tiers()
    scene.store.gate.clear()
    tiers.prefetch(scene.wanted("d0"))
    soon(lambda: scene.store.reads)
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(tiers.fetch, scene.wanted("d0"))
        time.sleep(0.02)
        assert not answer.done()
        scene.store.gate.set()
        assert same(answer.result(10)[scene.key("d0")].cache, CACHES["d0"])
    assert scene.store.reads == [["d0"]]


# The end


def test_closing_ends_the_threads_and_lets_everybody_go(scene: Scene) -> None:
    before = reading_threads()
    tiers = scene.tiers(threads=1)
    scene.store.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(tiers.fetch, scene.wanted("d0"))
        soon(lambda: scene.store.reads)
        waiting = pool.submit(tiers.fetch, scene.wanted("d1"))
        closing = threading.Timer(0.1, scene.store.gate.set)
        closing.start()
        tiers.close()
        found = reading.result(10)[scene.key("d0")]
        assert found.cache is not None or found.unavailable is not None
        assert waiting.result(10)[scene.key("d1")].unavailable is not None
        closing.join()
    soon(lambda: reading_threads() == before)
    assert tiers.fetch(scene.wanted("d2"))[scene.key("d2")].unavailable is not None
    tiers.close()  # twice is once


def test_closing_does_not_wait_for_a_store_that_hangs(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvlink_core.store.tiers.cache._CLOSING_S", 0.1)
    tiers = scene.tiers()
    scene.store.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(tiers.fetch, scene.wanted("d0"))
        soon(lambda: scene.store.reads)
        started = time.monotonic()
        tiers.close()
        assert time.monotonic() - started < 5
        assert reading.result(10)[scene.key("d0")].unavailable is not None
        scene.store.gate.set()


def test_tiers_that_cannot_be_had_leave_nothing_behind(scene: Scene, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    before = reading_threads()
    with pytest.raises(ConfigError, match="disk tier cannot use"):
        scene.tiers(disk_bytes=2**20, disk_path=tmp_path / "file")
    with pytest.raises(ConfigError, match="needs a CUDA GPU"):
        scene.tiers(device_bytes=2**20)
    assert reading_threads() == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")
def test_on_a_gpu_host_memory_is_pinned_and_what_is_loaded_is_on_the_device(scene: Scene) -> None:
    from kvlink_core.store.tiers import TierSettings

    settings_ = TierSettings(device_bytes=2**20, host_bytes=2**20, recompute="never")
    device = torch.device("cuda", 0)
    tiers = TieredCache(settings_, device=device, payloads=scene.store, accept=lambda _: None)
    scene.made.append(tiers)
    for expected in ("store", "device"):
        found = tiers.fetch(scene.wanted("d0"))[scene.key("d0")]
        assert found.tier == expected
        assert found.cache is not None
        assert found.cache.keys.device == device
        assert found.cache.token_ids.device.type == "cpu"
        moved = DocumentCache(found.cache.token_ids, found.cache.keys.cpu(), found.cache.values.cpu())
        assert same(moved, CACHES["d0"])
        soon(lambda: all(t.documents == 1 for t in tiers.stats.tiers.values()))
    on_host = TieredCache(TierSettings(host_bytes=2**20), device=device, payloads=scene.store, accept=lambda _: None)
    scene.made.append(on_host)
    on_host.fetch(scene.wanted("d0"))
    soon(lambda: on_host.stats.tiers["host"].documents == 1)
    cache = on_host.fetch(scene.wanted("d0"))[scene.key("d0")].cache
    assert cache is not None
    assert cache.keys.is_pinned()
