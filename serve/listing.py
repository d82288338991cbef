"""The documents of a namespace, sorted by id, as of one version of the catalog."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping
from itertools import count

import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.chunking import CHUNK_SEPARATOR
from kvlink_core.store.lifecycle import Scope, StoreKeeper
from kvlink_core.template import id_at_place, without_place
from serve.wire import DocumentEntry, DocumentPage

_COLUMNS = ["document_id", "tokens", "nbytes", "created_at"]


class Listing:
    """The documents that count, found by id and paged in the order of their ids.

    Args:
        table: rows with ``_COLUMNS``, sorted by id, each id once.
        by_place: whether ids have a place appended, as ``id@0``.
    """

    def __init__(self, table: pa.Table, *, by_place: bool) -> None:
        self._table = table.combine_chunks()
        self._ids = self._table["document_id"]
        self._by_place = by_place

    @classmethod
    def read(cls, keeper: StoreKeeper, scope: Scope, *, by_place: bool) -> Listing:
        """As of now. Raises ``StoreUnavailableError``."""
        rows = keeper.catalog.read(scope)
        table = rows.take(rows.counting).table.select(_COLUMNS)
        return cls(table.sort_by("document_id"), by_place=by_place)

    def __len__(self) -> int:
        return int(self._table.num_rows)

    def page(self, *, after: str, prefix: str, limit: int) -> DocumentPage:
        """Documents whose id begins with ``prefix`` and comes after ``after``, ``limit`` at most."""
        found: list[DocumentEntry] = []
        # Of "a@0", "a@1", ... all are the document "a": its other places are passed over.
        start = self._position(max(after, prefix))
        for index in range(start, len(self)):
            stored = self._id(index)
            if not stored.startswith(prefix):
                break
            shown = self._shown(stored)
            if shown is None or shown <= after:
                continue
            if len(found) == limit:
                return DocumentPage(tuple(found), has_more=True)
            found.append(self._entry(shown, {shown: index}, chunks=1))
        return DocumentPage(tuple(found), has_more=False)

    def find(self, document_id: str) -> DocumentEntry | None:
        """A document by its id, or by the id that it had before it was cut into chunks."""
        if (index := self._index(self._stored(document_id))) is not None:
            return self._entry(document_id, {document_id: index}, chunks=1)
        chunks = dict(self._chunks(document_id))
        return self._entry(document_id, chunks, chunks=len(chunks)) if chunks else None

    def stored_ids(self, document_id: str) -> list[str]:
        """The ids of the rows that make up a document; none where it is not there."""
        names = [document_id] if self._index(self._stored(document_id)) is not None else []
        names += [name for name, _ in self._chunks(document_id)]
        if not self._by_place:
            return names
        return [stored for name in names for stored, _ in self._places(name)]

    def _chunks(self, document_id: str) -> Iterator[tuple[str, int]]:
        """Chunks from 0 on as far as they go: an id like ``x#12`` alone is a document of its own."""
        for number in count():
            name = f"{document_id}{CHUNK_SEPARATOR}{number}"
            index = self._index(self._stored(name))
            if index is None:
                return
            yield name, index

    def _places(self, name: str) -> Iterator[tuple[str, int]]:
        for place in count():
            stored = id_at_place(name, place)
            index = self._index(stored)
            if index is None:
                return
            yield stored, index

    def _entry(self, document_id: str, parts: Mapping[str, int], *, chunks: int) -> DocumentEntry:
        rows = self._table.take(pa.array(list(parts.values()), pa.int64()))
        places = sum(1 for _ in self._places(next(iter(parts)))) if self._by_place else None
        return DocumentEntry(
            id=document_id,
            tokens=int(pc.sum(rows["tokens"]).as_py()),
            nbytes=int(pc.sum(rows["nbytes"]).as_py()),
            chunks=chunks,
            places=places,
            created_at=int(pc.max(rows["created_at"]).as_py().timestamp()),
        )

    def _stored(self, document_id: str) -> str:
        return id_at_place(document_id, 0) if self._by_place else document_id

    def _shown(self, stored: str) -> str | None:
        if not self._by_place:
            return stored
        shown = without_place(stored)
        return shown if id_at_place(shown, 0) == stored else None

    def _id(self, index: int) -> str:
        return str(self._ids[index].as_py())

    def _position(self, document_id: str) -> int:
        return bisect_left(range(len(self)), document_id, key=self._id)

    def _index(self, stored_id: str) -> int | None:
        position = self._position(stored_id)
        return position if position < len(self) and self._id(position) == stored_id else None
