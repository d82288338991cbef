"""Adding documents in a replica: cut, encode, write one shard, commit.

They are encoded in the steps of requests, so that no answer waits for them; for a codec that prunes by what the model
does while it reads, each of them whole, between two steps.

The same ids as precompute gives: ``id#0`` and so on for chunks of what is too long, ``id@0`` and so on where the
model's template names the place.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from kvlink_core.chunking import chunk_document
from kvlink_core.encode import DocumentEncoder, Pruner
from kvlink_core.errors import InputError, PromptTooLongError
from kvlink_core.fingerprint import digest_of_tokens
from kvlink_core.models import LoadedModel
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.template import id_at_place
from kvlink_core.types import Document, DocumentCache, check_document_id
from serve.engine_loop import EngineLoop
from serve.wire import ApiError, ApiException, JobDocument, NewDocument, StoredPart, api_error

logger = logging.getLogger("ray.serve")


@dataclass(frozen=True, slots=True)
class _Part:
    id: str
    token_ids: list[int]
    digest: str


class DocumentAdder:
    """Adds documents to a store.

    Args:
        model: encodes them.
        engine: encodes them.
        chunk_tokens: the longest document that is not cut.
        places: for how many places of a prompt to store, where the template names them.
    """

    def __init__(self, model: LoadedModel, engine: EngineLoop, *, chunk_tokens: int, places: int) -> None:
        self._model = model
        self._engine = engine
        self._limit = min(chunk_tokens, model.context_length // 2)
        self._places = places if model.layout.template.by_place else None

    async def add(self, store: DocumentStore, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        """Add documents, all in one shard and one commit. One that cannot be added fails alone.

        Raises:
            StoreError: the store cannot be read or written; none was added.
        """
        planned = await asyncio.to_thread(lambda: [self._plan(document) for document in documents])
        parts = [part for plan in planned if not isinstance(plan, ApiError) for part in plan]
        known = await asyncio.to_thread(self._known, store, parts)
        caches: dict[str, DocumentCache | ApiError] = {}
        for part in parts:
            if part.digest not in known and part.digest not in caches:
                caches[part.digest] = await self._encode(store.pruning, part)
        sound = {digest: cache for digest, cache in caches.items() if isinstance(cache, DocumentCache)}
        rows = await asyncio.to_thread(self._write, store, parts, known, sound)
        return tuple(_outcome(document, plan, rows, caches) for document, plan in zip(documents, planned, strict=True))

    def _plan(self, document: NewDocument) -> list[_Part] | ApiError:
        layout = self._model.layout

        def tokenize(text: str, place: int | None) -> list[int]:
            return layout.document_tokens(Document(document.id, text, document.title), place)

        longest = None if self._places is None else self._places - 1  # the last place has the longest number
        try:
            chunks = chunk_document(
                document.id, document.text, limit=self._limit, count_tokens=lambda text: len(tokenize(text, longest))
            )
            parts = []
            for chunk, place in product(chunks, [None] if self._places is None else range(self._places)):
                part_id = chunk.id if place is None else id_at_place(chunk.id, place)
                check_document_id(part_id)
                token_ids = tokenize(chunk.text, place)
                if len(token_ids) >= self._model.context_length:
                    raise PromptTooLongError(len(token_ids), self._model.context_length, what="the document")
                parts.append(_Part(part_id, token_ids, digest_of_tokens(token_ids)))
        except InputError as error:
            return api_error(error)
        return parts

    def _known(self, store: DocumentStore, parts: Sequence[_Part]) -> dict[str, CatalogRow]:
        """Rows of what need not be encoded: the namespace has these tokens already."""
        store.refresh()
        return store.lookup_tokens(part.digest for part in parts)

    async def _encode(self, pruning: Pruner | None, part: _Part) -> DocumentCache | ApiError:
        try:
            if pruning is None or pruning.reads == "cache":  # the store prunes what only looks at the cache
                return await asyncio.wrap_future(self._engine.encode(part.token_ids))
            encoder = DocumentEncoder(self._model, prune=pruning)
            (cache,) = await asyncio.wrap_future(self._engine.call(lambda: encoder.encode([part.token_ids])))
            return cache
        except Exception as error:  # out of memory, say: this document's fault, not the others'
            logger.error("cannot encode document %r", part.id, exc_info=error)
            return api_error(error)

    def _write(
        self,
        store: DocumentStore,
        parts: Sequence[_Part],
        known: dict[str, CatalogRow],
        caches: dict[str, DocumentCache],
    ) -> dict[str, CatalogRow]:
        """Write and commit; returns the rows by id of all that are stored now."""
        entries = {part.id: (part.id, caches[part.digest]) for part in parts if part.digest in caches}
        rows = {row.document_id: row for row in store.write_shard(list(entries.values()))}
        rows |= {part.id: store.alias(part.id, known[part.digest]) for part in parts if part.digest in known}
        if rows:
            store.commit(list(rows.values()))
        return rows


def _outcome(
    document: NewDocument,
    plan: list[_Part] | ApiError,
    rows: dict[str, CatalogRow],
    caches: dict[str, DocumentCache | ApiError],
) -> JobDocument:
    if isinstance(plan, ApiError):
        return JobDocument(document.id, "failed", error=plan)
    failed = next((c for part in plan if isinstance(c := caches.get(part.digest), ApiError)), None)
    if failed is not None:
        return JobDocument(document.id, "failed", error=failed)
    found = [rows[part.id] for part in plan]
    return JobDocument(document.id, "done", tuple(StoredPart(r.document_id, r.tokens, r.nbytes) for r in found))


def no_store() -> ApiException:
    """What is said where the service has no store."""
    return ApiException(ApiError(400, "this service has no store: documents cannot be kept.", "no_store"))
