"""How fast the catalog is with very many rows: looked up, held in memory, kept up to date. No payloads are written."""

from __future__ import annotations

import hashlib
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store.catalog import Catalog
from kvlink_core.store.lifecycle import Progress, StoreKeeper, delete
from kvlink_core.store.lifecycle.keeper import silent
from kvlink_core.store.rows import CatalogRow
from kvlink_core.store.storage import open_storage
from kvlink_core.store.store import DocumentStore

#: Documents of one lookup, and lookups of one figure.
DOCUMENTS, LOOKUPS = 20, 500

_COMMIT_ROWS = 100_000
_SHARD_ROWS = 100

FINGERPRINT = Fingerprint(model="none", weights="", tokenizer="", rope="", dtype="float32", template="")


@dataclass(frozen=True, slots=True)
class Figures:
    """What was measured. Times in milliseconds unless they say otherwise; load averages as the system says.

    Attributes:
        rows: in the catalog.
        open_s: opening the store, in seconds.
        index_bytes: of the catalog in memory, a document, as its buffers add up.
        resident_bytes: growth of the process's resident memory by opening it, a document; ``None`` where unknown.
        by_id, by_id_p99: looking up 20 ids, median and 99th percentile of 500; ``by_tokens`` by token digest.
        refresh_nothing, refresh_row, refresh_thousand: after no commit, one of a row, one of a thousand.
        refresh_deleted: after a document was deleted.
        load_before, load_after: load averages over one minute.
    """

    rows: int
    open_s: float
    index_bytes: float
    resident_bytes: float | None
    by_id: float
    by_id_p99: float
    by_tokens: float
    by_tokens_p99: float
    refresh_nothing: float
    refresh_row: float
    refresh_thousand: float
    refresh_deleted: float
    load_before: float
    load_after: float
    processors: int

    def lines(self) -> list[tuple[str, str]]:
        """What each figure is, and the figure, for people."""
        resident = "unknown" if self.resident_bytes is None else f"{self.resident_bytes:.0f} bytes"
        return [
            ("open", f"{self.open_s:.2f} s"),
            ("memory a document, as computed", f"{self.index_bytes:.0f} bytes"),
            ("memory a document, resident", resident),
            (f"{DOCUMENTS} documents by id, median of {LOOKUPS}", f"{self.by_id:.2f} ms"),
            (f"{DOCUMENTS} documents by id, 99th percentile", f"{self.by_id_p99:.2f} ms"),
            (f"{DOCUMENTS} documents by tokens, median of {LOOKUPS}", f"{self.by_tokens:.2f} ms"),
            (f"{DOCUMENTS} documents by tokens, 99th percentile", f"{self.by_tokens_p99:.2f} ms"),
            ("refresh, nothing new", f"{self.refresh_nothing:.1f} ms"),
            ("refresh, one row", f"{self.refresh_row:.1f} ms"),
            ("refresh, a thousand rows", f"{self.refresh_thousand:.1f} ms"),
            ("refresh, a document deleted", f"{self.refresh_deleted:.1f} ms"),
        ]


def measure(directory: Path, rows: int, progress: Progress = silent) -> Figures:
    """Make a store with that many catalog rows in ``directory``, and measure. Takes about 30 s for a million.

    Raises ``StoreUnavailableError`` when the directory cannot be written to.
    """
    load_before = os.getloadavg()[0]
    small = DocumentStore.open(str(directory / "small"), fingerprint=FINGERPRINT, create=True)
    small.close()
    url = str(directory / "large")
    writer = DocumentStore.open(url, fingerprint=FINGERPRINT, create=True)
    writer.close()
    for start in range(0, rows, _COMMIT_ROWS):
        end = min(rows, start + _COMMIT_ROWS)
        _commit(url, _rows(start, end))
        progress("writing rows", end, rows)
    # In a process of its own: in this one, memory that writing has freed would be taken again.
    command = [sys.executable, "-c", f"from {__name__} import opened; opened()", str(directory / "small"), url]
    open_s, grown = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    catalog = Catalog(open_storage(url), "default", FINGERPRINT.digest, "raw")
    catalog.refresh()
    chance = random.Random(0)

    def ids() -> list[str]:
        return [_id(chance.randrange(rows)) for _ in range(DOCUMENTS)]

    def digests() -> list[str]:
        return [_digest(chance.randrange(rows)) for _ in range(DOCUMENTS)]

    by_id = _times(lambda wanted: catalog.index.by_id(wanted), ids)
    by_tokens = _times(lambda wanted: catalog.index.by_digest(wanted), digests)
    figures = Figures(
        rows=rows,
        open_s=open_s,
        index_bytes=catalog.index.nbytes / rows,
        resident_bytes=None if grown is None else grown / rows,
        by_id=statistics.median(by_id),
        by_id_p99=_p99(by_id),
        by_tokens=statistics.median(by_tokens),
        by_tokens_p99=_p99(by_tokens),
        refresh_nothing=_refresh(catalog, lambda: None),
        refresh_row=_refresh(catalog, lambda: _commit(url, _rows(rows, rows + 1))),
        refresh_thousand=_refresh(catalog, lambda: _commit(url, _rows(rows + 1, rows + 1001))),
        refresh_deleted=_refresh(catalog, lambda: _delete(url, _id(rows // 2))),
        load_before=load_before,
        load_after=os.getloadavg()[0],
        processors=os.cpu_count() or 1,
    )
    assert catalog.index.by_id([_id(rows), _id(rows // 2)]).keys() == {_id(rows)}, "a refresh missed a change"
    return figures


def opened() -> None:
    """Open a small store, so that libraries are loaded, then a large one; print how long that took, and the growth."""
    small, large = sys.argv[1:]
    Catalog(open_storage(small), "default", FINGERPRINT.digest, "raw").refresh()
    before, started = _resident(), time.perf_counter()
    catalog = Catalog(open_storage(large), "default", FINGERPRINT.digest, "raw")
    catalog.refresh()
    seconds, after = time.perf_counter() - started, _resident()
    print(json.dumps([seconds, None if before is None or after is None else after - before]))


def _id(number: int) -> str:
    return f"corpus/document-{number:08d}"


def _digest(number: int) -> str:
    return hashlib.sha256(f"tokens {number}".encode()).hexdigest()


def _rows(start: int, end: int) -> Iterator[CatalogRow]:
    now = datetime.now(UTC)
    for number in range(start, end):
        shard = hashlib.sha256(f"shard {number // _SHARD_ROWS}".encode()).hexdigest() + ".parquet"
        yield CatalogRow(
            _id(number), "default", FINGERPRINT.digest, _digest(number), "raw",
            shard, number % _SHARD_ROWS, 512, 2**20, now,
        )  # fmt: skip


def _commit(url: str, rows: Iterator[CatalogRow]) -> None:
    with DocumentStore.open(url, fingerprint=FINGERPRINT) as store:
        store.commit(list(rows))


def _delete(url: str, document_id: str) -> None:
    with StoreKeeper.open(url) as keeper:
        delete(keeper, keeper.scope("default"), [document_id], dry_run=False)


def _times(call: Callable[[list[str]], object], arguments: Callable[[], list[str]]) -> list[float]:
    found: list[float] = []
    for _ in range(LOOKUPS):
        wanted = arguments()
        started = time.perf_counter()
        call(wanted)
        found.append(1e3 * (time.perf_counter() - started))
    return found


def _p99(times: list[float]) -> float:
    return statistics.quantiles(times, n=100)[98]


def _refresh(catalog: Catalog, change: Callable[[], object]) -> float:
    change()
    started = time.perf_counter()
    catalog.refresh()
    return 1e3 * (time.perf_counter() - started)


def _resident() -> int | None:
    """Bytes of this process in memory, where the system tells."""
    if sys.platform != "linux":
        return None
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
