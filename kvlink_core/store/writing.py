"""Publishing a shard: its token ids first, then itself, never under a name that is just being removed."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import IO

from kvlink_core.compress import Codec, EncodedDocument
from kvlink_core.store.manifest import SALT_KEY, Manifest
from kvlink_core.store.payload import write_payload
from kvlink_core.store.records import being_collected
from kvlink_core.store.storage import Storage
from kvlink_core.store.tokens import write_tokens


def publish_shard(
    storage: Storage,
    manifest: Manifest,
    fingerprint_json: str,
    codec: Codec,
    documents: Sequence[EncodedDocument],
    extra: Mapping[bytes, bytes] | None = None,
) -> str:
    """Write the shard of ``manifest`` and return its name; nothing names it yet.

    Args:
        storage: of the store.
        manifest: describes ``documents``, in their order.
        fingerprint_json: the canonical JSON behind the manifest's fingerprint.
        codec: the manifest's.
        documents: as the codec encoded them.
        extra: further key-value metadata.

    Raises:
        CorpusError: a document too large for Parquet.
        StoreUnavailableError: it cannot be written.
    """
    metadata = dict(extra or {})

    def write(file: IO[bytes]) -> str:
        name = write_payload(file, manifest.to_bytes(), fingerprint_json, codec, documents, metadata)
        storage.publish("tokens", lambda copy: write_tokens(copy, name, documents))
        return name

    name = storage.publish("shards", write)
    # Looked for after publishing: a collector that begins later sees that the shard is new (FORMAT.md section 7).
    while name in being_collected(storage):
        metadata[SALT_KEY] = uuid.uuid4().hex.encode()
        name = storage.publish("shards", write)
    return name
