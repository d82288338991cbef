"""The catalog in memory: compact columns and sorted hashes, so that a million documents cost about 150 bytes each."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import xxhash

from kvlink_core.store.rows import CatalogRow, from_micros

logger = logging.getLogger(__name__)

_UInts = npt.NDArray[np.uint64]

_PART = 2**13

#: Columns of the table that ``CatalogIndex.add`` takes. Namespace, fingerprint and codec are the index's own.
INDEX_SCHEMA = pa.schema(
    [
        ("document_id", pa.string()),
        ("token_digest", pa.binary(32)),
        ("shard", pa.dictionary(pa.int32(), pa.string())),
        ("row_group", pa.int32()),
        ("tokens", pa.int32()),
        ("nbytes", pa.int64()),
        ("created_at", pa.int64()),
        ("check", pa.int64()),
    ]
)


@dataclass(frozen=True, slots=True)
class _Sorted:
    """Hashes in order, and for each the position of its row."""

    hashes: _UInts
    positions: npt.NDArray[np.uint32]

    @classmethod
    def of(cls, hashes: _UInts) -> _Sorted:
        order = np.argsort(hashes, kind="stable").astype(np.uint32)
        return cls(hashes[order], order)

    def by_row(self) -> _UInts:
        """The hashes in the order of the rows."""
        hashes = np.empty_like(self.hashes)
        hashes[self.positions] = self.hashes
        return hashes

    def find(self, wanted: _UInts) -> Iterator[int]:
        """Positions of all rows with one of the hashes."""
        left = np.searchsorted(self.hashes, wanted, side="left")
        right = np.searchsorted(self.hashes, wanted, side="right")
        for begin, end in zip(left.tolist(), right.tolist(), strict=True):
            yield from self.positions[begin:end].tolist()


@dataclass(frozen=True, slots=True)
class _Segment:
    table: pa.Table  # INDEX_SCHEMA and the number of the file that each row is from
    by_id: _Sorted
    by_digest: _Sorted

    @classmethod
    def of(cls, table: pa.Table, id_hashes: _UInts | None = None) -> _Segment:
        table = table.unify_dictionaries().combine_chunks()
        if id_hashes is None:
            id_hashes = _hashes_of_column(table.column("document_id"))
        return cls(table, _Sorted.of(id_hashes), _Sorted.of(_prefixes_of_column(table.column("token_digest"))))

    def without(self, files: npt.NDArray[np.int32]) -> _Segment | None:
        """The segment less the rows of some files; itself when it has none of them, ``None`` when it has no others."""
        keep = ~np.isin(self.table.column("file").to_numpy(), files)
        if keep.all():
            return self
        return _Segment.of(self.table.filter(pa.array(keep)), self.by_id.by_row()[keep]) if keep.any() else None


class CatalogIndex:
    """Rows of one namespace, fingerprint and codec, found by document id or by token digest.

    Kept as a few sorted segments, each at least twice the next, merged as they grow: adding n rows one by one costs
    O(n log n). Not locked: a reader takes one snapshot of ``_segments``, and a writer (one at a time) swaps it.
    """

    def __init__(self, namespace: str, fingerprint: str, codec: str) -> None:
        self._key = (namespace, fingerprint, codec)
        self._segments: tuple[_Segment, ...] = ()

    @property
    def rows(self) -> int:
        """Number of rows, superseded ones included."""
        return sum(s.table.num_rows for s in self._segments)

    @property
    def nbytes(self) -> int:
        """Memory held, in bytes."""
        return sum(
            s.table.get_total_buffer_size() + sum(x.hashes.nbytes + x.positions.nbytes for x in (s.by_id, s.by_digest))
            for s in self._segments
        )

    def add(self, table: pa.Table) -> None:
        """Add rows, of ``INDEX_SCHEMA``."""
        self.change({0: table}, ())

    def change(self, added: Mapping[int, pa.Table], removed: Collection[int]) -> None:
        """Add the rows of files (by a number of the caller's choice) and drop those of others, in one step.

        So a reader never sees a row gone that only moved to another file. Tables are of ``INDEX_SCHEMA``.
        """
        segments = list(self._segments)
        if removed:
            gone = np.fromiter(removed, dtype=np.int32)
            segments = [kept for s in segments if (kept := s.without(gone)) is not None]
        numbered = [
            table.append_column("file", pa.array(np.full(table.num_rows, number, dtype=np.int32)))
            for number, table in added.items()
            if table.num_rows
        ]
        if numbered:
            newest = _Segment.of(pa.concat_tables(numbered))
            while segments and segments[-1].table.num_rows < 2 * newest.table.num_rows:
                older = segments.pop()
                hashes = np.concatenate([older.by_id.by_row(), newest.by_id.by_row()])
                newest = _Segment.of(pa.concat_tables([older.table, newest.table]), hashes)
            segments.append(newest)
        self._segments = tuple(segments)

    def by_id(self, document_ids: Iterable[str]) -> dict[str, CatalogRow]:
        """The row that counts of each id that is there."""
        wanted = list(dict.fromkeys(document_ids))
        found: dict[str, CatalogRow] = {}
        for segment in self._segments:
            for row in self._rows(segment, segment.by_id.find(_id_hashes(wanted))):
                if row.document_id not in found or found[row.document_id].order < row.order:
                    found[row.document_id] = row
        # The hash finds a superset: other ids may share it.
        return {i: found[i] for i in wanted if i in found}

    def by_digest(self, token_digests: Iterable[str]) -> dict[str, CatalogRow]:
        """For each token digest that is there, the newest row that counts of any id with it."""
        wanted = [d for d in dict.fromkeys(token_digests) if len(d) == 64]
        if not wanted:
            return {}
        prefixes = np.frombuffer(b"".join(bytes.fromhex(d)[:8] for d in wanted), dtype=np.uint64)
        candidates = [
            row for segment in self._segments for row in self._rows(segment, segment.by_digest.find(prefixes))
        ]
        living = self.by_id(row.document_id for row in candidates)
        best: dict[str, CatalogRow] = {}
        for row in living.values():
            if row.token_digest not in best or best[row.token_digest].order < row.order:
                best[row.token_digest] = row
        return {d: best[d] for d in wanted if d in best}

    def _rows(self, segment: _Segment, positions: Iterator[int]) -> Iterator[CatalogRow]:
        taken = list(positions)
        if not taken:
            return
        namespace, fingerprint, codec = self._key
        for item in segment.table.take(pa.array(taken, pa.int64())).to_pylist():
            row = CatalogRow(
                item["document_id"], namespace, fingerprint, item["token_digest"].hex(), codec, item["shard"],
                item["row_group"], item["tokens"], item["nbytes"], from_micros(item["created_at"]),
            )  # fmt: skip
            if row.check() == item["check"]:
                yield row
            else:
                logger.warning("catalog row of document %r does not match its checksum; ignored", row.document_id)


def _id_hashes(document_ids: Sequence[str]) -> _UInts:
    hashes = (xxhash.xxh3_64_intdigest(i.encode("utf-8", "surrogatepass")) for i in document_ids)
    return np.fromiter(hashes, dtype=np.uint64, count=len(document_ids))


def _hashes_of_column(column: pa.ChunkedArray) -> _UInts:
    """The same of a column of strings, a part at a time: as Python's objects they are several times as large."""
    hashes = np.empty(len(column), dtype=np.uint64)
    for start in range(0, len(column), _PART):
        part = column.slice(start, _PART).cast(pa.binary()).to_pylist()
        hashes[start : start + len(part)] = np.fromiter(map(xxhash.xxh3_64_intdigest, part), np.uint64, len(part))
    return hashes


def _prefixes_of_column(column: pa.ChunkedArray) -> _UInts:
    """The first eight bytes of each token digest, as a number."""
    parts = [
        np.frombuffer(c.buffers()[1], dtype=np.uint64).reshape(-1, 4)[c.offset : c.offset + len(c), 0]
        for c in column.chunks
    ]
    return np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
