"""From the documents of a request to their caches: load what the store has, encode what it lacks, distrust the rest.

Fail closed: a payload that cannot be trusted is computed again from the document's tokens, counted and logged. A
damaged store can make an answer slower, never different.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import (
    DocumentLostError,
    DocumentPlaceError,
    DuplicateDocumentError,
    PayloadError,
    PayloadForeignError,
    StoreUnavailableError,
    UnknownDocumentError,
)
from kvlink_core.fingerprint import digest_of_tokens
from kvlink_core.models import LoadedModel
from kvlink_core.store.catalog import CatalogRow
from kvlink_core.store.store import DocumentStore
from kvlink_core.template import id_at_place
from kvlink_core.types import Document, DocumentCache, DocumentRef

logger = logging.getLogger(__name__)

Origin = Literal["store", "encoded", "reencoded-corrupt"]


@dataclass(frozen=True, slots=True)
class ResolvedDocument:
    """Where a document's cache came from. ``origin`` is None while nothing was loaded for it (linker ``full``)."""

    id: str | None
    tokens: int
    origin: Origin | None


@dataclass(slots=True)
class Lookup:
    """The documents of one request, found but not yet loaded.

    ``token_ids`` is known for documents sent as text and filled in for the others when they are loaded.
    """

    ids: list[str | None]
    rows: list[CatalogRow | None]
    token_ids: list[list[int] | None]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        pairs = zip(self.rows, self.token_ids, strict=True)
        return [len(t) if t is not None else row.tokens if row else 0 for row, t in pairs]


@dataclass(slots=True)
class Counters:
    """What happened since start. Read at any time; changed under a lock."""

    documents_hit: int = 0
    documents_encoded: int = 0
    corrupt_payloads: int = 0
    requested_tokens: int = 0
    hit_tokens: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def add(self, **amounts: int) -> None:
        """Add to several counters at once."""
        with self._lock:
            for name, amount in amounts.items():
                setattr(self, name, getattr(self, name) + amount)

    def as_dict(self) -> dict[str, int]:
        """A consistent copy."""
        with self._lock:
            return {n: getattr(self, n) for n in self.__slots__ if not n.startswith("_")}


class DocumentResolver:
    """Finds and loads document caches.

    Args:
        model: encodes what is missing.
        store: opened with the model's fingerprint, or ``None`` to encode everything.
        refresh_after: least seconds between two looks for documents that were added or replaced.
    """

    def __init__(self, model: LoadedModel, store: DocumentStore | None = None, *, refresh_after: float = 1.0) -> None:
        self.model = model
        self.store = store
        self.counters = Counters()
        self._encoder = DocumentEncoder(model)
        self._refresh_after = refresh_after
        self._refreshed = time.monotonic()
        self._refresh_lock = threading.Lock()

    def lookup(self, documents: Sequence[Document | DocumentRef]) -> Lookup:
        """Find documents in the catalog; loads no payload.

        Args:
            documents: in the order of the prompt. Where the document template names the place, one sent as text is
                found by its tokens as rendered at its place, and one named by id under that id and place: never one
                that was rendered for another.

        Raises:
            UnknownDocumentError: ids that the store does not have, all of them named.
            DocumentPlaceError: an id that the store has for other places only.
            DuplicateDocumentError: one id with two texts.
            EmptyDocumentError: a document without text.
        """
        texts: dict[str, tuple[str | None, str]] = {}
        for document in documents:
            if isinstance(document, Document) and document.id:
                content = (document.title, document.text)
                if texts.setdefault(document.id, content) != content:
                    raise DuplicateDocumentError(
                        f"document id {document.id!r} comes with two different texts; give each its own id.",
                        param="documents",
                    )
        self._refresh()
        layout = self.model.layout
        token_ids = [
            layout.document_tokens(d, place) if isinstance(d, Document) else None for place, d in enumerate(documents)
        ]
        by_place = self._by_place({place: d.id for place, d in enumerate(documents) if isinstance(d, DocumentRef)})
        digests = [None if t is None else digest_of_tokens(t) for t in token_ids]
        by_tokens = self.store.lookup_tokens([d for d in digests if d]) if self.store else {}
        rows = [
            by_tokens.get(digest) if digest is not None else by_place[place] for place, digest in enumerate(digests)
        ]
        return Lookup([d.id or None for d in documents], rows, token_ids)

    def _by_place(self, ids: dict[int, str]) -> dict[int, CatalogRow]:
        """The row of each document that is named by id alone, by its place in the prompt."""
        stored = {place: self._stored_id(i, place) for place, i in ids.items()}
        found = self._known(stored.values())
        missing = {place: i for place, i in ids.items() if stored[place] not in found}
        if missing:
            names = list(dict.fromkeys(missing.values()))
            elsewhere = self._known(form for i in names for form in (i, self._stored_id(i, 0)))
            unknown = [i for i in names if i not in elsewhere and self._stored_id(i, 0) not in elsewhere]
            if not unknown:
                place, document_id = next(iter(missing.items()))
                raise DocumentPlaceError(document_id, place)
            # Precompute splits what is too long: its chunks are there, it is not.
            chunks = self._known(self._stored_id(f"{i}#0", 0) for i in unknown)
            raise UnknownDocumentError(unknown, chunked=[i for i in unknown if self._stored_id(f"{i}#0", 0) in chunks])
        return {place: found[i] for place, i in stored.items()}

    def _stored_id(self, document_id: str, place: int) -> str:
        return id_at_place(document_id, place) if self.model.layout.template.by_place else document_id

    def _known(self, ids: Iterable[str]) -> dict[str, CatalogRow]:
        return self.store.lookup(list(ids)) if self.store else {}

    def _refresh(self) -> None:
        """Look for added and replaced documents, at most once per ``refresh_after`` seconds over all threads."""
        if self.store is None or time.monotonic() - self._refreshed < self._refresh_after:
            return
        with self._refresh_lock:
            if time.monotonic() - self._refreshed < self._refresh_after:
                return  # another thread did it meanwhile
            # Counted from now also when it fails: a store that is away must not be asked for each request.
            self._refreshed = time.monotonic()
            try:
                self.store.refresh()
            except StoreUnavailableError as error:
                logger.warning("cannot look for new documents, going on with those known: %s", error)

    def fill_tokens(self, lookup: Lookup) -> list[list[int]]:
        """Token ids of every document, without loading caches.

        Raises:
            DocumentLostError: a document's token ids are damaged wherever they are kept.
        """
        wanted = [r for r, t in zip(lookup.rows, lookup.token_ids, strict=True) if t is None and r]
        if wanted:
            assert self.store is not None
            tokens = {r.token_digest: self._token_ids(r) for r in wanted}
            for i, row in enumerate(lookup.rows):
                if lookup.token_ids[i] is None and row:
                    lookup.token_ids[i] = tokens[row.token_digest]
        return [t for t in lookup.token_ids if t is not None]

    def _load_stored(self, rows: dict[str, CatalogRow]) -> tuple[dict[str, DocumentCache], dict[str, Origin]]:
        """What the store gives for rows by token digest; what it refuses or cannot give now is left out."""
        caches: dict[str, DocumentCache] = {}
        origins: dict[str, Origin] = {}
        if not rows:
            return caches, origins
        assert self.store is not None
        try:
            payloads = self.store.load(list(rows.values()))
        except StoreUnavailableError as error:
            logger.warning("the store does not answer, computing %d documents: %s", len(rows), error)
            return caches, origins
        for (digest, row), loaded in zip(rows.items(), payloads, strict=True):
            refused = loaded if isinstance(loaded, PayloadError) else self._misfit(loaded)
            if refused is not None:
                logger.warning(
                    "document %r: stored payload refused (%s: %s); computing it again",
                    row.document_id, refused.code, refused,
                )  # fmt: skip
                self.counters.add(corrupt_payloads=1)
                origins[digest] = "reencoded-corrupt"
            elif isinstance(loaded, DocumentCache):
                caches[digest] = loaded
                origins[digest] = "store"
        return caches, origins

    def _misfit(self, cache: DocumentCache) -> PayloadForeignError | None:
        """Why a sound payload is not one of this model, if so: its shape would be broadcast, not refused, later on."""
        keys, values = self.model.recipes.shapes(cache.slots)
        fits = cache.keys.shape == keys and cache.values.shape == values
        if fits and cache.keys.dtype == cache.values.dtype == self.model.dtype:
            return None
        return PayloadForeignError(
            f"keys {tuple(cache.keys.shape)} and values {tuple(cache.values.shape)} of {cache.keys.dtype}, where this "
            f"model has {keys} and {values} of {self.model.dtype}"
        )

    def _token_ids(self, row: CatalogRow) -> list[int]:
        assert self.store is not None
        try:
            return self.store.token_ids([row])[0]
        except PayloadError as error:
            logger.error("document %r: token ids refused (%s: %s)", row.document_id, error.code, error)
            raise DocumentLostError(row.document_id) from error

    def load(self, lookup: Lookup) -> tuple[list[DocumentCache], list[ResolvedDocument]]:
        """Caches of all documents, in order. Bad payloads are recomputed; token ids are filled in.

        Raises:
            DocumentLostError: a payload and the token ids to recompute it from are both damaged.
            StoreUnavailableError: the store does not answer, and a document is known by its id alone.
        """
        caches, origins = self._load_stored({r.token_digest: r for r in lookup.rows if r})
        keys = [
            row.token_digest if row else digest_of_tokens(t or [])
            for row, t in zip(lookup.rows, lookup.token_ids, strict=True)
        ]
        if missing := [k for k in dict.fromkeys(keys) if k not in caches]:
            if any(lookup.token_ids[keys.index(k)] is None for k in missing):
                self.fill_tokens(lookup)
            encoded = self._encoder.encode([lookup.token_ids[keys.index(k)] or [] for k in missing])
            caches.update(zip(missing, encoded, strict=True))
            self.counters.add(documents_encoded=len(missing))
        ordered = [caches[k] for k in keys]
        lookup.token_ids = [c.token_ids.tolist() for c in ordered]
        resolved = [
            ResolvedDocument(i, c.tokens, origins.get(k, "encoded"))
            for i, k, c in zip(lookup.ids, keys, ordered, strict=True)
        ]
        hits = [r for r in resolved if r.origin == "store"]
        self.counters.add(
            documents_hit=len(hits),
            requested_tokens=sum(r.tokens for r in resolved),
            hit_tokens=sum(r.tokens for r in hits),
        )
        return ordered, resolved
