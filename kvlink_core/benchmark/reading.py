"""How fast a store's raw shards are read, beside ``read()`` of the same files. Pages are in the system's memory."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import xxhash

from kvlink_core.benchmark.rounds import Progress, Work, alternate
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.types import DocumentCache

READ, READ_CHECKED, READ_USED = "read()", "read(), checksum", "read(), copied"
LOAD_UNCHECKED, LOAD, LOAD_USED = "load, not verified", "load", "load, copied"

#: Each way, and the one that it is held against.
AGAINST = {LOAD_UNCHECKED: READ, LOAD: READ, READ_CHECKED: READ, READ_USED: READ, LOAD_USED: READ_USED}

_KINDS = ("seconds", "processor")


@dataclass(frozen=True, slots=True)
class ReadingCase:
    """Documents of one size.

    Attributes:
        name: for tables.
        documents: how many are read at once.
        shards: in how many files they are.
        layers, kv_heads, head_dim, dtype: of the caches.
        tokens: of each document.
    """

    name: str
    documents: int
    shards: int
    layers: int
    kv_heads: int
    head_dim: int
    dtype: str
    tokens: int

    @property
    def nbytes(self) -> int:
        """Bytes of K and V of one document."""
        item = torch.finfo(getattr(torch, self.dtype)).bits // 8
        return 2 * self.layers * self.kv_heads * self.head_dim * self.tokens * item


#: The embedded model's shape and that of Llama 3.1 8B.
CASES = (
    ReadingCase("small, one shard", 100, 1, 8, 4, 32, "float32", 30),
    ReadingCase("small, ten shards", 100, 10, 8, 4, 32, "float32", 30),
    ReadingCase("16 MiB", 8, 2, 32, 8, 128, "bfloat16", 128),
    ReadingCase("64 MiB", 3, 3, 32, 8, 128, "bfloat16", 512),
)


@dataclass(frozen=True, slots=True)
class Reading:
    """What was measured of one case.

    Attributes:
        case: the documents.
        nbytes: of all of them.
        seconds: of each counted run, by way; ``AGAINST`` names the ways.
        processor: seconds of processor time of each, the system's included: what is left of noise by others.
        medians, ratios: seconds, and how many times as fast as the way that it is held against.
        processor_medians, processor_ratios: the same of processor time.
    """

    case: ReadingCase
    nbytes: int
    seconds: dict[str, list[float]]
    processor: dict[str, list[float]]
    medians: dict[str, float] = field(init=False)
    ratios: dict[str, float] = field(init=False)
    processor_medians: dict[str, float] = field(init=False)
    processor_ratios: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        for prefix, runs in (("", self.seconds), ("processor_", self.processor)):
            medians = {way: statistics.median(times) for way, times in runs.items()}
            # Runs alternate, so each is held against its neighbour: what disturbs the machine disturbs both.
            ratios = {
                way: statistics.median(b / a for a, b in zip(runs[way], runs[other], strict=True))
                for way, other in AGAINST.items()
            }
            object.__setattr__(self, f"{prefix}medians", medians)
            object.__setattr__(self, f"{prefix}ratios", ratios)


def measure_reading(directory: Path, cases: Sequence[ReadingCase], repeats: int, progress: Progress) -> list[Reading]:
    """Write each case's documents into a store in ``directory``, and read them again and again.

    Raises ``StoreUnavailableError`` when the directory cannot be written to.
    """
    return [_measure(directory / f"case-{n}", case, repeats, progress) for n, case in enumerate(cases)]


def _measure(directory: Path, case: ReadingCase, repeats: int, progress: Progress) -> Reading:
    rows = _write(directory, case)
    files = sorted({directory / "shards" / row.shard for row in rows})
    space = np.ones(case.documents * (case.nbytes + 2**16) + 2**20, dtype=np.uint8)  # touched, so that it is there
    with _open(directory, case) as store, _open(directory, case, verify=False) as trusting:

        def read() -> list[bytes]:
            found = []
            for path in files:
                with open(path, "rb", buffering=0) as file:
                    found.append(file.read())
            return found

        def read_checked() -> list[bytes]:
            found = read()
            for data in found:
                xxhash.xxh3_128_hexdigest(data)
            return found

        def read_used() -> list[bytes]:
            found, at = read(), 0
            for data in found:
                space[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)
                at += len(data)
            return found

        def load_used() -> list[DocumentCache]:
            found, at = _sound(store, rows), 0
            for cache in found:
                for tensor in (cache.keys, cache.values):
                    data = tensor.view(torch.uint8).numpy()
                    space[at : at + data.size].reshape(data.shape)[...] = data
                    at += data.size
            return found

        ways: dict[str, Callable[[], object]] = {
            READ: read, READ_CHECKED: read_checked, LOAD_UNCHECKED: lambda: _sound(trusting, rows),
            LOAD: lambda: _sound(store, rows), READ_USED: read_used, LOAD_USED: load_used,
        }  # fmt: skip
        runs = alternate(
            {way: Work(_timed(call)) for way, call in ways.items()},
            repeats,
            lambda way, done, total: progress(f"{case.name}: {way}", done, total),
        )
    seconds, processor = ({way: [run[kind] for run in counted] for way, counted in runs.items()} for kind in _KINDS)
    return Reading(case, case.documents * case.nbytes, seconds, processor)


def _timed(call: Callable[[], object]) -> Callable[[], dict[str, float]]:
    def run() -> dict[str, float]:
        started = time.perf_counter(), time.process_time()
        result = call()
        ended = time.perf_counter(), time.process_time()
        del result  # freeing it is not timed
        return {kind: end - start for kind, start, end in zip(_KINDS, started, ended, strict=True)}

    return run


def _sound(store: DocumentStore, rows: Sequence[CatalogRow]) -> list[DocumentCache]:
    found = [cache for cache in store.load(rows) if isinstance(cache, DocumentCache)]
    assert len(found) == len(rows), "a document that was just written is not sound"
    return found


def _open(directory: Path, case: ReadingCase, *, create: bool = False, verify: bool = True) -> DocumentStore:
    fingerprint = Fingerprint(model="none", weights="", tokenizer="", rope="", dtype=case.dtype, template="")
    return DocumentStore.open(str(directory), fingerprint=fingerprint, create=create, verify=verify)


def _write(directory: Path, case: ReadingCase) -> list[CatalogRow]:
    dtype = getattr(torch, case.dtype)
    shape = (case.layers, case.kv_heads, case.tokens, case.head_dim)
    generator = torch.Generator().manual_seed(0)
    with _open(directory, case, create=True) as store:
        rows: list[CatalogRow] = []
        for shard in range(case.shards):
            names = range(shard, case.documents, case.shards)
            entries = []
            for name in names:
                tokens = torch.randint(0, 2**31, (case.tokens,), generator=generator)
                entries.append((str(name), DocumentCache(tokens, *(torch.randn(shape, dtype=dtype) for _ in "kv"))))
            rows += store.write_shard(entries)
        store.commit(rows)
    return rows
