"""Compaction: the documents of many small or half-dead shards, written again into few.

Nothing is removed here. New shards are published, then the catalog's rows move to them in one atomic step; the old
shards stay until they are collected, so that a reader who looked a document up before still finds it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.compress import EncodedDocument
from kvlink_core.errors import ConfigError, PayloadError
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper, silent
from kvlink_core.store.lifecycle.rows import Rows
from kvlink_core.store.lifecycle.table import ALL, Edit, Scope
from kvlink_core.store.manifest import TIMES_KEY, DocumentEntry, times_to_bytes
from kvlink_core.store.payload import Footer, check_asked
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.writing import publish_shard

#: Bytes of a shard that compaction writes, about.
DEFAULT_TARGET = 256 * 2**20

#: The share of a shard's documents that nothing names any more, from which it is worth writing the others again.
DEFAULT_DEAD = 0.5

#: Footers held at a time.
_FOOTERS = 64

_Place = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """Documents that stay where they are, since their payload cannot be read."""

    shard: str
    documents: list[str]
    reason: str


@dataclass(frozen=True, slots=True)
class Compaction:
    """What was written again, or would be.

    Attributes:
        before: shards whose living documents move.
        after: shards that they move to.
        documents: how many payloads move; ``nbytes``: their bytes.
        dead: payloads of the old shards that nothing names, left behind.
        failures: what could not be read.
        done: whether it was done.
    """

    before: int
    after: int
    documents: int
    nbytes: int
    dead: int
    failures: list[Failure]
    done: bool


@dataclass(frozen=True, slots=True)
class _Payload:
    """A payload and the rows that name it."""

    place: _Place
    rows: list[CatalogRow]
    nbytes: int


@dataclass(frozen=True, slots=True)
class _Source:
    """A shard, how many documents it has, and the payloads of it that are named."""

    shard: str
    documents: int
    payloads: list[_Payload]

    @property
    def nbytes(self) -> int:
        return sum(p.nbytes for p in self.payloads)

    @property
    def dead(self) -> int:
        return self.documents - len(self.payloads)


@dataclass(frozen=True, slots=True)
class _Batch:
    """What comes into one new shard."""

    sources: list[_Source]

    @property
    def payloads(self) -> list[_Payload]:
        return [p for s in self.sources for p in s.payloads]

    @property
    def nbytes(self) -> int:
        return sum(s.nbytes for s in self.sources)

    @property
    def gains(self) -> bool:
        """Whether it does more than to write one shard again as it is."""
        return len(self.sources) > 1 or any(s.dead for s in self.sources)


def compact(
    keeper: StoreKeeper,
    scope: Scope = ALL,
    *,
    target: int = DEFAULT_TARGET,
    dead: float = DEFAULT_DEAD,
    dry_run: bool = True,
    progress: Progress = silent,
) -> Compaction:
    """Write small shards (under half of ``target``) and those with many dead documents again, together.

    Values are checked and copied as they are stored, never decoded; a document keeps its ids and times. Doing it twice
    changes nothing the second time.

    Args:
        keeper: of the store.
        scope: what to compact. Documents of several namespaces, models or codecs never come into one shard.
        target: bytes of a new shard, about; also what is held in memory.
        dead: from which share of documents that nothing names a shard is written again however large it is; at 0
            every shard with any is: after the next collection, no byte of a deleted document is left.
        dry_run: only say what would be done.
        progress: is told of payloads.

    Raises:
        ConfigError: an impossible argument.
        StoreNotFoundError, StoreUnavailableError: what was not finished stays as it was.
    """
    if target < 1 or not 0 <= dead <= 1:
        raise ConfigError("a target has at least one byte, and a share of dead documents is between 0 and 1.")
    rows = keeper.catalog.read(scope)
    failures: list[Failure] = []
    batches = [
        batch
        for sources in _sources(keeper, rows, failures)
        for batch in _batches([s for s in sources if _worth_it(s, target, dead)], target)
    ]
    total = sum(len(b.payloads) for b in batches)
    after, moved, nbytes, done = len(batches), total, sum(b.nbytes for b in batches), 0
    if not dry_run:
        after = moved = nbytes = 0
        for batch in batches:
            written = _write(keeper, batch, failures)
            after, moved = after + bool(written), moved + len(written)
            nbytes += sum(p.nbytes for p in batch.payloads if p.place in written)
            done += len(batch.payloads)
            progress("compacting", done, total)
    return Compaction(
        before=sum(len(b.sources) for b in batches),
        after=after,
        documents=moved,
        nbytes=nbytes,
        dead=sum(s.dead for b in batches for s in b.sources),
        failures=failures,
        done=not dry_run,
    )


def _sources(keeper: StoreKeeper, rows: Rows, failures: list[Failure]) -> Iterator[list[_Source]]:
    """The named shards that could be one: of the same namespace, model, codec and shape; in order of name."""
    named: dict[str, dict[int, list[CatalogRow]]] = {}
    for row in rows.to_rows(np.flatnonzero(rows.counting)):
        named.setdefault(row.shard, {}).setdefault(row.row_group, []).append(row)
    groups: dict[str, list[_Source]] = {}
    shards = sorted(named)
    for start in range(0, len(shards), _FOOTERS):
        footers = keeper.reader.footers(shards[start : start + _FOOTERS])
        for shard, footer in sorted(footers.items()):
            payloads = [_Payload((shard, n), same, same[0].nbytes) for n, same in sorted(named[shard].items())]
            try:
                if isinstance(footer, PayloadError):
                    raise footer
                for row in (row for payload in payloads for row in payload.rows):
                    check_asked(footer, row)
            except PayloadError as error:
                failures.append(_failure(payloads, error))
                continue
            key = footer.manifest.model_dump_json(exclude={"documents"})
            groups.setdefault(key, []).append(_Source(shard, len(footer.manifest.documents), payloads))
    for _, sources in sorted(groups.items()):
        yield sources


def _worth_it(source: _Source, target: int, dead: float) -> bool:
    return source.nbytes < target / 2 or (source.dead > 0 and source.dead / source.documents >= dead)


def _batches(sources: Sequence[_Source], target: int) -> Iterator[_Batch]:
    open_batch = _Batch([])
    for source in sources:
        if open_batch.sources and open_batch.nbytes + source.nbytes > target:
            if open_batch.gains:
                yield open_batch
            open_batch = _Batch([])
        open_batch.sources.append(source)
    if open_batch.gains:
        yield open_batch


def _write(keeper: StoreKeeper, batch: _Batch, failures: list[Failure]) -> Mapping[_Place, _Place]:
    """Write payloads into one new shard and move their rows there; returns from where to where."""
    sound: list[tuple[_Payload, EncodedDocument]] = []
    read = keeper.reader.load_encoded([p.rows[0] for p in batch.payloads])
    for payload, document in zip(batch.payloads, read, strict=True):
        if isinstance(document, PayloadError):
            failures.append(_failure([payload], document))
        else:
            sound.append((payload, document))
    left = {payload.place[0] for payload, _ in sound}
    if not _Batch([s for s in batch.sources if s.shard in left]).gains:  # the others cannot be read
        return {}
    footers = {s: f for s, f in keeper.reader.footers(sorted(left)).items() if isinstance(f, Footer)}
    if footers.keys() != left:
        return {}  # gone or damaged since; the next time will tell
    first = footers[sound[0][0].place[0]]
    name = publish_shard(
        keeper.storage,
        first.manifest.model_copy(update={"documents": [_entry(footers, payload) for payload, _ in sound]}),
        first.fingerprint_json,
        first.codec,
        [document for _, document in sound],
        {TIMES_KEY: times_to_bytes([[r.created_at for r in payload.rows] for payload, _ in sound])},
    )
    moves = {payload.place: (name, group) for group, (payload, _) in enumerate(sound)}
    row = sound[0][0].rows[0]
    keeper.catalog.rewrite(
        Scope(row.namespace, row.fingerprint, row.codec), lambda rows: _move(rows, moves), reason="compact"
    )
    return moves


def _entry(footers: Mapping[str, Footer], payload: _Payload) -> DocumentEntry:
    entry = footers[payload.place[0]].manifest.documents[payload.place[1]]
    return entry.model_copy(update={"ids": [r.document_id for r in payload.rows]})


def _failure(payloads: Sequence[_Payload], error: PayloadError) -> Failure:
    return Failure(payloads[0].place[0], [r.document_id for p in payloads for r in p.rows], str(error))


def _move(rows: Rows, moves: Mapping[_Place, _Place]) -> Edit:
    """Rows, those that name a moved payload naming it where it is now. They keep their times, and so their order."""
    shards = pa.array(sorted({shard for shard, _ in moves}), pa.string())
    changed = np.zeros(len(rows), dtype=np.bool_)
    table = rows.table
    positions = np.flatnonzero(pc.is_in(table["shard"], value_set=shards).to_numpy() & rows.sound)
    edited = {
        int(position): replace(row, shard=moves[place][0], row_group=moves[place][1])
        for position, row in zip(positions, rows.to_rows(positions), strict=True)
        if (place := (row.shard, row.row_group)) in moves
    }
    changed[list(edited)] = True
    for column, values in (
        ("shard", pa.array([r.shard for r in edited.values()], pa.string())),
        ("row_group", pa.array([r.row_group for r in edited.values()], pa.int32())),
        ("check", pa.array([r.check() for r in edited.values()], pa.int64())),
    ):
        at = table.column_names.index(column)
        masked = pc.replace_with_mask(table.column(at), pa.array(changed), values)
        table = table.set_column(at, table.schema.field(at), masked)
    return Edit(table, np.ones(len(rows), dtype=np.bool_), changed)
