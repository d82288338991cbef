"""Garbage collection: removing payloads that nothing names, as FORMAT.md section 7 says. In doubt a file stays."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta

import numpy as np

from kvlink_core.errors import ConfigError, PayloadError, StoreUnavailableError
from kvlink_core.store.catalog import DIRECTORY
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper, silent
from kvlink_core.store.lifecycle.rows import Rows
from kvlink_core.store.lifecycle.table import ALL, Edit, is_catalog_file
from kvlink_core.store.manifest import is_shard_name, shard_name
from kvlink_core.store.payload import footer_length
from kvlink_core.store.records import COLLECTING, JOB_FILE, JOBS, Collecting, entries_of, publish_record
from kvlink_core.store.storage import Entry, Storage
from kvlink_core.store.tokens import is_tokens_file

#: A writer needs less from publishing a shard to committing it, a reader from looking up a document to reading it.
DEFAULT_GRACE = timedelta(hours=24)

_UNFINISHED = re.compile(
    r"((shards|tokens|fingerprints|deleted|collecting|jobs/[^/]+|catalog/namespace=[^/]+/fingerprint=[^/]+)/)?\.tmp-[0-9a-f]{32}"
)

#: Shards named by one record of ``collecting/``, and how long it may be relied on, below the hour of FORMAT.md.
_BATCH, _BATCH_SECONDS = 200, 50 * 60

_HOUR, _DAY = 3600.0, 86400.0

#: A job that no service has carried on for so long is nobody's any more: FORMAT.md section 9.
_JOB_SECONDS = 30 * _DAY
_TAIL_BYTES = 64 * 2**10
_THREADS = 8


@dataclass(frozen=True, slots=True)
class Collection:
    """What a collection removed, or would.

    Attributes:
        shards: payloads that nothing names, and copies of token ids, each by its shard's name.
        files: how many files that is; ``nbytes``: their bytes.
        young: shards that nothing names either, but not yet for long enough; ``young_nbytes``: their bytes.
        superseded: catalog rows that no longer count, dropped from it. A payload that only they name stays for one
            more grace period.
        catalog: files that left the catalog long enough ago.
        unfinished: what killed writers left behind.
        unknown: files of a shard's name that are none of this store's; left alone.
        nothing_named: the catalog names nothing at all.
        done: whether it was done.
    """

    shards: list[str]
    files: int
    nbytes: int
    young: list[str]
    young_nbytes: int
    superseded: int
    catalog: list[str]
    unfinished: list[str]
    unknown: list[str]
    nothing_named: bool
    done: bool


@dataclass
class _Named:
    """Shards named by any row in any catalog file that is still there, part of the table or not."""

    keeper: StoreKeeper
    shards: set[str] = field(default_factory=set)
    seen: set[str] = field(default_factory=set)

    def look(self, leaving: Iterable[str] = ()) -> None:
        """Read catalog files that were not read yet, but for those that are about to be removed."""
        catalog = self.keeper.catalog
        catalog.refresh()
        paths = {f.path for f in catalog.files()} | set(catalog.strays())
        self.shards |= catalog.shards_of(sorted(paths - self.seen - set(leaving)))
        self.seen |= paths


def collect(
    keeper: StoreKeeper,
    grace: timedelta = DEFAULT_GRACE,
    *,
    dry_run: bool = True,
    everything: bool = False,
    progress: Progress = silent,
) -> Collection:
    """Remove what no catalog row names and the storage has had for longer than ``grace``.

    Safe beside readers and writers, and when killed, as long as ``grace`` is longer than they take (see
    ``DEFAULT_GRACE``). Zero is for a store that nobody else uses.

    Args:
        keeper: of the store.
        grace: how long a file must have been there.
        dry_run: only say what would be removed.
        everything: go on when the catalog names nothing at all.
        progress: is told of shards.

    Raises:
        ConfigError: a negative grace period.
        StoreUnavailableError: the catalog is damaged, or names nothing and not ``everything``: what is garbage cannot
            be told.
        StoreNotFoundError: there is no catalog.
    """
    if grace < timedelta(0):
        raise ConfigError("a grace period cannot be negative.", param="grace")
    storage, seconds = keeper.storage, grace.total_seconds()
    hours = -int(-seconds // _HOUR)  # Delta counts in hours
    rows = _sound(keeper, keeper.catalog.read())
    superseded = len(rows) - int(rows.counting.sum())
    before = storage.now() - seconds
    if not dry_run:
        rows, edit = keeper.catalog.rewrite(ALL, _drop_superseded, reason="gc", tidy=True)
        superseded = int((~edit.keep).sum())
        keeper.catalog.refresh()
    leaving = _clean_catalog(keeper, hours, dry_run=dry_run)
    named = _Named(keeper)
    if dry_run and hours == 0:  # the rows that no longer count would be gone at once
        named.seen |= {f.path for f in keeper.catalog.files()}
        named.shards |= set(rows.take(rows.counting).table["shard"].to_pylist())
    named.look(leaving)

    shards, tokens = _payload_files(storage, "shards"), _payload_files(storage, "tokens")
    unnamed = sorted((shards.keys() | tokens.keys()) - named.shards)
    old = [n for n in unnamed if all(d[n].modified <= before for d in (shards, tokens) if n in d)]
    young = [n for n in unnamed if n in shards and n not in set(old)]
    nothing_named = bool(old) and not rows.counting.any()
    if nothing_named and not everything and not dry_run:
        raise StoreUnavailableError(
            f"the catalog of {keeper.url} names no document, and yet {len(old)} shards are there. If the catalog was "
            "lost, `kvlink store rebuild` makes it again; to remove them all the same, say --all."
        )
    removed: list[str] = []
    unknown: list[str] = []
    for start in range(0, len(old), _BATCH):
        batch = old[start : start + _BATCH]
        own = _own(storage, batch, shards, tokens)
        unknown += [n for n in batch if n not in own]
        if own:
            removed += sorted(own) if dry_run else _remove(named, sorted(own), before)
        progress("collecting", start + len(batch), len(old))
    files = [d[n] for n in removed for d in (shards, tokens) if n in d]
    return Collection(
        shards=removed,
        files=len(files),
        nbytes=sum(f.size for f in files),
        young=young,
        young_nbytes=sum(shards[n].size for n in young),
        superseded=superseded,
        catalog=leaving,
        unfinished=_clean_unfinished(storage, before, dry_run=dry_run),
        unknown=unknown,
        nothing_named=nothing_named,
        done=not dry_run,
    )


def _sound(keeper: StoreKeeper, rows: Rows) -> Rows:
    damaged = int((~rows.sound).sum()) + sum(rows.left_out.values())
    if damaged:
        raise StoreUnavailableError(
            f"the catalog of {keeper.url} has {damaged} damaged rows, and which payloads they named cannot be known; "
            "run `kvlink store rebuild` first."
        )
    return rows


def _drop_superseded(rows: Rows) -> Edit:
    # A row that was damaged since it was looked at stays, and with it the trace that something is wrong.
    return Edit(rows.table, rows.counting | ~rows.sound, np.zeros(len(rows), dtype=np.bool_))


def _payload_files(storage: Storage, directory: str) -> dict[str, Entry]:
    """Files of a shard's name directly in ``directory``, by name."""
    found = {e.path.removeprefix(f"{directory}/"): e for e in storage.entries(directory)}
    return {name: entry for name, entry in found.items() if is_shard_name(name)}


def _own(storage: Storage, names: Sequence[str], shards: dict[str, Entry], tokens: dict[str, Entry]) -> set[str]:
    """Those names whose files are this store's: a shard's name is the hash of its footer."""
    present = [n for n in names if n in shards]
    own = {n for n in names if n not in shards}
    for name, tail in zip(present, storage.tails([f"shards/{n}" for n in present], _TAIL_BYTES), strict=True):
        if isinstance(tail, Exception):
            continue
        try:
            length = footer_length(tail.data, name, shards[name].size)
        except PayloadError:
            continue
        data = tail.data
        if length > len(data):
            (longer,) = storage.tails([f"shards/{name}"], length)
            data = b"" if isinstance(longer, Exception) else longer.data
        if shard_name(data[-length:-8]) == name:
            own.add(name)
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="kvlink-collect") as pool:
        copies = [n for n in own if n in tokens]
        ours = pool.map(lambda name: is_tokens_file(storage, name), copies)
        return own - {name for name, mine in zip(copies, ours, strict=True) if not mine}


def _remove(named: _Named, names: Sequence[str], before: float) -> list[str]:
    """Remove shards, as FORMAT.md section 7 says; returns those that were still old and unnamed."""
    storage = named.keeper.storage
    record, started = publish_record(storage, COLLECTING, Collecting(shards=list(names))), time.monotonic()

    def remove(name: str) -> bool:
        paths = [f"shards/{name}", f"tokens/{name}"]  # never a shard without its copy of the token ids
        times = [storage.modified(path) for path in paths]
        late = time.monotonic() - started > _BATCH_SECONDS
        if late or name in named.shards or any(t is not None and t > before for t in times):
            return False
        for path in paths:
            storage.remove(path)
        return True

    try:
        named.look()
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="kvlink-collect") as pool:
            done = list(pool.map(remove, names))
    finally:
        storage.remove(record)
    return [name for name, gone in zip(names, done, strict=True) if gone]


def _clean_catalog(keeper: StoreKeeper, hours: int, *, dry_run: bool) -> list[str]:
    """Remove files that left the table, and those of writers that died before their commit; returns their paths."""
    catalog = keeper.catalog
    there = {e.path.removeprefix(f"{DIRECTORY}/") for e in keeper.storage.entries(DIRECTORY)}
    left = [p for p in catalog.vacuum(hours, dry_run=True) if p in there]  # Delta's log names those removed before, too
    if left and not dry_run:
        catalog.vacuum(hours, dry_run=False)
    # What no commit mentions may still be committed, so an hour at least, whatever the grace period.
    strays = [p for p in catalog.vacuum(max(hours, 1), dry_run=True, full=True) if is_catalog_file(p)]
    if not dry_run:
        for path in strays:
            keeper.storage.remove(f"catalog/{path}")
        catalog.refresh()
    return sorted({*left, *strays})


def _clean_unfinished(storage: Storage, before: float, *, dry_run: bool) -> list[str]:
    """Remove unfinished writes, records of collectors that were killed, and jobs that nobody carries on any more."""
    now = storage.now()
    found = [
        e.path for e in storage.entries("") if _UNFINISHED.fullmatch(e.path) and e.modified <= min(before, now - _HOUR)
    ]
    found += [e.path for e in entries_of(storage, COLLECTING) if e.modified <= now - _DAY]
    found += _lost_jobs(storage, now)
    if not dry_run:
        for path in found:
            storage.remove(path)
    return found


def _lost_jobs(storage: Storage, now: float) -> list[str]:
    """Files of jobs of which none was written to for too long."""
    newest: dict[str, float] = {}
    jobs = [e for e in storage.entries(JOBS) if JOB_FILE.fullmatch(e.path)]
    for entry in jobs:
        job = entry.path.rsplit(".", 2)[0]
        newest[job] = max(newest.get(job, 0.0), entry.modified)
    return [e.path for e in jobs if newest[e.path.rsplit(".", 2)[0]] <= now - _JOB_SECONDS]
