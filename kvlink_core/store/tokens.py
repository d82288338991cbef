"""The token ids of a shard once more, beside it: what FORMAT.md section 3 says."""

from __future__ import annotations

from collections.abc import Sequence
from typing import IO

import pyarrow as pa
import pyarrow.parquet as pq

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import PayloadError
from kvlink_core.fingerprint import token_bytes, token_digest
from kvlink_core.store.buffers import tokens_of_bytes
from kvlink_core.store.manifest import check_shard_name
from kvlink_core.store.payload import corrupt
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import Storage
from kvlink_core.store.tables import check_table, read_table

DIRECTORY = "tokens"
_SCHEMA = pa.schema([("row_group", pa.int32()), ("token_ids", pa.large_binary())])


def write_tokens(file: IO[bytes], name: str, documents: Sequence[EncodedDocument]) -> str:
    """Write the token ids of the documents of the shard ``name``; returns that name."""
    tokens = [token_bytes(d.token_ids.tolist()) for d in documents]
    table = pa.table([pa.array(range(len(tokens)), pa.int32()), pa.array(tokens, pa.large_binary())], schema=_SCHEMA)
    pq.write_table(table, file, compression="NONE", use_dictionary=False, write_statistics=False)
    return name


def read_tokens(storage: Storage, row: CatalogRow) -> list[int] | None:
    """The token ids of ``row``, or ``None`` where there is no sound copy of them.

    Raises ``StoreUnavailableError`` when the store does not answer, which says nothing of the copy.
    """
    try:
        check_shard_name(row.shard)
        data = storage.read(f"{DIRECTORY}/{row.shard}")
        with corrupt(row.shard):
            table = read_table(data, ["token_ids"])
            copy = table["token_ids"][row.row_group].as_py()
            return tokens_of_bytes(copy).tolist() if token_digest(copy) == row.token_digest else None
    except (FileNotFoundError, PayloadError):
        return None


def read_copies(storage: Storage, shard: str) -> dict[int, str] | None:
    """The digest of each document's token ids in the copy beside ``shard``, by row group; ``None`` without a copy.

    A copy that cannot be read has no documents. Raises ``StoreUnavailableError`` when the store does not answer.
    """
    try:
        check_shard_name(shard)
        data = storage.read(f"{DIRECTORY}/{shard}")
    except (FileNotFoundError, PayloadError):
        return None
    try:
        with corrupt(shard):
            table = read_table(data, ["token_ids"])
            return {i: token_digest(ids) for i, ids in enumerate(table["token_ids"].to_pylist()) if ids is not None}
    except PayloadError:
        return {}


def is_tokens_file(storage: Storage, shard: str) -> bool:
    """Whether the copy of the token ids of ``shard`` is one by what it says of itself.

    Raises ``StoreUnavailableError`` when the store does not answer.
    """
    try:
        with corrupt(shard):
            data = storage.read(f"{DIRECTORY}/{shard}")
            check_table(data)
            schema = pq.read_schema(pa.BufferReader(data))
    except (FileNotFoundError, PayloadError):
        return False
    return bool(schema.remove_metadata().equals(_SCHEMA))
