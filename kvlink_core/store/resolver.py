"""From the documents of a request to their caches: load what the store has, encode what it lacks, distrust the rest.

Fail closed: a payload that cannot be trusted is computed again from the document's tokens, counted and logged. A
damaged store can make an answer slower, never different.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterable, Sequence

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
from kvlink_core.store.resolved import Counters, Lookup, Origin, ResolvedDocument
from kvlink_core.store.store import DocumentStore
from kvlink_core.store.tiered import TieredDocuments
from kvlink_core.store.tiers import TIERS, CacheKey, CacheStats, Found, Tier, TieredCache, TierSettings
from kvlink_core.store.tiers.loading import Payloads
from kvlink_core.template import id_at_place
from kvlink_core.types import Document, DocumentCache, DocumentRef

logger = logging.getLogger(__name__)

__all__ = ["Counters", "DocumentResolver", "Lookup", "Origin", "ResolvedDocument"]


class DocumentResolver:
    """Finds and loads document caches.

    Args:
        model: encodes what is missing.
        store: opened with the model's fingerprint, or ``None`` to encode everything.
        tiers: where to keep caches, and when to compute instead of loading; ``None`` keeps nothing and always loads.
            ``close`` then has something to close. One of ``shared_tiers`` is used beside others and left open.
        refresh_after: least seconds between two looks for documents that were added or replaced.

    Raises:
        ConfigError: the memory or the directory of ``tiers`` cannot be had.
    """

    def __init__(
        self,
        model: LoadedModel,
        store: DocumentStore | None = None,
        tiers: TierSettings | TieredCache | None = None,
        *,
        refresh_after: float = 1.0,
    ) -> None:
        self.model = model
        self.store = store
        self.counters = Counters()
        self._encoder = DocumentEncoder(model)
        self._refresh_after = refresh_after
        self._refreshed = time.monotonic()
        self._refresh_lock = threading.Lock()
        self._near: TieredDocuments | None = None
        self._own: TieredCache | None = None
        if isinstance(tiers, TierSettings):
            tiers = self._own = shared_tiers(model, tiers, store)
        if tiers is not None:
            self._near = TieredDocuments(tiers, store, model.fingerprint.digest)

    def close(self) -> None:
        """End the tiers' threads and free their memory; the store stays open. It must not be used afterwards."""
        if self._own is not None:
            self._own.close()

    def calibrate(self) -> None:
        """With tiers, compute a little to learn how long that takes."""
        if self._near is not None:
            self._near.calibrate(self._encoder.encode, self.model.context_length)

    @property
    def tiered(self) -> bool:
        """Whether there are tiers."""
        return self._near is not None

    @property
    def tier_stats(self) -> CacheStats | None:
        """What the tiers hold and did, if there are any."""
        return None if self._near is None else self._near.tiers.stats

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
                (self.store if self._near is None else self._near).refresh()
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

    def _load_stored(self, rows: dict[str, CatalogRow]) -> dict[str, Found]:
        """What the store gives for rows by token digest; nothing while it does not answer."""
        if not rows:
            return {}
        assert self.store is not None
        try:
            payloads = self.store.load(list(rows.values()))
        except StoreUnavailableError as error:
            return dict.fromkeys(rows, Found(unavailable=error))
        found: dict[str, Found] = {}
        for digest, loaded in zip(rows, payloads, strict=True):
            if isinstance(loaded, DocumentCache) and (refused := self._misfit(loaded)) is None:
                found[digest] = Found(loaded, "store")
            else:
                found[digest] = Found(refused=loaded if isinstance(loaded, PayloadError) else refused)
        return found

    def _distrust(self, found: dict[str, Found], rows: dict[str, CatalogRow]) -> None:
        """Count and log what was refused, and log what was not to be had."""
        away = [f.unavailable for f in found.values() if f.unavailable is not None]
        if away:
            logger.warning("the store does not answer, computing %d documents: %s", len(away), away[0])
        for digest, refused in ((d, f.refused) for d, f in found.items() if f.refused is not None):
            logger.warning(
                "document %r: stored payload refused (%s: %s); computing it again",
                rows[digest].document_id, refused.code, refused,
            )  # fmt: skip
            self.counters.add(corrupt_payloads=1)

    def _misfit(self, cache: DocumentCache) -> PayloadForeignError | None:
        return misfit(self.model, cache)

    def _token_ids(self, row: CatalogRow) -> list[int]:
        assert self.store is not None
        try:
            return self.store.token_ids([row])[0] if self._near is None else self._near.token_ids(row)
        except PayloadError as error:
            logger.error("document %r: token ids refused (%s: %s)", row.document_id, error.code, error)
            raise DocumentLostError(row.document_id) from error

    def load(self, lookup: Lookup) -> tuple[list[DocumentCache], list[ResolvedDocument]]:
        """Caches of all documents, in order. Bad payloads are recomputed; token ids are filled in.

        Raises:
            DocumentLostError: a payload and the token ids to recompute it from are both damaged.
            StoreUnavailableError: the store does not answer, and a document is known by its id alone.
        """
        found, resolved = self.find(lookup)
        digests = self._digests(lookup)
        token_ids = [ids or [] for ids in lookup.token_ids]
        missing = {d: ids for d, ids, cache in zip(digests, token_ids, found, strict=True) if cache is None}
        encoded = self._encode(missing) if missing else {}
        pairs = zip(digests, found, strict=True)
        return [cache if cache is not None else encoded[digest] for digest, cache in pairs], resolved

    def find(self, lookup: Lookup) -> tuple[list[DocumentCache | None], list[ResolvedDocument]]:
        """``load`` for someone who encodes what is missing: those caches are ``None``. Token ids are filled in.

        Raises:
            DocumentLostError, StoreUnavailableError: as ``load``.
        """
        rows = {row.token_digest: row for row in lookup.rows if row}
        digests = self._digests(lookup)
        found = self._load_stored(rows) if self._near is None else self._near.fetch(*self._asked(lookup, digests))
        self._distrust(found, rows)
        caches = {digest: f.cache for digest, f in found.items() if f.cache is not None}
        if missing := [d for d in dict.fromkeys(digests) if d not in caches]:
            if any(lookup.token_ids[digests.index(d)] is None for d in missing):
                self.fill_tokens(lookup)
            self.counters.add(documents_encoded=len(missing))
        ordered = [caches.get(d) for d in digests]
        for i, cache in enumerate(ordered):
            if cache is not None:
                lookup.token_ids[i] = cache.token_ids.tolist()
        resolved = [
            ResolvedDocument(i, tokens, _origin(found.get(d, Found())))
            for i, d, tokens in zip(lookup.ids, digests, lookup.lengths, strict=True)
        ]
        self._count(resolved)
        return ordered, resolved

    def tiers_of(self, ids: Sequence[str]) -> list[Tier]:
        """The tiers, the store among them, that each hold all of some stored documents, the fastest first.

        Where documents are stored for places, it is the copy for the first one that counts.
        """
        self._refresh()
        stored = [self._stored_id(i, 0) for i in ids]
        rows = self._known(stored)
        if not ids or any(i not in rows for i in stored):
            return []
        near = [self._near.tiers.where(CacheKey.of(rows[i])) if self._near is not None else [] for i in stored]
        return [tier for tier in TIERS if tier == "store" or all(tier in found for found in near)]

    def keep(self, cache: DocumentCache) -> None:
        """With tiers, keep a cache that someone else encoded because ``find`` had none."""
        if self._near is not None:
            token_ids = cache.token_ids.tolist()
            self._near.compute({digest_of_tokens(token_ids): token_ids}, lambda _: [cache])

    def prefetch(self, lookup: Lookup) -> None:
        """Begin to load what ``load`` would load, and return; nothing without tiers."""
        if self._near is not None:
            self._near.prefetch(*self._asked(lookup, self._digests(lookup)))

    def _digests(self, lookup: Lookup) -> list[str]:
        pairs = zip(lookup.rows, lookup.token_ids, strict=True)
        return [row.token_digest if row else digest_of_tokens(ids or []) for row, ids in pairs]

    def _asked(
        self, lookup: Lookup, digests: Sequence[str]
    ) -> tuple[dict[str, int], dict[str, CatalogRow], dict[str, list[int]]]:
        """Lengths, rows and token ids by digest."""
        rows = {row.token_digest: row for row in lookup.rows if row}
        known = {d: ids for d, ids in zip(digests, lookup.token_ids, strict=True) if ids is not None}
        return dict(zip(digests, lookup.lengths, strict=True)), rows, known

    def _encode(self, documents: dict[str, list[int]]) -> dict[str, DocumentCache]:
        if self._near is not None:
            return self._near.compute(documents, self._encoder.encode)
        return dict(zip(documents, self._encoder.encode(list(documents.values())), strict=True))

    def _count(self, resolved: Sequence[ResolvedDocument]) -> None:
        hits = [r for r in resolved if r.hit]
        self.counters.add(
            documents_hit=len(hits),
            requested_tokens=sum(r.tokens for r in resolved),
            hit_tokens=sum(r.tokens for r in hits),
            **{f"hit_tokens_{tier}": sum(r.tokens for r in hits if r.origin == tier) for tier in TIERS},
        )


def _origin(found: Found) -> Origin:
    if found.tier is not None:
        return found.tier
    return "reencoded-corrupt" if found.refused is not None else "encoded"


def misfit(model: LoadedModel, cache: DocumentCache) -> PayloadForeignError | None:
    """Why a sound payload is not one of this model, if so: its shape would be broadcast, not refused, later on."""
    keys, values = model.recipes.shapes(cache.slots)
    fits = cache.keys.shape == keys and cache.values.shape == values
    if fits and cache.keys.dtype == cache.values.dtype == model.dtype:
        return None
    return PayloadForeignError(
        f"keys {tuple(cache.keys.shape)} and values {tuple(cache.values.shape)} of {cache.keys.dtype}, where this "
        f"model has {keys} and {values} of {model.dtype}"
    )


def shared_tiers(model: LoadedModel, settings: TierSettings, payloads: Payloads | None) -> TieredCache:
    """Tiers for the resolvers of several namespaces of one model; ``close`` them after those.

    Args:
        model: theirs.
        settings: sizes and times, over all of them.
        payloads: gives the payload of any row that they look up.

    Raises:
        ConfigError: the memory or the directory cannot be had.
    """
    return TieredCache(settings, device=model.device, payloads=payloads, accept=lambda cache: misfit(model, cache))
