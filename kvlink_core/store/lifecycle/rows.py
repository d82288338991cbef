"""Many catalog rows at once, as columns: which are sound, which count, which are meant."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import xxhash

from kvlink_core.store.catalog import SCHEMA
from kvlink_core.store.rows import CatalogRow, from_micros

Mask = npt.NDArray[np.bool_]

_KEY = ("namespace", "fingerprint", "codec", "document_id")
_PART = 2**14


@dataclass(frozen=True, slots=True)
class Part:
    """The rows of one catalog file, and how many of it could not be read."""

    namespace: str
    fingerprint: str
    number: int
    table: pa.Table
    left_out: int = 0


@dataclass(frozen=True)
class Rows:
    """Catalog rows.

    Attributes:
        table: of the catalog's schema.
        file: int32 ``[rows]``, the number of the file that each is from.
        left_out: by file number, how many rows could not be read; files without such are not named.
    """

    table: pa.Table
    file: npt.NDArray[np.int32]
    left_out: Mapping[int, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.table.num_rows)

    @cached_property
    def sound(self) -> Mask:
        """Which rows match their checksum; the others are to be ignored."""
        matching: Mask = self.check_values() == self.table["check"].to_numpy()
        return matching

    def check_values(self) -> npt.NDArray[np.int64]:
        """What ``check`` must be of each row."""
        found = np.empty(len(self), dtype=np.uint64)
        names = [n for n in SCHEMA.names if n not in ("check", "created_at")]
        at = 0
        for batch in self.table.to_batches(max_chunksize=_PART):
            columns = [batch.column(n).to_pylist() for n in names]
            micros = batch.column("created_at").cast(pa.int64()).to_pylist()
            for fields in zip(*columns, micros, strict=True):
                # As ``CatalogRow.check``, which a test holds it against; without the row, in a third of the time.
                text = json.dumps(fields, separators=(",", ":"))
                found[at] = xxhash.xxh3_64_intdigest(text.encode())
                at += 1
        return found.view(np.int64)

    @cached_property
    def counting(self) -> Mask:
        """Which rows count: of each id (within namespace, fingerprint and codec) the sound one of greatest order."""
        mask = np.zeros(len(self), dtype=np.bool_)
        sound = np.flatnonzero(self.sound)
        if not sound.size:
            return mask
        keys = np.zeros(len(self), dtype=np.int64)
        for name in _KEY:
            codes = _codes(self.table[name])
            _, keys = np.unique(keys * (int(codes.max(initial=0)) + 1) + codes, return_inverse=True)
        times = self.table["created_at"].cast(pa.int64()).to_numpy()
        order = sound[np.lexsort((times[sound], keys[sound]))]
        last = np.append(keys[order][1:] != keys[order][:-1], True)
        tied = np.flatnonzero(~last & np.append((times[order][1:] == times[order][:-1]), False))
        best = order[last]
        if tied.size:  # rare: then, and only then, are the other columns compared
            contested = np.isin(keys[order], keys[order[tied]])
            best = np.concatenate([best[~np.isin(keys[best], keys[order[tied]])], self._best_of(order[contested])])
        mask[best] = True
        return mask

    def _best_of(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        best: dict[tuple[str, str, str, str], tuple[CatalogRow, int]] = {}
        for position, row in zip(positions.tolist(), self.to_rows(positions), strict=True):
            key = (row.namespace, row.fingerprint, row.codec, row.document_id)
            if key not in best or best[key][0].order < row.order:
                best[key] = (row, position)
        return np.array([position for _, position in best.values()], dtype=np.int64)

    def where(self, codec: str | None = None, *, namespace: str | None = None, fingerprint: str | None = None) -> Mask:
        """Which rows have these values; ``None`` is any."""
        mask = np.ones(len(self), dtype=np.bool_)
        for name, value in (("codec", codec), ("namespace", namespace), ("fingerprint", fingerprint)):
            if value is not None:
                mask &= pc.equal(self.table[name], value).to_numpy()
        return mask

    def of_ids(self, document_ids: Sequence[str]) -> Mask:
        """Which rows are of one of these ids."""
        wanted = pa.array(document_ids, pa.string())
        return np.asarray(pc.is_in(self.table["document_id"], value_set=wanted).to_numpy(zero_copy_only=False))

    def take(self, mask: Mask) -> Rows:
        """Those rows alone."""
        if mask.all():
            return self
        return Rows(self.table.filter(pa.array(mask)), self.file[mask], self.left_out)

    def to_rows(self, positions: npt.NDArray[np.int64] | None = None) -> Iterator[CatalogRow]:
        """Rows as objects, all or those at ``positions``."""
        table = self.table if positions is None else self.table.take(pa.array(positions))
        times = table["created_at"].cast(pa.int64())
        table = table.set_column(table.column_names.index("created_at"), "created_at", times)
        for batch in table.drop_columns("check").to_batches(max_chunksize=_PART):
            for values in batch.to_pylist():
                yield CatalogRow(**{**values, "created_at": from_micros(values["created_at"])})


def make_rows(parts: Sequence[Part]) -> Rows:
    """The rows of several files. Their tables have the catalog's columns, but for those of the partition."""
    tables = [
        pa.table(
            {
                **{n: part.table[n] for n in part.table.column_names},
                "namespace": _repeated(part.namespace, part.table.num_rows),
                "fingerprint": _repeated(part.fingerprint, part.table.num_rows),
            }
        )
        .select(SCHEMA.names)
        .cast(SCHEMA)
        for part in parts
    ]
    files = [np.full(p.table.num_rows, p.number, dtype=np.int32) for p in parts]
    return Rows(
        pa.concat_tables(tables) if tables else SCHEMA.empty_table(),
        np.concatenate(files) if files else np.empty(0, dtype=np.int32),
        {p.number: p.left_out for p in parts if p.left_out},
    )


def table_of(rows: Sequence[CatalogRow]) -> pa.Table:
    """Rows as a table of the catalog's schema, with their checksums."""
    data = {n: [getattr(r, n) for r in rows] for n in SCHEMA.names if n != "check"}
    return pa.table({**data, "check": [r.check() for r in rows]}, schema=SCHEMA)


def _codes(column: pa.ChunkedArray) -> npt.NDArray[np.int64]:
    """A number for each value, equal where values are."""
    encoded = column.combine_chunks().dictionary_encode()
    chunks = encoded.chunks if isinstance(encoded, pa.ChunkedArray) else [encoded]
    return np.concatenate([c.indices.to_numpy().astype(np.int64) for c in chunks] or [np.empty(0, dtype=np.int64)])


def _repeated(value: str, count: int) -> pa.Array:
    return pa.repeat(pa.scalar(value, pa.string()), count)
