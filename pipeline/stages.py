"""The work between the shuffles: what Ray's tasks and actors call. Nothing here imports Ray.

Three steps, each a function of one Arrow table: ``read_files`` (files to rows), ``key_rows`` (rows to chunks with
tokens and their digest) and ``ShardEncoder`` (chunks to one stored shard and small catalog rows). A bad document never
raises: it becomes a row that says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from kvlink_core.chunking import chunk_document
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import ConfigError, CorpusError, KVLinkError
from kvlink_core.fingerprint import token_digest
from kvlink_core.models import load_model
from kvlink_core.models.describe import load_layout
from kvlink_core.prompt import PromptLayout
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.rows import from_micros, to_micros
from kvlink_core.types import Document, DocumentCache
from pipeline.reading import BadRow, Columns, Row, read_file
from pipeline.sources import SourceFile

logger = logging.getLogger(__name__)

#: Rows as read. ``outcome`` is ``ok``, ``bad-row`` or ``bad-file``.
READ_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("place", pa.string()),
        ("document_id", pa.string()),
        ("text", pa.large_string()),
        ("title", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
    ]
)

#: Chunks with their tokens (little-endian uint32). ``ticket`` names the row; ``part`` numbers a document's rows.
SCAN_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("place", pa.string()),
        ("document_id", pa.string()),
        ("chunk_id", pa.string()),
        ("part", pa.int32()),
        ("titled", pa.bool_()),
        ("text_digest", pa.binary()),
        ("token_digest", pa.string()),
        ("tokens", pa.int64()),
        ("ticket", pa.binary()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("token_ids", pa.large_binary()),
    ]
)

#: What an actor says of each chunk. ``catalog`` is the row to commit, as JSON; empty where ``code`` says what failed.
#: ``began`` and ``ended`` (seconds since the epoch) are those of its block.
RESULT_SCHEMA = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("token_digest", pa.string()),
        ("tokens", pa.int64()),
        ("catalog", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("began", pa.float64()),
        ("ended", pa.float64()),
    ]
)


def read_files(
    table: pa.Table, *, columns: Columns, options: Mapping[str, Any], rows_per_block: int = 256
) -> Iterator[pa.Table]:
    """Read the files whose ``SourceFile`` fields are the rows of ``table``, as tables of ``READ_SCHEMA``."""
    for fields in table.to_pylist():
        file = SourceFile(**fields)
        rows = _read_rows(file, columns, options)
        while block := list(islice(rows, rows_per_block)):
            yield pa.Table.from_pylist(block, schema=READ_SCHEMA)
    yield READ_SCHEMA.empty_table()  # Ray needs a schema of a file without rows, too


def _read_rows(file: SourceFile, columns: Columns, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        for row in read_file(file, columns, options):
            if isinstance(row, Row):
                yield {
                    "outcome": "ok",
                    "place": row.place,
                    "document_id": row.id,
                    "text": row.text,
                    "title": row.title,
                }
            else:
                yield _bad("bad-row", row)
    except CorpusError as error:
        yield _bad("bad-file", BadRow(file.url, None, error.code, str(error)))


def _bad(outcome: str, row: BadRow) -> dict[str, Any]:
    # What a bad row says of itself may quote its own broken Unicode.
    reason = row.reason[:500].encode("utf-8", "replace").decode()
    return {"outcome": outcome, "place": row.place, "document_id": row.id, "code": row.code, "reason": reason}


@lru_cache(maxsize=1)
def _layout(model: str) -> PromptLayout:
    """One tokenizer for each worker process, not for each block."""
    return load_layout(model)


def key_rows(table: pa.Table, *, model: str, limit: int) -> pa.Table:
    """Chunk, tokenize and key rows of ``READ_SCHEMA``; gives ``SCAN_SCHEMA``, good and bad rows alike."""
    layout = _layout(model)
    keyed: list[dict[str, Any]] = []
    for row in table.to_pylist():
        if row["outcome"] != "ok":
            del row["text"], row["title"]
            keyed.append({**row, "part": 0})
            continue
        document = Document(row["document_id"], row["text"], row["title"])
        try:
            keyed.extend({**each, "place": row["place"]} for each in _key(document, row["place"], layout, limit))
        except KVLinkError as error:
            bad = _bad("bad-row", BadRow(row["place"], document.id, error.code, str(error)))
            keyed.append({**bad, "part": 0})
        except Exception as error:  # one bad document never aborts the job: a tokenizer may choke on anything
            logger.exception("cannot tokenize the document at %s", row["place"])
            bad = _bad("bad-row", BadRow(row["place"], document.id, "tokenize_error", repr(error)))
            keyed.append({**bad, "part": 0})
    return pa.Table.from_pylist(keyed, schema=SCAN_SCHEMA)


def _key(document: Document, place: str, layout: PromptLayout, limit: int) -> list[dict[str, Any]]:
    def tokenize(text: str) -> list[int]:
        return layout.document_tokens(Document(document.id, text, document.title))

    chunks = chunk_document(document.id, document.text, limit=limit, count_tokens=lambda text: len(tokenize(text)))
    text_digest = hashlib.sha256(f"{document.title or ''}\0{document.text}".encode()).digest()
    keyed = []
    for chunk in chunks:
        token_ids = np.asarray(tokenize(chunk.text), dtype="<u4").tobytes()
        keyed.append(
            {
                "outcome": "ok",
                "document_id": document.id,
                "chunk_id": chunk.id,
                "part": chunk.index,
                "titled": document.title is not None,
                "text_digest": text_digest,
                "token_digest": token_digest(token_ids),
                "tokens": len(token_ids) // 4,
                "ticket": hashlib.sha256(f"{place}\0{chunk.index}".encode()).digest()[:16],
                "token_ids": token_ids,
            }
        )
    return keyed


def select_rows(table: pa.Table, *, tickets: np.ndarray[Any, Any]) -> pa.Table:
    """The rows whose ticket is among ``tickets`` (sorted, 16 bytes each), without the columns no longer needed."""
    kept = table.filter(pa.compute.equal(table["outcome"], "ok"))
    mine = np.array(kept["ticket"].to_pylist(), dtype="S16")
    at = np.minimum(np.searchsorted(tickets, mine), len(tickets) - 1)
    return kept.filter(pa.array(tickets[at] == mine)).select(["chunk_id", "token_digest", "tokens", "token_ids"])


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

    Raises:
        ConfigError: the model that is here is not the one that the job was planned with.
        KVLinkError: the model cannot be loaded, or the store not be opened or written.
    """

    def __init__(self, settings: EncoderSettings) -> None:
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
        if model.fingerprint.digest != settings.fingerprint:
            raise ConfigError(
                f"the model {settings.model!r} on this node is not the one on the driver's: "
                "its fingerprint differs. Give all nodes the same files."
            )
        self._encoder = DocumentEncoder(model, max_batch_tokens=settings.max_batch_tokens)
        self._store = DocumentStore.open(
            settings.store,
            fingerprint=model.fingerprint,
            namespace=settings.namespace,
            codec=settings.codec,
            storage_options=dict(settings.storage_options) or None,
        )
        self._shard_tokens = settings.shard_tokens

    def __call__(self, table: pa.Table) -> pa.Table:
        """Encode and store chunks; returns ``RESULT_SCHEMA``, which holds no keys or values."""
        began, results = time.time(), []
        for rows in cut_shards(table.to_pylist(), 2 * self._shard_tokens):
            results += encode_shard(self._encoder, self._store, rows)
        for result in results:
            result |= {"began": began, "ended": time.time()}
        return pa.Table.from_pylist(results, schema=RESULT_SCHEMA)


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
    written = iter(store.write_shard(good) if good else [])
    results = []
    for row, cache in zip(rows, caches, strict=True):
        result = {key: row[key] for key in ("chunk_id", "token_digest", "tokens")}
        if isinstance(cache, DocumentCache):
            result["catalog"] = row_to_json(next(written))
        else:
            code = cache.code if isinstance(cache, KVLinkError) else "encode_error"
            result |= {"code": code, "reason": " ".join(str(cache).split())[:500] or repr(cache)}
        results.append(result)
    return results


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
