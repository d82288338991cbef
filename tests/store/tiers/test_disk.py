"""The disk tier: what is on disk never exceeds the limit, damage is noticed, and files outlive the process."""

from __future__ import annotations

import errno
import os
import random
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import IO

import pytest
from store_places import Place, make_cache, same
from tier_scene import on_disk

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import ConfigError
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.key import CacheKey

CACHES = {f"d{n}": make_cache(40 + 17 * n, n) for n in range(8)}


@pytest.fixture(params=["raw", "int8", "lossless"])
def store(local: Place, request: pytest.FixtureRequest) -> DocumentStore:
    store = local.open(create=True, codec=request.param)
    store.commit(store.write_shard(list(CACHES.items())))
    return store


@pytest.fixture
def raw(local: Place) -> DocumentStore:
    store = local.open(create=True)
    store.commit(store.write_shard(list(CACHES.items())))
    return store


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "near"


@pytest.fixture
def tier(directory: Path) -> Iterator[DiskTier]:
    made = DiskTier(directory, 2**20)
    yield made
    made.close()


def put(tier: DiskTier, store: DocumentStore, row: CatalogRow) -> bool:
    (document,) = store.load_encoded([row])
    assert isinstance(document, EncodedDocument)
    nbytes = row.nbytes + 4 * row.tokens
    return tier.put(CacheKey.of(row), nbytes, lambda file: store.write_copy(file, row, document))


def test_a_payload_comes_back_as_the_store_has_it(store: DocumentStore, tier: DiskTier) -> None:
    rows = store.lookup(CACHES)
    for row in rows.values():
        assert tier.get(row) is None
        assert put(tier, store, row)
    for name, row in rows.items():
        document = tier.get(row)
        assert document is not None
        (cache,), (expected,) = store.decode([document]), store.load([row])
        assert same(cache, expected)  # type: ignore[arg-type]
        assert store.codec != "raw" or same(cache, CACHES[name])


@pytest.mark.parametrize("other", ["namespace", "fingerprint", "token_digest", "codec"])
def test_every_part_of_the_key_counts(raw: DocumentStore, tier: DiskTier, other: str) -> None:
    row = raw.lookup(["d0"])["d0"]
    put(tier, raw, row)
    assert tier.get(replace(row, **{other: "0" * 64})) is None
    assert tier.get(replace(row, document_id="another", shard="elsewhere", row_group=7)) is not None


def test_a_copy_under_the_wrong_name_is_not_believed(raw: DocumentStore, tier: DiskTier, directory: Path) -> None:
    """As if somebody had renamed one document's file to another's."""
    first, second = (raw.lookup([n])[n] for n in ("d0", "d1"))
    put(tier, raw, first)
    put(tier, raw, second)
    paths = {p.name[:64]: p for p in directory.rglob("*.parquet")}
    a, b = paths[CacheKey.of(first).digest], paths[CacheKey.of(second).digest]
    content = a.read_bytes()
    a.unlink()
    a.write_bytes(b.read_bytes())
    b.unlink()
    b.write_bytes(content)
    assert tier.get(first) is None
    assert tier.get(second) is None
    assert tier.stats.documents == 0


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "gone"])
def test_damage_is_noticed_and_removed(raw: DocumentStore, tier: DiskTier, directory: Path, damage: str) -> None:
    row = raw.lookup(["d3"])["d3"]
    put(tier, raw, row)
    (path,) = directory.rglob("*.parquet")
    content = bytearray(path.read_bytes())
    path.unlink()
    if damage == "flip":
        content[len(content) // 2] ^= 1
    if damage != "gone":
        path.write_bytes({"flip": content, "cut": content[:-20], "empty": b""}[damage])
    assert tier.get(row) is None
    assert CacheKey.of(row) not in tier
    assert (tier.stats.nbytes, list(directory.rglob("*.parquet"))) == (0, [])
    assert put(tier, raw, row)
    assert tier.get(row) is not None


def test_the_limit_holds_at_every_instant(raw: DocumentStore, directory: Path) -> None:
    rows = list(raw.lookup(CACHES).values())
    limit = 250_000  # all of them take 307,200, and each reserves 80 to 120 KB while it is written
    tier, ended, most = DiskTier(directory, limit), threading.Event(), [0]

    def watch() -> None:
        while not ended.is_set():
            most[0] = max(most[0], on_disk(directory))

    def work(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(40):
            row = choose.choice(rows)
            if (document := tier.get(row)) is None:
                put(tier, raw, row)
            else:
                assert same(raw.decode([document])[0], CACHES[row.document_id])

    watcher = threading.Thread(target=watch)
    watcher.start()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    ended.set()
    watcher.join()
    assert 0 < most[0] <= limit
    assert tier.stats.evictions > 5
    assert tier.stats.nbytes == on_disk(directory)
    tier.close()


def test_a_file_that_is_being_read_is_not_removed(raw: DocumentStore, directory: Path) -> None:
    rows = list(raw.lookup(CACHES).values())
    tier = DiskTier(directory, 260_000)
    assert put(tier, raw, rows[0])
    lease = tier._map(CacheKey.of(rows[0]).digest, tier._copies[CacheKey.of(rows[0]).digest])
    tier._copies[CacheKey.of(rows[0]).digest].leases += 1
    tier._lent_bytes += tier._copies[CacheKey.of(rows[0]).digest].nbytes
    for row in rows[1:]:
        put(tier, raw, row)
    assert CacheKey.of(rows[0]) in tier
    del lease
    for row in [*rows[1:], *rows[1:]]:
        put(tier, raw, row)
    assert CacheKey.of(rows[0]) not in tier
    tier.close()


def test_what_would_be_larger_than_said_is_not_kept(raw: DocumentStore, tier: DiskTier, directory: Path) -> None:
    (document,) = raw.load_encoded([raw.lookup(["d7"])["d7"]])
    row = raw.lookup(["d7"])["d7"]
    big = replace(document, columns={n: replace(c, data=c.data.flatten().repeat(5), lengths=c.lengths * 5) for n, c in document.columns.items()})  # type: ignore[type-var]  # fmt: skip  # noqa: E501
    assert not tier.put(CacheKey.of(row), row.nbytes, lambda file: file.write(big.columns["k"].data.numpy()) and "x")  # type: ignore[union-attr,func-returns-value,return-value]
    assert (tier.stats.nbytes, list(directory.rglob("*.parquet"))) == (0, [])
    assert put(tier, raw, row)


def test_a_full_disk_is_no_failure_and_is_given_a_rest(
    raw: DocumentStore, directory: Path, caplog: pytest.LogCaptureFixture
) -> None:
    now, written = [100.0], []

    def full(file: IO[bytes]) -> str:
        written.append(file.write(b"x" * 500))
        raise OSError(errno.ENOSPC, "No space left on device")

    row = raw.lookup(["d0"])["d0"]
    tier = DiskTier(directory, 2**20, clock=lambda: now[0])
    assert not tier.put(CacheKey.of(row), 1000, full)
    assert "No space left" in caplog.text
    assert (tier.stats.nbytes, on_disk(directory)) == (0, 0)
    now[0] += 9
    assert not put(tier, raw, row)
    assert (len(written), tier.stats.refused) == (1, 1)
    now[0] += 2
    assert put(tier, raw, row)
    assert tier.get(row) is not None
    tier.close()
    tier.close()  # twice is once


def test_a_writer_that_fails_otherwise_leaves_nothing_and_says_so(
    raw: DocumentStore, tier: DiskTier, directory: Path
) -> None:
    def fail(file: IO[bytes]) -> str:
        file.write(b"x" * 500)
        raise ValueError("ours")

    row = raw.lookup(["d0"])["d0"]
    with pytest.raises(ValueError, match="ours"):
        tier.put(CacheKey.of(row), 1000, fail)
    assert (tier.stats.nbytes, on_disk(directory)) == (0, 0)
    assert put(tier, raw, row)


def test_a_directory_that_cannot_be_taken_over_is_not_kept_locked(raw: DocumentStore, directory: Path) -> None:
    first = DiskTier(directory, 2**20)
    first.close()
    (directory / "slot-0" / ".tmp-a directory").mkdir()
    with pytest.raises(ConfigError, match="disk tier cannot use"):
        DiskTier(directory, 2**20)
    (directory / "slot-0" / ".tmp-a directory").rmdir()
    again = DiskTier(directory, 2**20)
    assert again._directory.name == "slot-0"
    again.close()


def test_files_outlive_the_process_and_are_taken_over(raw: DocumentStore, directory: Path) -> None:
    rows = list(raw.lookup(CACHES).values())
    first = DiskTier(directory, 2**20)
    for row in rows:
        put(first, raw, row)
    second = DiskTier(directory, 2**20)  # while the first one lives: a directory of its own
    assert second.stats.documents == 0
    second.close()
    first.close()
    (slot,) = [p.parent for p in directory.rglob("*.parquet") if p.parent.name == "slot-0"][:1]
    (slot / ".tmp-unfinished").write_bytes(b"x" * 1000)
    (slot / "something else").write_bytes(b"not ours")
    third = DiskTier(directory, 2**20)
    assert third.stats.documents == len(rows)
    assert all(third.get(row) is not None for row in rows)
    assert not (slot / ".tmp-unfinished").exists()
    assert (slot / "something else").exists()
    third.close()
    smaller = DiskTier(directory, 100_000)
    assert 0 < smaller.stats.documents < len(rows)
    assert smaller.stats.nbytes == on_disk(slot) - 4096 * ((slot / "something else").stat().st_blocks > 0) <= 100_000
    smaller.close()


def test_a_killed_process_leaves_its_directory_to_the_next(directory: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path; from kvlink_core.store.tiers.disk import DiskTier\n"
        f"DiskTier(Path({str(directory)!r}), 10**6); print('there', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=os.environ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"there\n"
        beside = DiskTier(directory, 10**6)
        child.kill()
    after = DiskTier(directory, 10**6)
    assert [t._directory.name for t in (beside, after)] == ["slot-1", "slot-0"]
    beside.close()
    after.close()


def test_a_place_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="disk tier cannot use"):
        DiskTier(tmp_path / "file", 100)
