"""A row of the catalog: which document is where."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import xxhash

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class CatalogRow:
    """One document id and the payload that it names.

    Attributes:
        document_id: the caller's name for the document.
        namespace, fingerprint, token_digest, codec: the payload's key.
        shard: file name under ``shards/``.
        row_group: the document's place in it.
        tokens: number of tokens.
        nbytes: bytes of K and V as stored.
        created_at: when it was written, UTC, in microseconds. The latest row of an id counts.
    """

    document_id: str
    namespace: str
    fingerprint: str
    token_digest: str
    codec: str
    shard: str
    row_group: int
    tokens: int
    nbytes: int
    created_at: datetime

    @property
    def order(self) -> tuple[datetime, str, str, int]:
        """Of several rows of one id the one with the greatest ``order`` counts."""
        return (self.created_at, self.token_digest, self.shard, self.row_group)

    def check(self) -> int:
        """The checksum over all fields that is stored with the row (FORMAT.md section 5)."""
        fields = [
            self.document_id, self.namespace, self.fingerprint, self.token_digest, self.codec, self.shard,
            self.row_group, self.tokens, self.nbytes, to_micros(self.created_at),
        ]  # fmt: skip
        digest = xxhash.xxh3_64_intdigest(json.dumps(fields, separators=(",", ":"), ensure_ascii=True).encode())
        return digest - 2**64 if digest >= 2**63 else digest


def to_micros(moment: datetime) -> int:
    """Microseconds since 1970, exactly."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


def from_micros(micros: int) -> datetime:
    """The reverse."""
    return _EPOCH + timedelta(microseconds=micros)
