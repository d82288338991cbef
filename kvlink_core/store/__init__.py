"""Document caches on disk or in a bucket: what FORMAT.md in this directory describes."""

from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.store import DocumentStore

__all__ = ["CatalogRow", "DocumentStore"]
