"""A store that does not answer is not a damaged one: nothing is called missing, corrupt or lost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from store_places import Place, make_cache, same

from kvlink_core.errors import PayloadMissingError, StoreUnavailableError
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.storage import Range, Storage, Tail
from kvlink_core.types import DocumentCache

CACHES = {"a": make_cache(4, 1), "b": make_cache(5, 2)}


class Slow:
    """A storage whose named method times out for the paths that contain ``part``."""

    def __init__(self, storage: Storage, method: str, part: str, error: Exception) -> None:
        self._storage, self._method, self._part, self._error = storage, method, part, error

    def _late(self, method: str, path: str) -> bool:
        return method == self._method and self._part in path

    def read(self, path: str) -> bytes:
        if self._late("read", path):
            raise StoreUnavailableError(f"cannot read {path}") from self._error
        return self._storage.read(path)

    def tails(self, paths: Sequence[str], length: int) -> list[Tail | Exception]:
        found = self._storage.tails(paths, length)
        return [self._error if self._late("tails", p) else f for p, f in zip(paths, found, strict=True)]

    def open_ranges(self, ranges: Sequence[Range]) -> list[Any]:
        found = self._storage.open_ranges(ranges)
        return [self._error if self._late("open_ranges", r.path) else f for r, f in zip(ranges, found, strict=True)]


@pytest.fixture
def store(place: Place) -> DocumentStore:
    """Each document in a shard of its own; no footer is known yet."""
    writer = place.open(create=True)
    for entry in CACHES.items():
        writer.commit(writer.write_shard([entry]))
    return place.open()


@pytest.fixture
def rows(store: DocumentStore) -> list[CatalogRow]:
    return list(store.lookup(CACHES).values())


def slow_down(store: DocumentStore, monkeypatch: pytest.MonkeyPatch, method: str, part: str, error: Exception) -> None:
    monkeypatch.setattr(store._reader, "_storage", Slow(store._storage, method, part, error))


@pytest.mark.parametrize("method", ["tails", "open_ranges"])
@pytest.mark.parametrize(
    "error", [TimeoutError("timed out"), PermissionError(13, "denied"), OSError(5, "I/O error"), RuntimeError("closed")]
)
def test_one_shard_in_time_and_one_not(
    store: DocumentStore, rows: list[CatalogRow], monkeypatch: pytest.MonkeyPatch, method: str, error: Exception
) -> None:
    slow_down(store, monkeypatch, method, rows[1].shard, error)
    with pytest.raises(StoreUnavailableError, match=f"{rows[1].shard} cannot be read: {type(error).__name__}"):
        store.load(rows)
    with pytest.raises(StoreUnavailableError):
        store.token_ids(rows)
    assert same(store.load(rows[:1])[0], CACHES["a"])
    monkeypatch.undo()
    assert all(same(found, cache) for found, cache in zip(store.load(rows), CACHES.values(), strict=True))


def test_a_copy_that_does_not_come_in_time_is_not_lost(
    place: Place, store: DocumentStore, rows: list[CatalogRow], monkeypatch: pytest.MonkeyPatch
) -> None:
    place.delete(f"shards/{rows[0].shard}")
    slow_down(store, monkeypatch, "read", "tokens/", TimeoutError())
    assert [type(x) for x in store.load(rows)] == [PayloadMissingError, DocumentCache]
    with pytest.raises(StoreUnavailableError, match="tokens/"):
        store.token_ids(rows)
    monkeypatch.undo()
    assert store.token_ids(rows) == [c.token_ids.tolist() for c in CACHES.values()]


@pytest.mark.parametrize("data", [b"", b"not parquet", None])
def test_a_damaged_copy_is_no_copy(place: Place, store: DocumentStore, rows: list[CatalogRow], data: bytes) -> None:
    place.delete(f"shards/{rows[0].shard}")
    if data is None:
        place.delete(f"tokens/{rows[0].shard}")
    else:
        place.write(f"tokens/{rows[0].shard}", data)
    with pytest.raises(PayloadMissingError):
        store.token_ids(rows[:1])


@pytest.mark.parametrize("place", ["s3"], indirect=True)
@pytest.mark.parametrize("each", [False, True])
def test_a_bucket_that_times_out(
    store: DocumentStore, rows: list[CatalogRow], monkeypatch: pytest.MonkeyPatch, each: bool
) -> None:
    def late(paths: list[str], *_: Any, **__: Any) -> list[Exception]:
        if each:
            return [TimeoutError() for _ in paths]
        raise TimeoutError

    monkeypatch.setattr(store._storage._fs, "cat_ranges", late)  # type: ignore[attr-defined]
    for call in (store.load, store.token_ids):
        with pytest.raises(StoreUnavailableError, match="TimeoutError"):
            call(rows)
