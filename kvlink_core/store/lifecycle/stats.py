"""How much of what a store holds: by namespace, model, codec and age."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import layout
from kvlink_core.store.lifecycle.keeper import StoreKeeper
from kvlink_core.store.lifecycle.rows import Rows
from kvlink_core.store.lifecycle.table import ALL, Scope
from kvlink_core.store.manifest import is_shard_name

#: Ages that documents are counted by, each up to the given one.
AGES: Mapping[str, timedelta] = {
    "under an hour": timedelta(hours=1),
    "under a day": timedelta(days=1),
    "under a week": timedelta(days=7),
    "under 30 days": timedelta(days=30),
    "under 90 days": timedelta(days=90),
    "older": timedelta.max,
}


@dataclass(frozen=True, slots=True)
class Amount:
    """Documents (each id counts), distinct payloads, their tokens and bytes, and the shards that they are in."""

    documents: int
    payloads: int
    tokens: int
    nbytes: int
    shards: int


@dataclass(frozen=True, slots=True)
class Group:
    """What is stored in one namespace for one model with one codec."""

    namespace: str
    fingerprint: str
    codec: str
    amount: Amount


@dataclass(frozen=True, slots=True)
class Files:
    """What lies in the store's directory, whoever it is of.

    Attributes:
        shards, nbytes: all shards and their bytes.
        unnamed, unnamed_nbytes: of those, the ones that no row of the catalog names: not yet, or no longer.
        catalog_version, catalog_files, catalog_nbytes: of the Delta table.
    """

    shards: int
    nbytes: int
    unnamed: int
    unnamed_nbytes: int
    catalog_version: int
    catalog_files: int
    catalog_nbytes: int


@dataclass(frozen=True, slots=True)
class Stats:
    """See the functions that make them up.

    Attributes:
        total: of everything in the scope.
        groups: by namespace, fingerprint and codec.
        ages: by time since the document was written.
        superseded: rows that no longer count.
        damaged: rows that cannot be read.
        fingerprints: the fields behind each digest, ``None`` where they are lost.
        files: only for the scope of all.
    """

    total: Amount
    groups: list[Group]
    ages: dict[str, Amount]
    superseded: int
    damaged: int
    fingerprints: dict[str, Fingerprint | None]
    files: Files | None


def stats(keeper: StoreKeeper, scope: Scope = ALL) -> Stats:
    """Count what is in ``scope``; reads the catalog, and lists files where the scope is all.

    Raises ``StoreNotFoundError`` or ``StoreUnavailableError``.
    """
    rows = keeper.catalog.read(scope)
    counting = rows.take(rows.counting)
    keys = ["namespace", "fingerprint", "codec"]
    names = [tuple(g[k] for k in keys) for g in counting.table.group_by(keys).aggregate([]).to_pylist()]
    groups = [
        Group(n, f, c, _amount(counting.take(counting.where(c, namespace=n, fingerprint=f))))
        for n, f, c in sorted(names)
    ]
    return Stats(
        total=_amount(counting),
        groups=groups,
        ages=_ages(counting),
        superseded=int((rows.sound & ~rows.counting).sum()),
        damaged=int((~rows.sound).sum()) + sum(rows.left_out.values()),
        fingerprints={d: layout.read_fingerprint(keeper.storage, d) for d in sorted({g.fingerprint for g in groups})},
        files=_files(keeper, rows) if scope == ALL else None,
    )


def _amount(rows: Rows) -> Amount:
    payloads = rows.table.group_by(["shard", "row_group"]).aggregate([("tokens", "min"), ("nbytes", "min")])
    return Amount(
        documents=len(rows),
        payloads=payloads.num_rows,
        tokens=pc.sum(payloads["tokens_min"]).as_py() or 0,
        nbytes=pc.sum(payloads["nbytes_min"]).as_py() or 0,
        shards=pc.count_distinct(rows.table["shard"]).as_py(),
    )


def _ages(rows: Rows) -> dict[str, Amount]:
    micros = rows.table["created_at"].cast(pa.int64()).to_numpy()
    ages = datetime.now(UTC).timestamp() - micros / 1e6
    found: dict[str, Amount] = {}
    below = np.zeros(len(rows), dtype=np.bool_)
    for name, limit in AGES.items():
        here = (ages < limit.total_seconds()) & ~below
        below |= here
        found[name] = _amount(rows.take(here))
    return found


def _files(keeper: StoreKeeper, rows: Rows) -> Files:
    named = set(rows.table["shard"].to_pylist())
    shards = {e.path.removeprefix("shards/"): e.size for e in keeper.storage.entries("shards")}
    shards = {name: size for name, size in shards.items() if is_shard_name(name)}
    unnamed = [size for name, size in shards.items() if name not in named]
    files = keeper.catalog.files()
    return Files(
        shards=len(shards),
        nbytes=sum(shards.values()),
        unnamed=len(unnamed),
        unnamed_nbytes=sum(unnamed),
        catalog_version=keeper.catalog.version,
        catalog_files=len(files),
        catalog_nbytes=sum(f.size for f in files),
    )
