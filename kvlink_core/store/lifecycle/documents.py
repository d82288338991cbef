"""Looking at documents and shards, always of one namespace: another's are not there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.errors import ConfigError, PayloadError, PayloadMissingError, UnknownDocumentError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import layout
from kvlink_core.store.lifecycle.keeper import StoreKeeper
from kvlink_core.store.lifecycle.table import Scope
from kvlink_core.store.manifest import Manifest, is_shard_name
from kvlink_core.store.payload import Footer
from kvlink_core.store.rows import CatalogRow


@dataclass(frozen=True, slots=True)
class Listing:
    """Some documents, sorted by id, and how many there are in all."""

    rows: list[CatalogRow]
    total: int


@dataclass(frozen=True, slots=True)
class DocumentInfo:
    """A document as it is stored for one model and codec.

    Attributes:
        row: the catalog row that counts.
        superseded: earlier rows, newest first.
        same_tokens: further ids of the same payload.
        fingerprint: the fields behind the row's fingerprint, or ``None`` where they are lost.
        manifest: what the shard says, or ``None``.
        problem: why the payload cannot be served, or ``None``.
    """

    row: CatalogRow
    superseded: list[CatalogRow]
    same_tokens: list[str]
    fingerprint: Fingerprint | None
    manifest: Manifest | None
    problem: PayloadError | None


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """A shard.

    Attributes:
        name: its file under ``shards/``.
        size: bytes of the file.
        modified: when it was written.
        manifest: what it says of itself.
        ids: by row group, the ids that the catalog has for it now; none when nothing names it any more.
    """

    name: str
    size: int
    modified: datetime
    manifest: Manifest
    ids: Mapping[int, list[str]]


def list_documents(keeper: StoreKeeper, scope: Scope, *, prefix: str = "", limit: int | None = None) -> Listing:
    """Documents whose id begins with ``prefix``, sorted by id; ``limit`` of them at most.

    Raises ``ConfigError`` (no namespace), ``StoreNotFoundError`` or ``StoreUnavailableError``.
    """
    rows = keeper.catalog.read(one_namespace(scope))
    rows = rows.take(rows.counting)
    rows = rows.take(pc.starts_with(rows.table["document_id"], prefix).to_numpy())
    keys = [("document_id", "ascending"), ("fingerprint", "ascending"), ("codec", "ascending")]
    order = pc.sort_indices(rows.table, keys).to_numpy()
    return Listing(list(rows.to_rows(order[:limit])), len(rows))


def inspect_document(keeper: StoreKeeper, scope: Scope, document_id: str) -> list[DocumentInfo]:
    """Everything about a document, once for each model and codec that it is stored for. Reads its payloads.

    Raises:
        UnknownDocumentError: it is not in this namespace.
        ConfigError, StoreNotFoundError, StoreUnavailableError: see ``list_documents``.
    """
    rows = keeper.catalog.read(one_namespace(scope))
    counting = list(rows.to_rows(np.flatnonzero(rows.counting & rows.of_ids([document_id]))))
    if not counting:
        raise UnknownDocumentError([document_id])
    others = list(rows.to_rows(np.flatnonzero(rows.sound & ~rows.counting & rows.of_ids([document_id]))))
    shards = pa.array(sorted({r.shard for r in counting}), pa.string())
    in_shards = pc.is_in(rows.table["shard"], value_set=shards).to_numpy()
    neighbours = list(rows.to_rows(np.flatnonzero(rows.counting & in_shards & ~rows.of_ids([document_id]))))
    footers = keeper.reader.footers(shards.to_pylist())
    found: list[DocumentInfo] = []
    for row, loaded in zip(counting, keeper.reader.load(counting), strict=True):
        footer = footers[row.shard]
        same_key = [r for r in others if (r.fingerprint, r.codec) == (row.fingerprint, row.codec)]
        found.append(
            DocumentInfo(
                row,
                sorted(same_key, key=lambda r: r.order, reverse=True),
                sorted(n.document_id for n in neighbours if (n.shard, n.row_group) == (row.shard, row.row_group)),
                layout.read_fingerprint(keeper.storage, row.fingerprint),
                footer.manifest if isinstance(footer, Footer) and not isinstance(loaded, PayloadError) else None,
                loaded if isinstance(loaded, PayloadError) else None,
            )
        )
    return found


def inspect_shard(keeper: StoreKeeper, scope: Scope, name: str) -> ShardInfo:
    """What a shard says of itself, and what the catalog says of it.

    Args:
        keeper: of the store.
        scope: must name the namespace.
        name: the shard's file name, or its first digits.

    Raises:
        PayloadMissingError: there is none of that name in this namespace.
        PayloadError: it is damaged.
        ConfigError: several begin like that.
        StoreNotFoundError, StoreUnavailableError: see ``list_documents``.
    """
    rows = keeper.catalog.read(one_namespace(scope))
    named = set(rows.take(rows.counting).table["shard"].to_pylist())
    entries = {e.path.removeprefix("shards/"): e for e in keeper.storage.entries("shards")}
    fitting = sorted(n for n in entries.keys() | named if n.startswith(name) and is_shard_name(n)) if name else []
    footers = keeper.reader.footers(fitting[:100])
    ours = [n for n in fitting[:100] if n in named or _namespace(footers[n]) == scope.namespace]
    if not ours:
        raise PayloadMissingError(f"there is no shard {name[:80]!r} in namespace {scope.namespace!r}.")
    if len(ours) > 1:
        raise ConfigError(f"{len(ours)} shards begin with {name!r}; give more digits.", param="shard")
    footer = footers[ours[0]]
    if isinstance(footer, PayloadError):
        raise footer
    if _namespace(footer) != scope.namespace:  # a row that names another's shard does not open it
        raise PayloadMissingError(f"there is no shard {name[:80]!r} in namespace {scope.namespace!r}.")
    ids: dict[int, list[str]] = {i: [] for i in range(len(footer.manifest.documents))}
    mask = rows.counting & pc.equal(rows.table["shard"], ours[0]).to_numpy()
    for row in rows.to_rows(np.flatnonzero(mask)):
        ids.setdefault(row.row_group, []).append(row.document_id)
    entry = entries[ours[0]]
    modified = datetime.fromtimestamp(entry.modified, UTC)
    return ShardInfo(ours[0], entry.size, modified, footer.manifest, {n: sorted(i) for n, i in ids.items()})


def one_namespace(scope: Scope) -> Scope:
    """``scope``, if it names the namespace. Raises ``ConfigError``."""
    if scope.namespace is None:
        raise ConfigError("say which namespace the documents are in.", param="namespace")
    return scope


def _namespace(footer: Footer | PayloadError) -> str | None:
    return footer.manifest.namespace if isinstance(footer, Footer) else None
