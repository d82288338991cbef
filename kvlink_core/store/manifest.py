"""The manifest of a shard: what FORMAT.md section 2 says, checked field by field when it is read."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from kvlink_core.compress import DTYPES, CacheShape
from kvlink_core.compress.codec import ParamValue
from kvlink_core.errors import ConfigError, PayloadCorruptError, PayloadForeignError
from kvlink_core.store.rows import from_micros, to_micros

#: Version of the shard's format that this code writes, and the greatest that it reads.
FORMAT_VERSION: Final = 1

FORMAT_KEY = b"kvlink.format"
MANIFEST_KEY = b"kvlink.manifest"
FINGERPRINT_KEY = b"kvlink.fingerprint"
TIMES_KEY = b"kvlink.times"
SALT_KEY = b"kvlink.salt"

NAMESPACE = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,63}")
_SHARD_NAME = re.compile(r"[0-9a-f]{64}\.parquet")

_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Checksum = Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
_Count = Annotated[int, Field(ge=1, le=2**31 - 1)]


_Times = TypeAdapter(list[list[int]], config=ConfigDict(strict=True))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class CodecEntry(_Strict):
    """The codec of all documents of the shard."""

    name: str
    params: dict[str, ParamValue]


class ColumnEntry(_Strict):
    """One column of one document: bytes of all its layers, and the checksum over them."""

    bytes: Annotated[int, Field(ge=0, le=2**62)]
    checksum: _Checksum


class DocumentEntry(_Strict):
    """One document, that is one row group."""

    ids: Annotated[list[str], Field(min_length=1)]
    token_digest: _Digest
    tokens: _Count
    params: dict[str, ParamValue]
    columns: dict[str, ColumnEntry]

    @property
    def nbytes(self) -> int:
        """Bytes of the codec's columns."""
        return sum(c.bytes for c in self.columns.values())


class Manifest(_Strict):
    """A shard's description of itself."""

    format: Literal[1]
    namespace: str
    fingerprint: _Digest
    codec: CodecEntry
    checksum: Literal["xxh3-128"]
    dtype: str
    layers: _Count
    kv_heads: _Count
    head_dim: _Count
    value_dim: _Count
    documents: Annotated[list[DocumentEntry], Field(min_length=1)]

    def to_bytes(self) -> bytes:
        """The JSON to be stored."""
        return self.model_dump_json().encode()

    def shape(self, document: DocumentEntry) -> CacheShape:
        """The shape of the cache that ``document`` decodes to."""
        return CacheShape(self.layers, self.kv_heads, document.tokens, self.head_dim, self.value_dim, self.dtype)


def parse_manifest(data: bytes, shard: str) -> Manifest:
    """Parse a stored manifest of the file ``shard``. Raises ``PayloadCorruptError``."""
    try:
        manifest = Manifest.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "manifest"
        raise PayloadCorruptError(f"shard {shard}: {where}: {first['msg']}") from error
    if manifest.dtype not in DTYPES or not NAMESPACE.fullmatch(manifest.namespace):
        raise PayloadCorruptError(f"shard {shard}: no such dtype or namespace in its manifest")
    return manifest


def times_to_bytes(times: Sequence[Sequence[datetime]]) -> bytes:
    """What ``kvlink.times`` is to hold: for each document when each of its ids was written."""
    return json.dumps([[to_micros(t) for t in of_document] for of_document in times], separators=(",", ":")).encode()


def parse_times(data: bytes, manifest: Manifest, shard: str) -> list[list[datetime]]:
    """The reverse, for the shard of that manifest. Raises ``PayloadCorruptError``."""
    try:
        found = _Times.validate_json(data)
        times = [[from_micros(t) for t in of_document] for of_document in found]
    except (ValidationError, OverflowError) as error:
        raise PayloadCorruptError(f"shard {shard}: kvlink.times is not what FORMAT.md says") from error
    if [len(t) for t in times] != [len(d.ids) for d in manifest.documents]:
        raise PayloadCorruptError(f"shard {shard}: kvlink.times does not fit its documents")
    return times


def shard_name(footer: bytes) -> str:
    """The file name of the shard with that footer (Parquet's FileMetaData)."""
    return hashlib.sha256(footer).hexdigest() + ".parquet"


def is_shard_name(name: str) -> bool:
    """Whether a file of that name may be a shard."""
    return _SHARD_NAME.fullmatch(name) is not None


def check_shard_name(shard: str) -> None:
    """Raise ``PayloadCorruptError`` unless ``shard`` is a name that this store would have given."""
    if not is_shard_name(shard):
        raise PayloadCorruptError(f"{shard[:100]!r} is not the name of a shard")


def check_namespace(namespace: str) -> None:
    """Raise ``ConfigError`` unless ``namespace`` is one that FORMAT.md allows."""
    if not NAMESPACE.fullmatch(namespace):
        raise ConfigError(
            f"namespace {namespace[:100]!r} is not 1 to 64 of A-Z a-z 0-9 . _ - (and no leading dot).",
            param="namespace",
        )


def check_belongs(what: str, pairs: dict[str, tuple[str, str]]) -> None:
    """Raise ``PayloadForeignError`` unless in every pair ``(found, asked for)`` both are equal."""
    for name, (found, asked) in pairs.items():
        if found != asked:
            raise PayloadForeignError(f"{what} has {name} {found[:80]!r}, not {asked[:80]!r}")
