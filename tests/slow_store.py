"""A real store behind a wire that can be slow, cut, or dead."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import PayloadError, StoreUnavailableError
from kvlink_core.store import CatalogRow, DocumentStore

Read = EncodedDocument | PayloadError


class SlowStore(DocumentStore):
    """Everything but the catalog in memory goes over the wire.

    Attributes:
        reads: the documents of each round of reading, by id.
        asked: what else was asked for: ``token_ids`` and ``refresh``.
        failing: whether it refuses to answer.
        gate: cleared, it hangs until it is set.
        latency_s, bytes_per_s: of the wire.
        spoil: what happens to documents on their way.
    """

    def __init__(self, store: DocumentStore) -> None:
        self.__dict__.update(store.__dict__)
        self.reads: list[list[str]] = []
        self.asked: list[str] = []
        self.failing = False
        self.gate = threading.Event()
        self.gate.set()
        self.latency_s = 0.0
        self.bytes_per_s = float("inf")
        self.spoil: Callable[[EncodedDocument | PayloadError], EncodedDocument | PayloadError] = lambda document: (
            document
        )

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        self.reads.append([row.document_id for row in rows])
        self._cross(sum(row.nbytes for row in rows))
        return [self.spoil(document) for document in super().load_encoded(rows)]

    def token_ids(self, rows: Sequence[CatalogRow]) -> list[list[int]]:
        self.asked.append("token_ids")
        self._cross(sum(4 * row.tokens for row in rows))
        return super().token_ids(rows)

    def refresh(self) -> bool:
        self.asked.append("refresh")
        self._cross(0)
        return super().refresh()

    def _cross(self, nbytes: int) -> None:
        if not self.gate.wait(30):
            raise AssertionError("a test left its store hanging")
        if self.failing:
            raise StoreUnavailableError("the wire is cut")
        time.sleep(self.latency_s + nbytes / self.bytes_per_s)
