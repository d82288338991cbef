"""The catalog: a Delta table of rows, and the part of it that this store looks up, in memory."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, TableNotFoundError

from kvlink_core.errors import StoreNotFoundError, StoreUnavailableError
from kvlink_core.store.columns import binary_of_hex, read_rows
from kvlink_core.store.freeing import release_free_memory
from kvlink_core.store.index import INDEX_SCHEMA, CatalogIndex
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import Storage, unavailable

__all__ = ["Catalog", "CatalogRow"]

DIRECTORY = "catalog"
PARTITIONS = ["namespace", "fingerprint"]

#: How often a commit is tried that others' removals keep overtaking.
_ATTEMPTS = 20

#: Catalog files fetched at a time.
_FETCHES = 8

#: After as many rows were read, memory that is free again is given back.
_MANY_ROWS = 2**16

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


def fetch(storage: Storage, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """Each catalog file and its content. Some are fetched ahead, since a bucket answers late, but few, to hold little.

    Raises ``FileNotFoundError`` or ``StoreUnavailableError``.
    """
    with ThreadPoolExecutor(_FETCHES, thread_name_prefix="kvlink-catalog") as pool:
        for start in range(0, len(paths), _FETCHES):
            batch = paths[start : start + _FETCHES]
            yield from zip(batch, pool.map(storage.read, [f"{DIRECTORY}/{path}" for path in batch]), strict=True)


class Catalog:
    """The rows of one namespace, fingerprint and codec. Safe to use from several threads, never across a fork."""

    def __init__(self, storage: Storage, namespace: str, fingerprint: str, codec: str) -> None:
        self._storage = storage
        self._url = f"{storage.delta_url}/{DIRECTORY}"
        self._namespace, self._fingerprint, self._codec = namespace, fingerprint, codec
        self._lock = threading.Lock()
        self._table: Any = None
        self._files: dict[str, int] = {}  # their numbers in the index
        self._numbered = 0
        self._index = CatalogIndex(namespace, fingerprint, codec)

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
                try:
                    return self._take_in(self._files_of_partition())
                except FileNotFoundError:  # a reader that slept may find files collected that were long replaced
                    self._table.update_incremental()
                    return self._take_in(self._files_of_partition())
        except (StoreUnavailableError, FileNotFoundError) as error:
            if isinstance(error.__cause__, TableNotFoundError):
                raise StoreNotFoundError(
                    f"the store {self._storage.url} has no catalog. `kvlink store rebuild` makes it from the shards, "
                    "or run precompute, which completes a new store."
                ) from error
            if isinstance(error, FileNotFoundError):
                raise StoreUnavailableError(
                    f"the catalog of {self._storage.url} lacks a file: {error}. `kvlink store rebuild` mends it."
                ) from error
            raise

    def _take_in(self, files: frozenset[str]) -> bool:
        """Make the index that of ``files``, reading those that are new. False when it is already."""
        if files == self._files.keys():
            return False
        added = sorted(files - self._files.keys())
        removed = self._files.keys() - files
        numbers = {path: self._numbered + i for i, path in enumerate(added)}
        tables = {numbers[path]: self._rows(data) for path, data in fetch(self._storage, added)}
        self._index.change(tables, [self._files[path] for path in removed])
        if sum(table.num_rows for table in tables.values()) >= _MANY_ROWS:
            del tables
            release_free_memory()
        self._files = {p: n for p, n in self._files.items() if p not in removed} | numbers
        self._numbered += len(added)
        return True

    def _files_of_partition(self) -> frozenset[str]:
        actions = pa.table(self._table.get_add_actions(flatten=True))
        wanted = pc.and_(
            pc.equal(actions["partition.namespace"], self._namespace),
            pc.equal(actions["partition.fingerprint"], self._fingerprint),
        )
        return frozenset(actions.filter(wanted)["path"].to_pylist())

    def _rows(self, data: bytes) -> pa.Table:
        table = read_rows(data, ["codec", *INDEX_SCHEMA.names])
        table = table.filter(pc.equal(table["codec"], self._codec))
        digests, sound = binary_of_hex(table["token_digest"])
        columns: Mapping[str, Any] = {
            "token_digest": digests,
            "shard": table["shard"].combine_chunks().dictionary_encode(),
            "created_at": table["created_at"].cast(pa.int64()),
        }
        # A digest that is none belongs to a damaged row, which would not pass its checksum either.
        return (
            pa.table({f.name: columns.get(f.name, table[f.name]) for f in INDEX_SCHEMA})
            .cast(INDEX_SCHEMA)
            .filter(sound)
        )

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
                for attempt in range(_ATTEMPTS):
                    try:
                        # To the table that was opened: at an address, a new one would be made where a store is gone.
                        write_deltalake(self._table, table, mode="append")
                        break
                    except CommitFailedError:  # rows were moved or removed meanwhile; nothing was committed
                        if attempt + 1 == _ATTEMPTS:
                            raise
                        self._table.update_incremental()
            self._refresh()
            return self.version
