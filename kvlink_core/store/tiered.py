"""Documents through the tiers: what the store alone would give, from nearer places, or computed if that is faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.store import DocumentStore
from kvlink_core.store.tiers import CacheKey, Found, TieredCache, Wanted
from kvlink_core.store.tiers.computing import Encode
from kvlink_core.store.tiers.key import COMPUTED
from kvlink_core.store.token_memory import TokenMemory
from kvlink_core.types import DocumentCache

#: The longest that a request waits for a look at what was added or replaced.
_REFRESH_WAIT_S = 1.0

#: Lengths of the documents that are computed to see how long that takes.
_CALIBRATION = (32, 128)


class TieredDocuments:
    """Documents by the digest of their tokens. Safe to use from several threads.

    Args:
        tiers: of this model and store.
        store: asked through the tiers, so that it may hang; ``None`` where there is none.
        fingerprint: digest of the model's fingerprint.
    """

    def __init__(self, tiers: TieredCache, store: DocumentStore | None, fingerprint: str) -> None:
        self.tiers = tiers
        self._store = store
        self._namespace = store.namespace if store is not None else "default"
        self._fingerprint = fingerprint
        self._known = TokenMemory()

    def refresh(self) -> None:
        """Look for documents that were added or replaced. Raises ``StoreUnavailableError``, after a second at most."""
        if self._store is not None:
            self.tiers.ask(self._store.refresh, wait_s=_REFRESH_WAIT_S)

    def calibrate(self, encode: Encode, longest: int) -> None:
        """Learn how fast this model computes, before the first request has to guess.

        Args:
            encode: computes documents.
            longest: tokens that it can compute at once.
        """
        self.tiers.calibrate(encode, [min(longest, tokens) for tokens in _CALIBRATION])

    def fetch(
        self, lengths: Mapping[str, int], rows: Mapping[str, CatalogRow], token_ids: Mapping[str, Sequence[int]]
    ) -> dict[str, Found]:
        """What there is of documents, all by digest; see ``TieredCache.fetch``.

        Args:
            lengths: tokens of each that is wanted.
            rows: of those that the store has.
            token_ids: of those whose token ids the caller knows.
        """
        wanted = self._wanted(lengths, rows, token_ids)
        if self._store is not None:
            read = self.tiers.token_ids(wanted.values(), self._store.token_ids)
            by_key = {item.key: digest for digest, item in wanted.items()}
            for key, ids in read.items():
                self._known.add(by_key[key], ids)
            if read:
                wanted = self._wanted(lengths, rows, token_ids)
        found = self.tiers.fetch(wanted.values())
        for digest, item in wanted.items():
            cache = found[item.key].cache
            if cache is not None and not item.computable:
                self._known.add(digest, cache.token_ids.tolist())
        return {digest: found[item.key] for digest, item in wanted.items()}

    def prefetch(
        self, lengths: Mapping[str, int], rows: Mapping[str, CatalogRow], token_ids: Mapping[str, Sequence[int]]
    ) -> None:
        """Begin to load what ``fetch`` would load, and return."""
        self.tiers.prefetch(self._wanted(lengths, rows, token_ids).values())

    def compute(self, documents: Mapping[str, Sequence[int]], encode: Encode) -> dict[str, DocumentCache]:
        """The caches of documents of known token ids, computed with ``encode`` unless another thread just did."""
        keys = {self._computed(digest): digest for digest in documents}
        done = self.tiers.compute({key: documents[digest] for key, digest in keys.items()}, encode)
        return {keys[key]: cache for key, cache in done.items()}

    def token_ids(self, row: CatalogRow) -> list[int]:
        """Token ids of a stored document.

        Raises ``StoreUnavailableError``, after the tiers' time-out at the latest, and what the store raises.
        """
        store = self._store
        assert store is not None, "only a store has rows"
        ids = self._known.get(row.token_digest)
        if ids is None:
            (ids,) = self.tiers.ask(lambda: store.token_ids([row]))
            self._known.add(row.token_digest, ids)
        return ids

    def _wanted(
        self, lengths: Mapping[str, int], rows: Mapping[str, CatalogRow], token_ids: Mapping[str, Sequence[int]]
    ) -> dict[str, Wanted]:
        wanted: dict[str, Wanted] = {}
        for digest, tokens in lengths.items():
            row = rows.get(digest)
            key = CacheKey.of(row) if row is not None else self._computed(digest)
            wanted[digest] = Wanted(key, row, tokens, digest in token_ids or digest in self._known)
        return wanted

    def _computed(self, digest: str) -> CacheKey:
        return CacheKey(self._namespace, self._fingerprint, digest, COMPUTED)
