"""The catalog: a Delta table of rows, and the part of it that this store looks up, in memory."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError

from kvlink_core.errors import StoreNotFoundError, StoreUnavailableError
from kvlink_core.store.index import INDEX_SCHEMA, CatalogIndex
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import Storage, unavailable

__all__ = ["Catalog", "CatalogRow"]

DIRECTORY = "catalog"
PARTITIONS = ["namespace", "fingerprint"]
SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("namespace", pa.string()),
        ("fingerprint", pa.string()),
        ("token_digest", pa.string()),
        ("codec", pa.string()),
        ("shard", pa.string()),
        ("row_group", pa.int32()),
        ("tokens", pa.int32()),
        ("nbytes", pa.int64()),
        ("created_at", pa.timestamp("us", "UTC")),
        ("check", pa.int64()),
    ]
)


def create_catalog(storage: Storage) -> None:
    """Make the table unless it is there. Several may try at once. Raises ``StoreUnavailableError``."""
    options = storage.delta_options
    with unavailable(f"cannot make the catalog of {storage.url}"):
        url = f"{storage.delta_url}/{DIRECTORY}"
        if _exists(url, options):
            return
        try:
            DeltaTable.create(url, SCHEMA, mode="ignore", partition_by=PARTITIONS, storage_options=options)
        except Exception:  # of two that create at once one fails, and finds what the other made
            if not _exists(url, options):
                raise


def _exists(url: str, options: dict[str, str]) -> bool:
    # Not ``DeltaTable.is_deltatable``, which holds Python's lock while it waits for the network.
    try:
        DeltaTable(url, storage_options=options)
    except TableNotFoundError:
        return False
    return True


class Catalog:
    """The rows of one namespace, fingerprint and codec. Safe to use from several threads, never across a fork."""

    def __init__(self, storage: Storage, namespace: str, fingerprint: str, codec: str) -> None:
        self._storage = storage
        self._url = f"{storage.delta_url}/{DIRECTORY}"
        self._namespace, self._fingerprint, self._codec = namespace, fingerprint, codec
        self._lock = threading.Lock()
        self._table: Any = None
        self._files: frozenset[str] = frozenset()
        self._index = self._empty_index()

    def _empty_index(self) -> CatalogIndex:
        return CatalogIndex(self._namespace, self._fingerprint, self._codec)

    @property
    def index(self) -> CatalogIndex:
        """What is known as of the last refresh."""
        return self._index

    @property
    def version(self) -> int:
        """The table's version as of the last refresh."""
        return -1 if self._table is None else int(self._table.version())

    def refresh(self) -> bool:
        """Take in what was committed since; true when the rows of this store changed.

        Reads only new files. Raises ``StoreNotFoundError`` when there is no catalog, ``StoreUnavailableError`` when
        it cannot be read.
        """
        with self._lock:
            return self._refresh()

    def _refresh(self) -> bool:
        try:
            with unavailable(f"cannot read the catalog of {self._storage.url}"):
                if self._table is None:
                    self._table = DeltaTable(self._url, storage_options=self._storage.delta_options)
                else:
                    self._table.update_incremental()
                files = self._files_of_partition()
                if files == self._files:
                    return False
                # Files only vanish when the table was compacted or rows were deleted: then all is read anew.
                fresh = self._files <= files
                tables = [self._read(path) for path in sorted(files - self._files if fresh else files)]
        except (StoreUnavailableError, FileNotFoundError) as error:
            if isinstance(error.__cause__, TableNotFoundError):
                raise StoreNotFoundError(
                    f"the store {self._storage.url} has no catalog; run precompute, which completes it."
                ) from error
            if isinstance(error, FileNotFoundError):
                raise StoreUnavailableError(f"the catalog of {self._storage.url} lacks a file: {error}") from error
            raise
        index = self._index if fresh else self._empty_index()
        if tables:
            index.add(pa.concat_tables(tables))
        self._index, self._files = index, files
        return True

    def _files_of_partition(self) -> frozenset[str]:
        actions = pa.table(self._table.get_add_actions(flatten=True))
        wanted = pc.and_(
            pc.equal(actions["partition.namespace"], self._namespace),
            pc.equal(actions["partition.fingerprint"], self._fingerprint),
        )
        return frozenset(actions.filter(wanted)["path"].to_pylist())

    def _read(self, path: str) -> pa.Table:
        data = self._storage.read(f"{DIRECTORY}/{path}")
        columns = ["codec", *INDEX_SCHEMA.names]
        table = pq.read_table(pa.BufferReader(data), columns=columns, partitioning=None)
        table = table.filter(pc.equal(table["codec"], self._codec))
        digests = [bytes.fromhex(d) for d in table["token_digest"].to_pylist()]
        converted: Mapping[str, Any] = {
            "token_digest": pa.array(digests, pa.binary(32)),
            "shard": table["shard"].combine_chunks().dictionary_encode(),
            "created_at": table["created_at"].cast(pa.timestamp("us", "UTC")).cast(pa.int64()),
        }
        columns_of = {f.name: converted.get(f.name, table[f.name]) for f in INDEX_SCHEMA}
        return pa.table(columns_of).cast(INDEX_SCHEMA)

    def append(self, rows: Sequence[CatalogRow]) -> int:
        """Commit rows in one atomic step and take them in; the version returned includes them.

        Raises ``StoreUnavailableError``, and then none of them is visible.
        """
        data = {n: [getattr(r, n) for r in rows] for n in SCHEMA.names if n != "check"}
        table = pa.table({**data, "check": [r.check() for r in rows]}, schema=SCHEMA)
        with self._lock:
            if self._table is None:
                self._refresh()
            with unavailable(f"cannot commit to the catalog of {self._storage.url}"):
                # To the table that was opened, since writing to an address would make a new one where a store is gone.
                write_deltalake(self._table, table, mode="append")
            self._refresh()
            return self.version
