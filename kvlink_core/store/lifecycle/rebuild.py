"""Making the catalog again from what the shards say of themselves."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime

import numpy as np
from deltalake.exceptions import CommitFailedError

from kvlink_core.compress import codec_spec
from kvlink_core.errors import PayloadError, StoreNotFoundError, StoreUnavailableError
from kvlink_core.store.catalog import DIRECTORY, create_catalog
from kvlink_core.store.layout import add_fingerprint_json
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper, silent
from kvlink_core.store.lifecycle.rows import table_of
from kvlink_core.store.lifecycle.table import CatalogFile
from kvlink_core.store.manifest import TIMES_KEY, is_shard_name, parse_times
from kvlink_core.store.payload import Footer, locate
from kvlink_core.store.records import Deletions, being_collected, read_deleted
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import Entry

#: Shards whose footers are read at a time.
_FOOTERS = 64

#: How often it is tried while others change the catalog or collect, and the pause in between, in seconds.
_ATTEMPTS, _PAUSE_S = 60, 1.0


@dataclass(frozen=True, slots=True)
class Rebuilding:
    """What the new catalog holds, or would.

    Attributes:
        documents: rows of the new catalog.
        kept: of those, the ones that the present catalog has too.
        added: of those, the ones that only shards know.
        lost: ids of documents that the present catalog has, and no shard.
        damaged_rows: rows of the present catalog that could not be read.
        shards: shards read.
        failures: shards that could not be, and why.
        catalog: ``sound``, ``missing``, or why it could not be read.
        moved: where an unreadable catalog's log was put, or "".
        done: whether it was done.
    """

    documents: int
    kept: int
    added: int
    lost: list[str]
    damaged_rows: int
    shards: int
    failures: dict[str, str]
    catalog: str
    moved: str
    done: bool


@dataclass
class _Present:
    """What the present catalog says, as far as it can be read."""

    state: str
    files: list[CatalogFile] = field(default_factory=list)
    rows: list[CatalogRow] = field(default_factory=list)
    damaged: int = 0


@dataclass
class _Found:
    """What the shards say."""

    rows: list[CatalogRow] = field(default_factory=list)
    places: dict[tuple[str, int], str] = field(default_factory=dict)  # the token digest of each row group
    fingerprints: dict[str, str] = field(default_factory=dict)
    shards: int = 0
    failures: dict[str, str] = field(default_factory=dict)


def rebuild(
    keeper: StoreKeeper, *, from_shards: bool = False, dry_run: bool = True, progress: Progress = silent
) -> Rebuilding:
    """Make the catalog again, in one atomic step.

    What the present catalog says soundly of documents that are there is kept. What only shards know is added, but for
    what was deleted. Of several shards with one document the latest written counts.

    Beside readers and writers this is safe while the catalog can be opened. One that cannot is put aside and a new one
    begun: whoever had it open must be started anew.

    Args:
        keeper: of the store.
        from_shards: do not believe the present catalog in anything.
        dry_run: only say what the new catalog would hold.
        progress: is told of shards.

    Raises:
        StoreUnavailableError: a record of deletions is damaged, or the store does not answer; nothing was changed.
    """
    for _ in range(_ATTEMPTS):
        present = _read_present(keeper)
        found = _read_shards(keeper, progress)
        rows = _merge(keeper, [] if from_shards else present.rows, found)
        known = {_key(r): r.document_id for r in present.rows}
        keys = {_key(r) for r in rows}
        moved = ""
        if not dry_run and not (present.state == "sound" and set(rows) == set(present.rows) and not present.damaged):
            for text in found.fingerprints.values():
                add_fingerprint_json(keeper.storage, text)
            try:
                moved = _replace(keeper, present, rows)
            except CommitFailedError:
                continue
            if being_collected(keeper.storage) & {r.shard for r in rows}:
                time.sleep(_PAUSE_S)  # a collector may not have seen the new rows: look again once it is done
                continue
        kept = len(keys & known.keys())
        return Rebuilding(
            documents=len(rows),
            kept=kept,
            added=len(rows) - kept,
            lost=sorted({known[k] for k in known.keys() - keys}),
            damaged_rows=present.damaged,
            shards=found.shards,
            failures=found.failures,
            catalog=present.state,
            moved=moved,
            done=not dry_run,
        )
    raise StoreUnavailableError(
        f"the store {keeper.url} is changed or collected by others all the time; try later. Its catalog is whole."
    )


def _read_present(keeper: StoreKeeper) -> _Present:
    try:
        files = _files(keeper)
    except StoreNotFoundError:
        return _Present("missing")
    except StoreUnavailableError as error:
        return _Present(str(error))
    present = _Present("sound", files)
    for file in files:
        try:
            rows = keeper.catalog.read_files([file])
        except StoreUnavailableError:
            present.damaged += file.rows
            present.state = "some of its files are missing or damaged"
            continue
        present.damaged += int((~rows.sound).sum()) + sum(rows.left_out.values())
        present.rows += rows.to_rows(np.flatnonzero(rows.sound))
    return present


def _files(keeper: StoreKeeper) -> list[CatalogFile]:
    """The catalog's files. A catalog that cannot be opened is tried again: it may have been the network."""
    try:
        keeper.catalog.refresh()
    except StoreNotFoundError:
        raise
    except StoreUnavailableError:
        time.sleep(_PAUSE_S)
        keeper.storage.entries(f"{DIRECTORY}/_delta_log")  # one that does not answer says so here
        keeper.catalog.refresh()
    return keeper.catalog.files()


def _read_shards(keeper: StoreKeeper, progress: Progress) -> _Found:
    found = _Found()
    entries = {
        e.path.removeprefix("shards/"): e
        for e in keeper.storage.entries("shards")
        if is_shard_name(e.path.removeprefix("shards/"))
    }
    names = sorted(entries)
    for start in range(0, len(names), _FOOTERS):
        batch = names[start : start + _FOOTERS]
        for name, footer in keeper.reader.footers(batch).items():
            try:
                if isinstance(footer, PayloadError):
                    raise footer
                found.rows += _rows_of(footer, entries[name], found)
            except PayloadError as error:
                found.failures[name] = str(error)
        progress("reading shards", start + len(batch), len(names))
    found.shards = len(names) - len(found.failures)
    return found


def _rows_of(footer: Footer, entry: Entry, found: _Found) -> Iterator[CatalogRow]:
    manifest = footer.manifest
    written = datetime.fromtimestamp(entry.modified, UTC)
    stated = (footer.metadata.metadata or {}).get(TIMES_KEY)
    times = [[written] * len(d.ids) for d in manifest.documents]
    if stated is not None:
        times = parse_times(stated, manifest, footer.shard)
    for group in range(len(manifest.documents)):
        locate(footer, group)
    found.fingerprints[manifest.fingerprint] = footer.fingerprint_json
    for group, document in enumerate(manifest.documents):
        found.places[footer.shard, group] = document.token_digest
        for document_id, created_at in zip(document.ids, times[group], strict=True):
            yield CatalogRow(
                document_id, manifest.namespace, manifest.fingerprint, document.token_digest, codec_spec(footer.codec),
                footer.shard, group, document.tokens, document.nbytes, created_at,
            )  # fmt: skip


def _merge(keeper: StoreKeeper, present: Sequence[CatalogRow], found: _Found) -> list[CatalogRow]:
    """The rows of the new catalog: the present ones whose document is still to be had, and what only shards know."""

    def there(row: CatalogRow) -> bool:
        # A damaged shard's documents can be computed again from the copy of their token ids.
        return found.places.get((row.shard, row.row_group)) == row.token_digest or _has_copy(keeper, row)

    deleted = Deletions(read_deleted(keeper.storage))
    rows = _latest([r for r in found.rows if not deleted.cover(r)])
    rows |= {key: row for key, row in _latest(present).items() if there(row)}
    return sorted(rows.values(), key=_key)


def _has_copy(keeper: StoreKeeper, row: CatalogRow) -> bool:
    try:
        keeper.reader.token_ids([row])
    except PayloadError:
        return False
    return True


def _latest(rows: Sequence[CatalogRow]) -> dict[tuple[str, ...], CatalogRow]:
    latest: dict[tuple[str, ...], CatalogRow] = {}
    for row in rows:
        key = _key(row)
        if key not in latest or latest[key].order < row.order:
            latest[key] = row
    return latest


def _key(row: CatalogRow) -> tuple[str, ...]:
    return (row.namespace, row.fingerprint, row.codec, row.document_id)


def _replace(keeper: StoreKeeper, present: _Present, rows: Sequence[CatalogRow]) -> str:
    """Put the new rows in the place of the present ones; returns where an unreadable log was put.

    Raises ``CommitFailedError`` when the catalog was changed since it was read.
    """
    table = table_of(rows)
    if present.state == "sound" or present.files:
        keeper.catalog.commit(present.files, table, "rebuild")
        return ""
    moved = ""
    log = keeper.storage.entries(f"{DIRECTORY}/_delta_log")
    if log:
        moved = f"{DIRECTORY}.damaged-{uuid.uuid4().hex[:8]}"
        # The pointer and the checkpoints first, then the oldest commits: at no moment is there a log that could be
        # opened and shows an older state.
        for entry in sorted(log, key=lambda e: ("checkpoint" not in e.path, e.path)):
            keeper.storage.move(entry.path, f"{moved}/{entry.path.removeprefix(f'{DIRECTORY}/')}")
    if rows:
        keeper.catalog.create(table)
    else:
        create_catalog(keeper.storage)
    return moved
