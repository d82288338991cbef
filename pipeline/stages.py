"""The steps that need the model: what Ray's tasks and actors call. Nothing here imports Ray.

Each is a function of one Arrow table: ``key_rows`` (rows to chunks with tokens and their digest) and ``ShardEncoder``
(chunks to one stored shard and small catalog rows). A bad document never raises: it becomes a row that says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kvlink_core.chunking import chunk_document
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import ConfigError, InputError, KVLinkError
from kvlink_core.fingerprint import digest_of_tokens, token_bytes
from kvlink_core.models import load_model
from kvlink_core.models.describe import load_layout
from kvlink_core.prompt import PromptLayout
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.rows import from_micros, to_micros
from kvlink_core.template import id_at_place
from kvlink_core.types import Document, DocumentCache, check_document_id
from pipeline.reading import BadRow
from pipeline.tables import RESULT_SCHEMA, SCAN_SCHEMA, bad_row

logger = logging.getLogger(__name__)


@lru_cache(maxsize=1)
def _layout(model: str) -> PromptLayout:
    """One tokenizer for each worker process, not for each block."""
    return load_layout(model)


def key_rows(table: pa.Table, *, model: str, limit: int, places: int | None = None) -> pa.Table:
    """Chunk, tokenize and key rows of ``READ_SCHEMA``; gives ``SCAN_SCHEMA``, good and bad rows alike.

    With ``places`` each chunk comes once for each of the first that many places of a prompt, its id saying which.
    """
    keyed: list[dict[str, Any]] = []
    try:
        layout = _layout(model)
    except KVLinkError as error:  # it is on the driver, so this node lacks it
        fatal = {**bad_row("fatal", BadRow("", None, error.code, str(error))), "part": 0}
        return pa.Table.from_pylist([fatal], schema=SCAN_SCHEMA)
    for row in table.to_pylist():
        if row["outcome"] != "ok":
            del row["text"], row["title"]
            keyed.append({**row, "part": 0})
            continue
        document = Document(row["document_id"], row["text"], row["title"])
        try:
            chunks = _key(document, row["place"], layout, limit, places)
            keyed.extend({**each, "place": row["place"]} for each in chunks)
        except KVLinkError as error:
            bad = bad_row("bad-row", BadRow(row["place"], document.id, error.code, str(error)))
            keyed.append({**bad, "part": 0})
        except Exception as error:  # one bad document never aborts the job: a tokenizer may choke on anything
            logger.exception("cannot tokenize the document at %s", row["place"])
            bad = bad_row("bad-row", BadRow(row["place"], document.id, "tokenize_error", repr(error)))
            keyed.append({**bad, "part": 0})
    return pa.Table.from_pylist(keyed, schema=SCAN_SCHEMA)


def _key(document: Document, place: str, layout: PromptLayout, limit: int, places: int | None) -> list[dict[str, Any]]:
    def tokenize(text: str, at: int | None) -> list[int]:
        return layout.document_tokens(Document(document.id, text, document.title), at)

    def count(text: str) -> int:
        return len(tokenize(text, places - 1 if places else None))  # the last place has the longest number

    chunks = chunk_document(document.id, document.text, limit=limit, count_tokens=count)
    text_digest = hashlib.sha256(f"{document.title or ''}\0{document.text}".encode()).digest()
    keyed = []
    for part, (chunk, at) in enumerate(product(chunks, range(places) if places else [None])):
        chunk_id = chunk.id if at is None else id_at_place(chunk.id, at)
        try:
            check_document_id(chunk_id)
        except InputError as error:
            error.code = "invalid_id"  # as for the ids that are refused while reading
            raise
        token_ids = tokenize(chunk.text, at)
        keyed.append(
            {
                "outcome": "ok",
                "document_id": document.id,
                "chunk_id": chunk_id,
                "part": part,
                "titled": document.title is not None,
                "text_digest": text_digest,
                "token_digest": digest_of_tokens(token_ids),
                "tokens": len(token_ids),
                "ticket": hashlib.sha256(f"{place}\0{part}".encode()).digest()[:16],
                "token_ids": token_bytes(token_ids),
            }
        )
    return keyed


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What an actor needs to know. Small; the model and the store are opened where they are used."""

    model: str
    device: str
    dtype: str | None
    fingerprint: str
    store: str
    namespace: str
    codec: str
    storage_options: Mapping[str, str]
    max_batch_tokens: int
    shard_tokens: int
    threads: int | None


class ShardEncoder:
    """Holds the model; makes one stored shard of each table of chunks (twice ``shard_tokens`` at most).

    Never raises a ``KVLinkError``: one that stops the job (the model cannot be loaded here or is another one, the
    store cannot be written) comes back as ``fatal`` rows.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        self._settings = settings
        self._broken: KVLinkError | None = None
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        try:
            self._open(settings)
        except KVLinkError as error:
            self._broken = error

    def _open(self, settings: EncoderSettings) -> None:
        model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
        if model.fingerprint.digest != settings.fingerprint:
            raise ConfigError(
                f"the model {settings.model!r} on this node is not the one on the driver's: "
                "its fingerprint differs. Give all nodes the same files."
            )
        self._store = DocumentStore.open(
            settings.store,
            fingerprint=model.fingerprint,
            namespace=settings.namespace,
            codec=settings.codec,
            storage_options=dict(settings.storage_options) or None,
        )
        self._encoder = DocumentEncoder(model, max_batch_tokens=settings.max_batch_tokens, prune=self._store.pruning)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode and store chunks; returns ``RESULT_SCHEMA``, which holds no keys or values."""
        began = time.time()
        rows, results = table.to_pylist(), []
        try:
            if self._broken is not None:
                raise self._broken
            for shard in cut_shards(rows, 2 * self._settings.shard_tokens):
                results += encode_shard(self._encoder, self._store, shard)
        except KVLinkError as error:
            failed = {"code": error.code, "reason": str(error), "fatal": True}
            results += [{**_identity(row), **failed} for row in rows[len(results) :]]
        for result in results:
            result |= {"began": began, "ended": time.time()}
        return pa.Table.from_pylist(results, schema=RESULT_SCHEMA)


def _identity(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in ("chunk_id", "token_digest", "tokens")}


def cut_shards(rows: Sequence[dict[str, Any]], most_tokens: int) -> Iterator[list[dict[str, Any]]]:
    """Consecutive rows of at most ``most_tokens`` together; a longer row stands alone."""
    shard: list[dict[str, Any]] = []
    held = 0
    for row in rows:
        if shard and held + row["tokens"] > most_tokens:
            yield shard
            shard, held = [], 0
        shard.append(row)
        held += row["tokens"]
    if shard:
        yield shard


def encode_shard(
    encoder: DocumentEncoder, store: DocumentStore, rows: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Encode rows and write them as one shard, not yet visible. One bad document fails alone.

    Raises:
        StoreError: the store cannot be written; that is nobody's document's fault, so the job must stop.
    """
    token_ids = [np.frombuffer(row["token_ids"], dtype="<u4").tolist() for row in rows]
    caches = _encode(encoder, token_ids)
    good = [(row["chunk_id"], c) for row, c in zip(rows, caches, strict=True) if isinstance(c, DocumentCache)]
    written = iter(_write(store, good))
    results = []
    for row, cache in zip(rows, caches, strict=True):
        result = _identity(row)
        outcome = next(written) if isinstance(cache, DocumentCache) else cache
        if isinstance(outcome, CatalogRow):
            result["catalog"] = row_to_json(outcome)
        else:
            code = outcome.code if isinstance(outcome, KVLinkError) else "encode_error"
            result |= {"code": code, "reason": " ".join(str(outcome).split())[:500] or repr(outcome)}
        results.append(result)
    return results


def _write(store: DocumentStore, entries: Sequence[tuple[str, DocumentCache]]) -> list[CatalogRow | Exception]:
    """All in one shard; where one of them is refused (too large, say), each in a shard of its own."""
    try:
        return list(store.write_shard(entries))
    except InputError as error:
        if len(entries) == 1:
            return [error]
    return [outcome for entry in entries for outcome in _write(store, [entry])]


def row_to_json(row: CatalogRow) -> str:
    """A catalog row on its way to the driver."""
    return json.dumps({**asdict(row), "created_at": to_micros(row.created_at)})


def row_from_json(text: str) -> CatalogRow:
    """The row back from ``row_to_json``."""
    fields = json.loads(text)
    return CatalogRow(**{**fields, "created_at": from_micros(fields["created_at"])})


def _encode(encoder: DocumentEncoder, token_ids: list[list[int]]) -> list[DocumentCache | Exception]:
    """All together; where that fails, one by one, so that only what fails alone is a failure."""
    try:
        return list(encoder.encode(token_ids))
    # Broad on purpose: torch has no common root for what it raises (memory, numerics, a kernel), and whatever it was,
    # the documents that are not at fault are to be computed. What is left is raised or reported below, never dropped.
    except Exception:
        logger.warning("a batch of %d documents failed; trying them one by one", len(token_ids), exc_info=True)
    caches: list[DocumentCache | Exception] = []
    for each in token_ids:
        try:
            caches += encoder.encode([each])
        except Exception as error:  # whatever it is, it is this document's: reported with its id
            caches.append(error)
    broken = [c for c in caches if isinstance(c, Exception) and not isinstance(c, KVLinkError)]
    if len(broken) == len(caches) > 1:
        raise broken[-1]  # nothing works any more, a lost device say: not the documents' fault
    return caches
