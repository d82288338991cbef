"""Taking documents out of the catalog: by id, or by age. Their payloads go when they are collected."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.errors import ConfigError
from kvlink_core.store.lifecycle.documents import one_namespace
from kvlink_core.store.lifecycle.keeper import StoreKeeper
from kvlink_core.store.lifecycle.rows import Mask, Rows
from kvlink_core.store.lifecycle.table import Edit, Scope
from kvlink_core.store.records import DELETED, Deleted, publish_record
from kvlink_core.store.rows import to_micros
from kvlink_core.types import check_document_id

_SHOWN = 20

#: What precompute appends to the id of a document: the number of a chunk, the place in a prompt.
_PART = re.compile(r"(.+?)(#\d+)?(@\d+)?", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Removal:
    """What left the catalog, or would.

    Attributes:
        documents: how many documents, each counted once for every model and codec that it is stored for.
        rows: how many rows, superseded ones included.
        tokens, nbytes: of the documents.
        examples: some of the ids.
        missing: ids asked for that are not there.
        parts: of those, the ones that are there in chunks or for places of a prompt.
        done: whether it was done.
    """

    documents: int
    rows: int
    tokens: int
    nbytes: int
    examples: list[str]
    missing: list[str]
    parts: list[str]
    done: bool


def delete(
    keeper: StoreKeeper, scope: Scope, document_ids: Sequence[str], *, parts: bool = False, dry_run: bool = True
) -> Removal:
    """Take documents out of the catalog, in one atomic step.

    Args:
        keeper: of the store.
        scope: must name the namespace; may name a model and a codec.
        document_ids: those to delete.
        parts: also the chunks of a document that was too long (``id#0``) and its copies for places (``id@0``).
        dry_run: only say what would be done.

    Raises:
        ConfigError: no namespace.
        InputError: an id that cannot be one.
        StoreNotFoundError, StoreUnavailableError: nothing was deleted.
    """
    for document_id in document_ids:
        check_document_id(document_id)
    wanted = list(dict.fromkeys(document_ids))

    def meant(rows: Rows) -> Mask:
        return rows.of_ids([*wanted, *_parts_of(rows, wanted)] if parts else wanted)

    rows = keeper.catalog.read(one_namespace(scope))
    present = rows.take(rows.counting)
    found = set(present.table["document_id"].to_pylist())
    in_parts = {_whole(i) for i in _parts_of(present, wanted)}
    missing = [i for i in wanted if i not in found and not (parts and i in in_parts)]
    ids = sorted({*wanted, *_parts_of(rows, wanted)}) if parts else wanted
    removal = _remove(keeper, scope, rows, meant, ids, datetime.now(UTC), "delete", dry_run)
    return Removal(*removal, missing, [i for i in missing if i in in_parts], not dry_run)


def expire(keeper: StoreKeeper, scope: Scope, older_than: timedelta, *, dry_run: bool = True) -> Removal:
    """Take documents out of the catalog whose latest version was written longer than ``older_than`` ago.

    Raises like ``delete``, and ``ConfigError`` for a negative time.
    """
    if older_than < timedelta(0):
        raise ConfigError("a time to live cannot be negative.", param="older_than")
    rows = keeper.catalog.read(one_namespace(scope))
    removal = _remove(
        keeper, scope, rows, lambda r: np.ones(len(r), dtype=np.bool_), None, datetime.now(UTC) - older_than,
        "expire", dry_run,
    )  # fmt: skip
    return Removal(*removal, [], [], not dry_run)


def _remove(
    keeper: StoreKeeper,
    scope: Scope,
    rows: Rows,
    meant: Callable[[Rows], Mask],
    ids: list[str] | None,
    until: datetime,
    reason: str,
    dry_run: bool,
) -> tuple[int, int, int, int, list[str]]:
    latest = to_micros(until)
    if ids is not None:  # a writer's clock may be ahead, and an id is deleted whatever its time
        times = rows.table.filter(pa.array(meant(rows) & rows.sound))["created_at"].cast(pa.int64())
        latest = max(latest, pc.max(times).as_py() or 0)

    def going(rows: Rows) -> Mask:
        old = rows.table["created_at"].cast(pa.int64()).to_numpy() <= latest
        mask: Mask = meant(rows) & rows.sound & old
        return mask

    gone = going(rows)
    if gone.any() and not dry_run:
        # First, so that one who rebuilds the catalog from shards, which still name the documents, leaves them out.
        assert scope.namespace is not None
        record = Deleted(
            namespace=scope.namespace, ids=ids, fingerprint=scope.fingerprint, codec=scope.codec, until=latest
        )
        publish_record(keeper.storage, DELETED, record)

        def change(rows: Rows) -> Edit:
            return Edit(rows.table, ~going(rows), np.zeros(len(rows), dtype=np.bool_))

        rows, edit = keeper.catalog.rewrite(scope, change, reason=reason)
        gone = ~edit.keep
    counted = rows.table.filter(pa.array(gone & rows.counting))
    tokens, nbytes = (int(pc.sum(counted[n]).as_py() or 0) for n in ("tokens", "nbytes"))
    examples = counted["document_id"].slice(0, _SHOWN).to_pylist()
    return counted.num_rows, int(gone.sum()), tokens, nbytes, examples


def _whole(document_id: str) -> str:
    """The document that a chunk or a copy for a place is of; of any other id, itself."""
    match = _PART.fullmatch(document_id)
    return match[1] if match else document_id


def _parts_of(rows: Rows, wanted: Sequence[str]) -> list[str]:
    """Ids that are chunks of one of ``wanted``, or copies for places."""
    named = set(wanted)
    ids = pc.unique(rows.table["document_id"]).to_pylist()
    return [i for i in ids if ("#" in i or "@" in i) and i not in named and named & {_whole(i), i.rpartition("@")[0]}]
