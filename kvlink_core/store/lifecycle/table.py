"""The whole catalog for maintenance: all rows of all namespaces, and changing them in one atomic step."""

from __future__ import annotations

import json
import random
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema
from deltalake.exceptions import CommitFailedError, TableNotFoundError
from deltalake.transaction import AddAction, CommitProperties, RemoveAction, create_table_with_add_actions

from kvlink_core.errors import StoreNotFoundError, StoreUnavailableError
from kvlink_core.store.catalog import DIRECTORY, PARTITIONS, SCHEMA, fetch
from kvlink_core.store.columns import read_rows
from kvlink_core.store.lifecycle.rows import Mask, Part, Rows, make_rows
from kvlink_core.store.storage import Storage, unavailable

#: Rows of one catalog file at most: what a deletion rewrites, and a reader then reads again.
FILE_ROWS = 100_000

#: From so many small files in a partition on, they are merged when the catalog is tidied.
_MERGED_FROM = 8

#: How often a change is tried that others' changes keep overtaking.
_ATTEMPTS = 20

_FILE_COLUMNS = [n for n in SCHEMA.names if n not in PARTITIONS]


@dataclass(frozen=True, slots=True)
class CatalogFile:
    """A file of the table, relative to ``catalog/``."""

    path: str
    size: int
    rows: int
    namespace: str
    fingerprint: str


@dataclass(frozen=True, slots=True)
class Scope:
    """Which rows are meant; ``None`` is all."""

    namespace: str | None = None
    fingerprint: str | None = None
    codec: str | None = None

    def has(self, file: CatalogFile) -> bool:
        """Whether rows of ``file`` may be meant."""
        return self.namespace in (None, file.namespace) and self.fingerprint in (None, file.fingerprint)


#: All rows.
ALL = Scope()


@dataclass(frozen=True, slots=True)
class Edit:
    """A change of some rows: which of them stay, which of those differ, and all of them as they are to be."""

    table: pa.Table
    keep: Mask
    changed: Mask


class CatalogTable:
    """The Delta table at one moment. Not for several threads at once."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._url = f"{storage.delta_url}/{DIRECTORY}"
        self._delta: Any = None

    @property
    def version(self) -> int:
        """Of the table, as of the last ``refresh``."""
        return int(self._delta.version())

    def refresh(self) -> None:
        """Look at the newest version. Raises ``StoreNotFoundError`` or ``StoreUnavailableError``."""
        try:
            with unavailable(f"cannot read the catalog of {self._storage.url}"):
                if self._delta is None:
                    self._delta = DeltaTable(self._url, storage_options=self._storage.delta_options)
                else:
                    self._delta.update_incremental()
        except StoreUnavailableError as error:
            if isinstance(error.__cause__, TableNotFoundError):
                raise StoreNotFoundError(
                    f"the store {self._storage.url} has no catalog; `kvlink store rebuild` makes it from the shards."
                ) from error
            raise

    def files(self, scope: Scope = ALL) -> list[CatalogFile]:
        """The table's files that may hold rows of ``scope``."""
        actions = pa.table(self._delta.get_add_actions(flatten=True))
        names = ("path", "size_bytes", "num_records", "partition.namespace", "partition.fingerprint")
        columns = [actions[n].to_pylist() for n in names]
        files = [CatalogFile(p, s, r or 0, n, f) for p, s, r, n, f in zip(*columns, strict=True)]
        return sorted((f for f in files if scope.has(f)), key=lambda f: f.path)

    def read(self, scope: Scope = ALL) -> Rows:
        """All rows of ``scope`` in the newest version, superseded ones included.

        Raises ``StoreUnavailableError``, for a damaged file too: what it said cannot be known.
        """
        self.refresh()
        return self.read_files(self.files(scope), scope)

    def read_files(self, files: Sequence[CatalogFile], scope: Scope = ALL) -> Rows:
        """The rows of some files; ``Rows.file`` counts them from 0. Raises ``StoreUnavailableError``."""
        by_path = {f.path: i for i, f in enumerate(files)}
        parts: list[Part] = []
        for path, data in fetch_all(self._storage, list(by_path)):
            number = by_path[path]
            what = f"cannot read {DIRECTORY}/{path} of {self._storage.url} (`kvlink store rebuild` mends it)"
            with unavailable(what):
                table, total = read_rows(data, _FILE_COLUMNS), pq.read_metadata(pa.BufferReader(data)).num_rows
            file = files[number]
            parts.append(Part(file.namespace, file.fingerprint, number, table, total - table.num_rows))
        rows = make_rows(parts)
        return rows.take(rows.where(scope.codec))

    def rewrite(
        self, scope: Scope, change: Callable[[Rows], Edit], *, reason: str, tidy: bool = False
    ) -> tuple[Rows, Edit]:
        """Change rows in one atomic step, again and again until nobody else's change comes in between.

        Rows that are added meanwhile stay as they are. Rows of other codecs than ``scope`` has are not shown to
        ``change``. With ``tidy`` many small files become few. Returns what was changed, and how.

        Raises:
            StoreUnavailableError: nothing was changed; or a file that would have to be rewritten has damaged rows,
                which would be lost.
        """
        for attempt in range(_ATTEMPTS):
            self.refresh()
            files = self.files(scope)
            everything = self.read_files(files, ALL)
            shown = everything.where(scope.codec)
            rows = everything.take(shown)
            edit = change(rows)
            touched = set(np.unique(rows.file[~edit.keep | edit.changed]).tolist())
            if tidy:
                touched |= _small(files)
            if not touched:
                return rows, edit
            if lost := [files[n].path for n in sorted(touched) if everything.left_out.get(n)]:
                raise StoreUnavailableError(
                    f"{DIRECTORY}/{lost[0]} of {self._storage.url} has damaged rows, which would be lost; "
                    "run `kvlink store rebuild` first."
                )
            others = everything.take(~shown)
            kept = edit.table.filter(pa.array(edit.keep & np.isin(rows.file, list(touched))))
            kept = pa.concat_tables([kept, others.table.filter(pa.array(np.isin(others.file, list(touched))))])
            try:
                self.commit([files[n] for n in sorted(touched)], kept, reason)
                return rows, edit
            except CommitFailedError as error:
                if attempt + 1 == _ATTEMPTS:
                    raise StoreUnavailableError(
                        f"the catalog of {self._storage.url} is changed by others again and again; try later."
                    ) from error
                time.sleep(random.uniform(0, 0.05 * (attempt + 1)))
        raise AssertionError

    def commit(self, removed: Sequence[CatalogFile], added: pa.Table, reason: str) -> None:
        """Replace files by ones with the rows ``added``, if all of them are still there.

        Raises ``CommitFailedError`` if not, and ``StoreUnavailableError``; then nothing has changed.
        """
        now = round(1000 * time.time())
        actions: list[AddAction | RemoveAction] = list(self._publish(added, now))
        actions += [
            RemoveAction(f.path, True, now, f.size, {"namespace": f.namespace, "fingerprint": f.fingerprint})
            for f in removed
        ]
        try:
            with unavailable(f"cannot commit to the catalog of {self._storage.url}"):
                self._delta.create_write_transaction(
                    actions, "append", Schema.from_arrow(SCHEMA), PARTITIONS,
                    commit_properties=CommitProperties(custom_metadata={"kvlink": reason}),
                )  # fmt: skip
        except StoreUnavailableError as error:
            if isinstance(error.__cause__, CommitFailedError):
                raise error.__cause__ from error
            raise

    def create(self, added: pa.Table) -> None:
        """Make the table, with these rows from its first version on. Raises ``StoreUnavailableError``."""
        with unavailable(f"cannot make the catalog of {self._storage.url}"):
            create_table_with_add_actions(
                self._url, Schema.from_arrow(SCHEMA), list(self._publish(added, round(1000 * time.time()))),
                "error", PARTITIONS, storage_options=self._storage.delta_options,
            )  # fmt: skip
        self._delta = None

    def _publish(self, rows: pa.Table, now: int) -> Iterator[AddAction]:
        """Write rows to files that are not part of the table yet, sorted by id: a deletion then touches few."""
        partitions = rows.select(PARTITIONS).group_by(PARTITIONS).aggregate([]).to_pylist()
        for values in sorted(partitions, key=lambda p: (p["namespace"], p["fingerprint"])):
            mine = pc.and_(*(pc.equal(rows[n], values[n]) for n in PARTITIONS))
            part = rows.filter(mine).select(_FILE_COLUMNS).sort_by("document_id")
            folder = "/".join(f"{n}={values[n]}" for n in PARTITIONS)
            for start in range(0, part.num_rows, FILE_ROWS):
                piece = part.slice(start, FILE_ROWS)

                data = pa.BufferOutputStream()
                pq.write_table(piece, data, compression="zstd")
                content = data.getvalue()

                def write(file: IO[bytes], content: pa.Buffer = content) -> str:
                    file.write(content)
                    return f"part-{uuid.uuid4()}.parquet"

                path = f"{folder}/{self._storage.publish(f'{DIRECTORY}/{folder}', write)}"
                yield AddAction(path, content.size, values, now, True, json.dumps({"numRecords": piece.num_rows}))

    def vacuum(self, hours: int, *, dry_run: bool, full: bool = False) -> list[str]:
        """Remove files that left the table more than so many hours ago; returns their paths under ``catalog/``.

        With ``full`` also files as old that were never part of it, whoever wrote them.

        Raises ``StoreUnavailableError``.
        """
        with unavailable(f"cannot clean the catalog of {self._storage.url}"):
            return sorted(self._delta.vacuum(hours, dry_run=dry_run, enforce_retention_duration=False, full=full))

    def shards_of(self, paths: Sequence[str]) -> set[str]:
        """The shards that rows in catalog files name, superseded and damaged rows included.

        A file that is not part of the table may be missing or unreadable. Raises ``StoreUnavailableError`` for one
        that is.
        """
        known = {f.path for f in self.files()}
        found: set[str] = set()
        for path in paths:
            try:
                with unavailable(f"cannot read {DIRECTORY}/{path} of {self._storage.url}"):
                    data = self._storage.read(f"{DIRECTORY}/{path}")
                    found.update(pc.unique(read_rows(data, ["shard"])["shard"]).to_pylist())
            except (FileNotFoundError, StoreUnavailableError) as error:
                damaged = isinstance(error, FileNotFoundError) or isinstance(error.__cause__, pa.ArrowException)
                if path in known or not damaged:
                    raise StoreUnavailableError(f"cannot tell what {DIRECTORY}/{path} names: {error}") from error
        return found

    def strays(self) -> list[str]:
        """Paths under ``catalog/`` that look like the table's files, but are not part of its newest version."""
        known = {f.path for f in self.files()}
        found = (e.path.removeprefix(f"{DIRECTORY}/") for e in self._storage.entries(DIRECTORY))
        return [p for p in found if p not in known and is_catalog_file(p)]


def is_catalog_file(path: str) -> bool:
    """Whether a path under ``catalog/`` is one that this table's writers give."""
    parts = path.split("/")
    return (
        len(parts) == 3
        and all(part.startswith(f"{name}=") for part, name in zip(parts, PARTITIONS, strict=False))
        and parts[2].startswith("part-")
        and parts[2].endswith(".parquet")
    )


def fetch_all(storage: Storage, paths: Sequence[str]) -> Iterator[tuple[str, bytes]]:
    """``catalog.fetch``, with an error that names the remedy where a file is missing."""
    try:
        yield from fetch(storage, paths)
    except FileNotFoundError as error:
        raise StoreUnavailableError(
            f"the catalog of {storage.url} lacks a file: {error}. `kvlink store rebuild` mends it."
        ) from error


def _small(files: Sequence[CatalogFile]) -> set[int]:
    """The numbers of files to merge: small ones, where a partition has many."""
    found: dict[tuple[str, str], set[int]] = {}
    for number, file in enumerate(files):
        if file.rows < FILE_ROWS // 2:
            found.setdefault((file.namespace, file.fingerprint), set()).add(number)
    return {n for numbers in found.values() if len(numbers) >= _MERGED_FROM for n in numbers}
