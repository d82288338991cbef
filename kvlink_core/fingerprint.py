"""What a cache depends on, hashed: two caches with one fingerprint and the same token ids are interchangeable.

The fingerprint is made of named fields, so that a mismatch can say *what* differs instead of showing two hashes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields

import numpy as np

#: Raised when the meaning of stored keys or values changes (DESIGN: keys unrotated, values as they are).
CACHE_FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """All that changes the values of a document cache.

    Attributes:
        model: architecture and shape, for people, and a digest of the whole configuration (not a path).
        weights: SHA-256 over the weights, ``random:<seed>`` for random ones.
        adapter: digest of an adapter, or "".
        tokenizer: SHA-256 of the tokenizer's definition.
        rope: the RoPE configuration, as canonical JSON.
        dtype: dtype of K and V, e.g. ``float32``.
        template: the document template, as canonical JSON.
        wrap: digest of soft-wrap embeddings, or "".
        format: version of the meaning of the values.
    """

    model: str
    weights: str
    tokenizer: str
    rope: str
    dtype: str
    template: str
    adapter: str = ""
    wrap: str = ""
    format: int = CACHE_FORMAT_VERSION

    @property
    def digest(self) -> str:
        """SHA-256 of the canonical JSON of all fields, as 64 hexadecimal digits."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no spaces."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"), ensure_ascii=True)

    @classmethod
    def from_mapping(cls, data: Mapping[str, object]) -> Fingerprint:
        """Rebuild from parsed JSON; unknown or missing fields raise ``ValueError``."""
        names = {f.name for f in fields(cls)}
        if set(data) != names:
            odd = sorted(set(data) ^ names)
            raise ValueError(f"not a fingerprint of this version: fields {odd} do not match")
        return cls(**data)  # type: ignore[arg-type]  # the field names are checked, the values are hashed as they are

    def difference(self, other: Fingerprint) -> dict[str, tuple[object, object]]:
        """The fields in which ``self`` and ``other`` differ, as ``{name: (self's, other's)}``."""
        mine, theirs = asdict(self), asdict(other)
        return {k: (mine[k], theirs[k]) for k in mine if mine[k] != theirs[k]}


def token_bytes(token_ids: Sequence[int]) -> bytes:
    """Token ids as they are stored and hashed: little-endian uint32."""
    ids = np.asarray(token_ids, dtype=np.int64)
    assert not ids.size or (ids.min() >= 0 and ids.max() < 2**32), "token ids beyond 32 bits"
    return ids.astype("<u4").tobytes()


def digest_of_tokens(token_ids: Sequence[int]) -> str:
    """The token digest of a document of these token ids, as 64 hexadecimal digits."""
    return token_digest(token_bytes(token_ids))


def token_digest(token_ids: bytes) -> str:
    """Hash of a document's token ids (little-endian uint32 bytes), as 64 hexadecimal digits."""
    return hashlib.sha256(token_ids).hexdigest()
