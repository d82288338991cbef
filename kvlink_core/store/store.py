"""The store as the rest of KVLink sees it: open, write, commit, look up, load."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import TracebackType
from typing import IO, TypeVar

from kvlink_core.compress import Codec, EncodedDocument, codec_spec, dtype_name, get_codec, pruning_of
from kvlink_core.compress.pruning import Pruning
from kvlink_core.errors import (
    DuplicateDocumentError,
    EmptyDocumentError,
    FingerprintMismatchError,
    PayloadError,
    PayloadForeignError,
)
from kvlink_core.fingerprint import Fingerprint, digest_of_tokens
from kvlink_core.store import layout
from kvlink_core.store.buffers import checksum
from kvlink_core.store.catalog import Catalog, create_catalog
from kvlink_core.store.manifest import (
    FORMAT_VERSION,
    CodecEntry,
    ColumnEntry,
    DocumentEntry,
    Manifest,
    check_namespace,
)
from kvlink_core.store.payload import write_payload
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.shards import ShardReader
from kvlink_core.store.storage import Storage, open_storage
from kvlink_core.store.writing import publish_shard
from kvlink_core.types import DocumentCache, check_document_id

logger = logging.getLogger(__name__)

Loaded = TypeVar("Loaded")


class DocumentStore:
    """Document caches of one model in one namespace, by document id or by tokens.

    Safe to use from several threads; processes open it each for themselves (spawned, never forked). What it returns may
    be views of shared memory: never write to them.
    """

    def __init__(
        self, storage: Storage, fingerprint: Fingerprint, namespace: str, codec: Codec, *, verify: bool = True
    ) -> None:
        """Use ``open`` instead, which checks what is there."""
        self.url = storage.url
        self.fingerprint = fingerprint
        self.namespace = namespace
        self.codec = codec_spec(codec)
        self._digest = fingerprint.digest
        self._storage = storage
        self._codec = codec
        self._catalog = Catalog(storage, namespace, self._digest, self.codec)
        self._reader = ShardReader(storage, verify=verify)
        self._fingerprint_written = False

    @classmethod
    def open(
        cls,
        url: str,
        *,
        fingerprint: Fingerprint | None = None,
        namespace: str = "default",
        create: bool = False,
        codec: str = "raw",
        storage_options: Mapping[str, str] | None = None,
        verify: bool = True,
    ) -> DocumentStore:
        """Open the store at ``url`` and read its catalog.

        Args:
            url: a local path, ``file://`` or ``s3://bucket/prefix``.
            fingerprint: of the model whose caches are wanted; ``None`` takes that of the store, if it holds one alone.
            namespace: keeps tenants apart; nothing of one is found through another.
            create: make the store if it is not there; it is then also proven to be writable.
            codec: how new payloads are encoded, and which ones are found.
            storage_options: for S3, e.g. ``{"AWS_ENDPOINT_URL": ...}``; else the environment's.
            verify: verify checksums on every read.

        Raises:
            StoreNotFoundError: nothing there, and not ``create``.
            StoreUnavailableError: a file, not empty, unwritable, unreachable or damaged.
            FingerprintMismatchError: made with other models only; says which fields differ.
            FormatVersionError: made by a newer version.
            ConfigError, UnknownCodecError: an argument is impossible.
        """
        check_namespace(namespace)
        made = get_codec(codec)
        storage = open_storage(str(url), storage_options)
        if create:
            layout.create_store(storage)
        else:
            layout.check_store(storage)
        if fingerprint is None:
            fingerprint = layout.only_fingerprint(storage)
        else:
            layout.check_fingerprint(storage, fingerprint)
        if create:
            create_catalog(storage)
        store = cls(storage, fingerprint, namespace, made, verify=verify)
        try:
            store.refresh()
        except BaseException:
            store.close()
            raise
        return store

    def __enter__(self) -> DocumentStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the store's threads. It must not be used afterwards."""
        self._reader.close()

    # Writing

    @property
    def pruning(self) -> Pruning | None:
        """For the ``DocumentEncoder`` whose caches are written here: how its codec prunes, if it does.

        What only looks at the cache is done by ``write_shard`` as well; what looks at the model must be done there.
        """
        return pruning_of(self._codec)

    def write_shard(self, entries: Sequence[tuple[str, DocumentCache]]) -> list[CatalogRow]:
        """Write one immutable file with the caches of ``(document id, cache)``, invisible until its rows are committed.

        Entries with the same tokens share one payload. Returns a row per entry, in order; none for no entries.

        Raises:
            DuplicateDocumentError: one id with different tokens.
            EmptyDocumentError, InputError, CorpusError: a cache of no tokens; an id that cannot be stored; too large a
                document.
            FingerprintMismatchError: a cache of another dtype than the fingerprint says.
            PrunedCacheError: a cache pruned otherwise than the codec does, or not, though only an encoder can.
            StoreUnavailableError: it cannot be written.
        """
        if not entries:
            return []
        groups = self._group(entries)
        documents = [self._codec.encode(caches[0]) for _, caches in groups.values()]
        manifest = self._manifest(groups, documents)
        self._write_fingerprint()
        name = publish_shard(self._storage, manifest, self.fingerprint.to_json(), self._codec, documents)
        now = datetime.now(UTC)
        rows = {
            document_id: CatalogRow(
                document_id, self.namespace, manifest.fingerprint, entry.token_digest, self.codec,
                name, group, entry.tokens, entry.nbytes, now,
            )
            for group, entry in enumerate(manifest.documents)
            for document_id in entry.ids
        }  # fmt: skip
        return [rows[document_id] for document_id, _ in entries]

    def _group(self, entries: Sequence[tuple[str, DocumentCache]]) -> dict[str, tuple[list[str], list[DocumentCache]]]:
        """Ids and caches by token digest, after checking them."""
        groups: dict[str, tuple[list[str], list[DocumentCache]]] = {}
        digests: dict[str, str] = {}
        for document_id, cache in entries:
            check_document_id(document_id)
            if cache.tokens == 0:
                raise EmptyDocumentError(f"document {document_id!r} has no tokens.")
            dtypes = {dtype_name(t.dtype) for t in (cache.keys, cache.values)}
            if dtypes != {self.fingerprint.dtype}:
                raise FingerprintMismatchError(
                    f"document {document_id!r} comes as {', '.join(sorted(dtypes))}, "
                    f"but the fingerprint says {self.fingerprint.dtype}."
                )
            digest = digest_of_tokens(cache.token_ids.tolist())
            if digests.setdefault(document_id, digest) != digest:
                raise DuplicateDocumentError(f"document id {document_id!r} comes with two different texts.")
            ids, caches = groups.setdefault(digest, ([], []))
            if document_id not in ids:
                ids.append(document_id)
            caches.append(cache)
        return groups

    def _manifest(
        self, groups: Mapping[str, tuple[list[str], list[DocumentCache]]], documents: Sequence[EncodedDocument]
    ) -> Manifest:
        shape = documents[0].shape
        assert all(replace(d.shape, tokens=shape.tokens) == shape for d in documents), "caches of several models"
        return Manifest(
            format=FORMAT_VERSION,
            namespace=self.namespace,
            fingerprint=self._digest,
            codec=CodecEntry(name=self._codec.name, params=dict(self._codec.params)),
            checksum="xxh3-128",
            dtype=shape.dtype,
            layers=shape.layers,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            value_dim=shape.value_dim,
            documents=[
                DocumentEntry(
                    ids=ids,
                    token_digest=digest,
                    tokens=document.shape.tokens,
                    params=dict(document.params),
                    columns={
                        name: ColumnEntry(
                            bytes=document.columns[name].data.numel(),
                            checksum=checksum(document.columns[name].data),
                        )
                        for name in self._codec.columns
                    },
                )
                for (digest, (ids, _)), document in zip(groups.items(), documents, strict=True)
            ],
        )

    def _write_fingerprint(self) -> None:
        if not self._fingerprint_written:
            layout.add_fingerprint(self._storage, self.fingerprint)
            self._fingerprint_written = True

    def alias(self, document_id: str, row: CatalogRow) -> CatalogRow:
        """A row that gives the payload of ``row`` another id; still to be committed. Raises ``InputError``."""
        check_document_id(document_id)
        return replace(row, document_id=document_id, created_at=datetime.now(UTC))

    def commit(self, rows: Sequence[CatalogRow], *, replace_payloads: bool = False) -> int:
        """Make rows visible, all in one atomic step, and return a version of the catalog that has them.

        Rows of an id that already has these tokens are dropped, so that doing the same work twice adds nothing; with
        ``replace_payloads`` they are taken, to replace a damaged payload. The last of several rows of one id counts.

        Raises:
            PayloadForeignError: a row of another namespace, fingerprint or codec.
            StoreNotFoundError, StoreUnavailableError: not committed; none of the rows is visible.
        """
        for row in rows:
            if (row.namespace, row.fingerprint, row.codec) != (self.namespace, self._digest, self.codec):
                raise PayloadForeignError(f"the row of document {row.document_id!r} belongs to another store")
        self.refresh()
        latest = {row.document_id: row for row in rows}
        known = self.lookup(latest)
        fresh: list[CatalogRow] = []
        for document_id, row in latest.items():
            old = known.get(document_id)
            if old is not None and old.token_digest == row.token_digest and not replace_payloads:
                continue
            if old is not None and old.created_at >= row.created_at:  # clocks of machines differ
                row = replace(row, created_at=old.created_at + timedelta(microseconds=1))
            fresh.append(row)
        if not fresh:
            return self._catalog.version
        layout.check_store(self._storage)  # where a store was deleted, committing would leave a part of one
        return self._catalog.append(fresh)

    # Reading

    def refresh(self) -> bool:
        """Take in what others committed since; true when there was something. Raises ``StoreUnavailableError``."""
        return self._catalog.refresh()

    def lookup(self, document_ids: Iterable[str]) -> dict[str, CatalogRow]:
        """The rows of those ids that are there, as of the last refresh."""
        return self._catalog.index.by_id(document_ids)

    def lookup_tokens(self, token_digests: Iterable[str]) -> dict[str, CatalogRow]:
        """For each token digest that is there, a row of any document with these tokens, as of the last refresh."""
        return self._catalog.index.by_digest(token_digests)

    def load(self, rows: Sequence[CatalogRow]) -> list[DocumentCache | PayloadError]:
        """The caches of ``rows``, in order; in the place of one that must not be served, the error that says why.

        Raises ``StoreUnavailableError`` when the store does not answer, which says nothing of the payloads.
        """
        return self._own(rows, self._reader.load)

    def load_encoded(self, rows: Sequence[CatalogRow]) -> list[EncodedDocument | PayloadError]:
        """Like ``load``, but as the codec stored it, checked; for ``decode`` and ``write_copy``."""
        return self._own(rows, self._reader.load_encoded)

    def _own(
        self, rows: Sequence[CatalogRow], load: Callable[[Sequence[CatalogRow]], list[Loaded | PayloadError]]
    ) -> list[Loaded | PayloadError]:
        """What ``load`` has for those rows that are of this store; for the others, that they are not."""
        foreign = [r.namespace != self.namespace or r.fingerprint != self._digest for r in rows]
        loaded = iter(load([r for r, other in zip(rows, foreign, strict=True) if not other]))
        return [
            PayloadForeignError(f"the row of document {row.document_id!r} belongs to another store")
            if other
            else next(loaded)
            for row, other in zip(rows, foreign, strict=True)
        ]

    def decode(self, documents: Sequence[EncodedDocument]) -> list[DocumentCache | PayloadError]:
        """The cache of each document that this store's codec encoded."""
        return self._reader.decode(self._codec, documents)

    def write_copy(self, file: IO[bytes], row: CatalogRow, document: EncodedDocument) -> str:
        """Write a shard of the document of ``row`` alone to a file of the caller's, and return its name.

        The copy describes and checks itself like any shard (FORMAT.md section 2), but is no part of the store.
        """
        manifest = self._manifest({row.token_digest: ([row.document_id], [])}, [document])
        return write_payload(file, manifest.to_bytes(), self.fingerprint.to_json(), self._codec, [document])

    def token_ids(self, rows: Sequence[CatalogRow]) -> list[list[int]]:
        """Token ids of ``rows`` without K and V, also when a shard is damaged, from the copy kept beside it.

        Raises a ``PayloadError`` for the first row whose token ids are nowhere to be had, and
        ``StoreUnavailableError`` when the store does not answer.
        """
        for row in rows:
            if (row.namespace, row.fingerprint) != (self.namespace, self._digest):
                raise PayloadForeignError(f"the row of document {row.document_id!r} belongs to another store")
        return self._reader.token_ids(rows)
