"""The payloads of several namespaces as one source, for tiers that the namespaces of a replica share."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import IO

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.types import DocumentCache


class PayloadsOfStores:
    """Reads each row from the store of its namespace; all are of one model and codec. Safe to use from several threads.

    A row of a namespace that is not open is not read: ``StoreUnavailableError``.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, DocumentStore] = {}

    def add(self, store: DocumentStore | None) -> None:
        """From now on, read from this store."""
        if store is not None:
            with self._lock:
                self._stores[store.namespace] = store

    def drop(self, store: DocumentStore | None) -> None:
        """No more, and close it."""
        if store is not None:
            with self._lock:
                del self._stores[store.namespace]
            store.close()

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        """The payload of each row, not decoded. Raises ``StoreUnavailableError``."""
        found: dict[int, EncodedDocument | PayloadError] = {}
        for namespace in dict.fromkeys(row.namespace for row in rows):
            places = [place for place, row in enumerate(rows) if row.namespace == namespace]
            loaded = self._store(namespace).load_encoded([rows[place] for place in places])
            found.update(zip(places, loaded, strict=True))
        return [found[place] for place in range(len(rows))]

    def decode(self, documents: Sequence[EncodedDocument]) -> list[DocumentCache | PayloadError]:
        """The cache of each payload; the codec is the same in all namespaces."""
        with self._lock:
            store = next(iter(self._stores.values()), None)
        if store is None:
            raise StoreUnavailableError("no namespace is open.")
        return store.decode(documents)

    def write_copy(self, file: IO[bytes], row: CatalogRow, document: EncodedDocument) -> str:
        """Write a shard of this document alone, and return its name."""
        return self._store(row.namespace).write_copy(file, row, document)

    def _store(self, namespace: str) -> DocumentStore:
        with self._lock:
            store = self._stores.get(namespace)
        if store is None:
            raise StoreUnavailableError(f"namespace {namespace!r} was closed meanwhile.")
        return store
