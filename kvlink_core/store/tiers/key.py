"""What a cached document is known by."""

from __future__ import annotations

import hashlib
import json
from typing import NamedTuple

from kvlink_core.store.rows import CatalogRow

#: The codec in the key of a cache that was computed here: it is what the model made, as ``raw`` stores it.
COMPUTED = "raw"


class CacheKey(NamedTuple):
    """The key of DESIGN section 6, whole: no part is ever left out, shortened or hashed to look something up.

    Two caches with one key are interchangeable; a document id is not part of it, since ids are the catalog's.
    """

    namespace: str
    fingerprint: str
    token_digest: str
    codec: str

    @classmethod
    def of(cls, row: CatalogRow) -> CacheKey:
        """The key of the payload that ``row`` names."""
        return cls(row.namespace, row.fingerprint, row.token_digest, row.codec)

    def computed(self) -> CacheKey:
        """The key under which the same document is kept when it was computed here."""
        return self._replace(codec=COMPUTED)

    @property
    def digest(self) -> str:
        """SHA-256 of all four parts, in hexadecimal: fit for a file name."""
        return hashlib.sha256(json.dumps(list(self), separators=(",", ":")).encode()).hexdigest()
