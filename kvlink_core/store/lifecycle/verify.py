"""Reading everything that the catalog names, and reporting what could not be served."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from kvlink_core.errors import PayloadError
from kvlink_core.store import layout
from kvlink_core.store.lifecycle.keeper import Progress, StoreKeeper, silent
from kvlink_core.store.lifecycle.rows import Rows
from kvlink_core.store.lifecycle.table import ALL, Scope
from kvlink_core.store.payload import check_asked, locate
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.tokens import read_copies

#: Bytes of documents that one thread holds at a time, unless a single one is larger.
_CHUNK_BYTES = 64 * 2**20

#: Rows of one document id: within namespace, fingerprint and codec.
_Key = tuple[str, str, str, str]


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that is not as it must be.

    Attributes:
        code: that of the payload's error, or ``catalog_row``, ``fingerprint``, ``tokens_missing``, ``tokens_corrupt``.
        namespace: where it was found; "" where that cannot be known.
        shard: the file, or "".
        documents: ids of the documents that it concerns.
        message: what is wrong.
        bad: whether documents cannot be served; otherwise only a safety net has a hole.
    """

    code: str
    namespace: str
    shard: str
    documents: list[str]
    message: str
    bad: bool = True


@dataclass(frozen=True, slots=True)
class Verification:
    """What was looked at, and what is wrong. ``nbytes`` are those of the payloads, without what compression saved."""

    documents: int
    payloads: int
    shards: int
    nbytes: int
    problems: list[Problem]

    @property
    def sound(self) -> bool:
        """Whether every document can be served."""
        return not any(p.bad for p in self.problems)


def verify(
    keeper: StoreKeeper,
    scope: Scope = ALL,
    *,
    values: bool = True,
    jobs: int | None = None,
    progress: Progress = silent,
) -> Verification:
    """Look at every document of ``scope`` the way a reader would. Changes nothing; others may write meanwhile.

    Args:
        keeper: of the store.
        scope: what to look at.
        values: read and check K and V; otherwise only what the files say of themselves.
        jobs: threads; default: one for each processor, at most 8.
        progress: is told of payloads.

    Raises:
        StoreNotFoundError, StoreUnavailableError: there is no catalog, or the store does not answer.
    """
    rows = keeper.catalog.read(scope)
    problems = [*_damaged_rows(rows), *_fingerprints(keeper, rows)]
    counting = sorted(rows.to_rows(np.flatnonzero(rows.counting)), key=lambda r: (r.shard, r.row_group))
    payloads = {(r.shard, r.row_group): r.nbytes for r in counting}
    found: list[Problem] = []
    done = 0
    with ThreadPoolExecutor(jobs or min(8, os.cpu_count() or 1), thread_name_prefix="kvlink-verify") as pool:
        tasks = {
            pool.submit(_check, keeper, part, values): len({r.row_group for r in part}) for part in _parts(counting)
        }
        try:
            for task in as_completed(tasks):
                found += task.result()
                done += tasks[task]
                progress("verifying", done, len(payloads))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    problems += _still_there(keeper, scope, counting, found)
    shards = {r.shard for r in counting}
    return Verification(
        documents=len(counting),
        payloads=len(payloads),
        shards=len(shards),
        nbytes=sum(payloads.values()),
        problems=sorted(problems, key=lambda p: (not p.bad, p.code, p.shard, p.documents[:1])),
    )


def _damaged_rows(rows: Rows) -> Iterator[Problem]:
    for row in rows.to_rows(np.flatnonzero(~rows.sound)):
        text = "a catalog row does not match its checksum; `kvlink store rebuild` mends it"
        yield Problem("catalog_row", row.namespace, row.shard, [row.document_id], text)
    if lost := sum(rows.left_out.values()):
        text = f"{lost} catalog rows cannot be read; `kvlink store rebuild` mends it"
        yield Problem("catalog_row", "", "", [], text)


def _fingerprints(keeper: StoreKeeper, rows: Rows) -> Iterator[Problem]:
    for digest in sorted(set(rows.table["fingerprint"].to_pylist())):
        if layout.read_fingerprint(keeper.storage, digest) is None:
            text = f"fingerprints/{digest}.json is missing or damaged; precompute writes it again"
            yield Problem("fingerprint", "", "", [], text, bad=False)


def _parts(rows: Sequence[CatalogRow]) -> Iterator[list[CatalogRow]]:
    """Rows of one shard each, of few enough bytes; rows of one payload stay together."""
    for _, of_shard in groupby(rows, key=lambda r: r.shard):
        part: list[CatalogRow] = []
        held = 0
        for _, of_payload in groupby(of_shard, key=lambda r: r.row_group):
            same = list(of_payload)
            if part and held + same[0].nbytes > _CHUNK_BYTES:
                yield part
                part, held = [], 0
            part += same
            held += same[0].nbytes
        yield part


def _check(keeper: StoreKeeper, rows: Sequence[CatalogRow], values: bool) -> list[Problem]:
    """What is wrong with rows of one shard."""
    shard = rows[0].shard
    outcomes = keeper.reader.load(rows) if values else _outline(keeper, rows)
    problems = [
        Problem(error.code, row.namespace, shard, [row.document_id], str(error))
        for row, error in zip(rows, outcomes, strict=True)
        if isinstance(error, PayloadError)
    ]
    del outcomes
    copies = read_copies(keeper.storage, shard)
    if copies is None:
        text = "there is no copy of its token ids: if it is damaged, its documents are lost"
        return [*problems, Problem("tokens_missing", rows[0].namespace, shard, _ids(rows), text, bad=False)]
    if wrong := [r for r in rows if copies.get(r.row_group) != r.token_digest]:
        text = "the copy of its token ids is damaged: if it is damaged too, its documents are lost"
        problems.append(Problem("tokens_corrupt", wrong[0].namespace, shard, _ids(wrong), text, bad=False))
    return problems


def _outline(keeper: StoreKeeper, rows: Sequence[CatalogRow]) -> list[PayloadError | None]:
    footer = keeper.reader.footers([rows[0].shard])[rows[0].shard]
    found: list[PayloadError | None] = []
    for row in rows:
        try:
            if isinstance(footer, PayloadError):
                raise footer
            check_asked(footer, row)
            locate(footer, row.row_group)
            found.append(None)
        except PayloadError as error:
            found.append(error)
    return found


def _ids(rows: Sequence[CatalogRow]) -> list[str]:
    return [r.document_id for r in rows]


def _still_there(
    keeper: StoreKeeper, scope: Scope, rows: Sequence[CatalogRow], problems: Sequence[Problem]
) -> list[Problem]:
    """The problems of documents that the catalog still has there, one for each kind and shard.

    What moved or was deleted while it was looked at is nobody's problem any more.
    """
    if not problems:
        return []
    now = keeper.catalog.read(scope)
    current = {_place(r) for r in now.to_rows(np.flatnonzero(now.counting))}
    of_document = {(r.shard, r.namespace, r.document_id): _place(r) for r in rows}
    merged: dict[tuple[str, str, str, str], Problem] = {}
    for problem in problems:
        ids = [
            i for i in problem.documents if of_document[(problem.shard, problem.namespace, i)] in current
        ]  # fmt: skip
        if ids:
            key = (problem.code, problem.namespace, problem.shard, problem.message)
            known = merged.get(key, replace(problem, documents=[]))
            merged[key] = replace(known, documents=[*known.documents, *ids])
    return list(merged.values())


def _place(row: CatalogRow) -> tuple[_Key, str, int]:
    return ((row.namespace, row.fingerprint, row.codec, row.document_id), row.shard, row.row_group)
