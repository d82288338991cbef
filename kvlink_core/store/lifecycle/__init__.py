"""Looking after a store: what FORMAT.md section 7 describes, as functions of an open ``StoreKeeper``."""

from kvlink_core.store.lifecycle.collect import DEFAULT_GRACE, Collection, collect
from kvlink_core.store.lifecycle.compact import DEFAULT_DEAD, DEFAULT_TARGET, Compaction, compact
from kvlink_core.store.lifecycle.delete import Removal, delete, expire
from kvlink_core.store.lifecycle.documents import (
    DocumentInfo,
    Listing,
    ShardInfo,
    inspect_document,
    inspect_shard,
    list_documents,
)
from kvlink_core.store.lifecycle.export import Export, export
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper
from kvlink_core.store.lifecycle.rebuild import Rebuilding, rebuild
from kvlink_core.store.lifecycle.stats import Stats, stats
from kvlink_core.store.lifecycle.table import ALL, Scope
from kvlink_core.store.lifecycle.verify import Problem, Verification, verify

__all__ = [
    "ALL",
    "DEFAULT_DEAD",
    "DEFAULT_GRACE",
    "DEFAULT_TARGET",
    "Collection",
    "Compaction",
    "DocumentInfo",
    "Export",
    "Listing",
    "Problem",
    "Progress",
    "Rebuilding",
    "Removal",
    "Scope",
    "ShardInfo",
    "Stats",
    "StoreKeeper",
    "Verification",
    "collect",
    "compact",
    "delete",
    "expire",
    "export",
    "inspect_document",
    "inspect_shard",
    "list_documents",
    "rebuild",
    "stats",
    "verify",
]
