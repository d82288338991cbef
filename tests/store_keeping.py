"""Stores to be looked after, and what must be true of them at any time."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

from store_places import FINGERPRINT, Place, same

from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.lifecycle import Scope, StoreKeeper, list_documents, verify
from kvlink_core.types import DocumentCache

NOW = timedelta(0)
OURS = Scope("default")

Caches = dict[str, DocumentCache]


@contextmanager
def keeping(place: Place) -> Iterator[StoreKeeper]:
    """The store at ``place``, opened anew."""
    with StoreKeeper.open(place.url, storage_options=place.options) as keeper:
        yield keeper


def put(store: DocumentStore, caches: Mapping[str, DocumentCache]) -> list[CatalogRow]:
    """Write them into one shard, and commit."""
    rows = store.write_shard(list(caches.items()))
    store.commit(rows)
    return rows


def check(place: Place, expected: Mapping[str, DocumentCache], namespace: str = "default") -> None:
    """A reader that opens the store finds exactly these documents, each whole, and everything verifies."""
    with keeping(place) as keeper:
        found = list_documents(keeper, Scope(namespace)).rows
        assert {r.document_id for r in found} == set(expected)
        verified = verify(keeper)
        assert verified.problems == []
    whose = None if expected else FINGERPRINT  # a store that never held anything does not know
    with DocumentStore.open(place.url, fingerprint=whose, namespace=namespace, storage_options=place.options) as reader:
        rows = reader.lookup(expected)
        assert list(rows) == list(expected)
        loaded = reader.load(list(rows.values()))
        assert all(same(cache, expected[i]) for i, cache in zip(expected, loaded, strict=True))


def make_old(place: Place, age: timedelta = timedelta(days=2)) -> None:
    """All files of a local store, as if they had been written that long ago."""
    for path in Path(place.url).rglob("*"):
        if path.is_file():
            moment = path.stat().st_mtime - age.total_seconds()
            os.utime(path, (moment, moment))
