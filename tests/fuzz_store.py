"""Feeds damaged and forged files to everything that reads a store: ``python tests/fuzz_store.py --minutes 10``.

Real files of every codec are mutated: byte by byte; in the structures of Parquet, of the manifest and of the log; in
their values, with checksums made to match. Most shards get the name that their footer hashes to, or nothing would come
past the first check. What is read must be what was written, or a named error; without a crash, in little time and
memory.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import json
import logging
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import parquet_bytes as parquet
import pyarrow as pa
import torch
from fuzz_files import Memory, Mutator, Shard, real_files
from store_places import same

from kvlink_core.errors import KVLinkError, PayloadError
from kvlink_core.store.catalog import Catalog
from kvlink_core.store.columns import read_rows
from kvlink_core.store.records import being_collected, read_deleted
from kvlink_core.store.shards import ShardReader
from kvlink_core.store.storage import open_storage
from kvlink_core.store.tokens import is_tokens_file, read_copies, read_tokens

#: No input may take longer, and all together may not add more to the process.
SECONDS, MEMORY = 2.0, 256 * 2**20


class Fuzzer:
    """Makes inputs of a seed and reads them; ``counts`` says what became of them."""

    def __init__(self, seed: int, files: tuple[list[Shard], bytes, Path], last: Path | None = None) -> None:
        self.chance = random.Random(seed)
        self.mutate = Mutator(self.chance)
        self.shards, self.catalog, self.directory = files
        self.counts: collections.Counter[str] = collections.Counter()
        self.last = last
        self.kinds: list[tuple[Callable[[], str], int]] = [
            (self.shard, 80), (self.table, 12), (self.copy, 8), (self.record, 6), (self.log, 1),
        ]  # fmt: skip

    def run(self) -> None:
        """One input."""
        kinds, weights = zip(*self.kinds, strict=True)
        (kind,) = self.chance.choices(kinds, weights)
        started = time.process_time()
        outcome = kind()
        took = time.process_time() - started
        assert took < SECONDS, f"{kind.__name__}: {took:.1f} s"
        assert "MemoryError" not in outcome, outcome
        self.counts[f"{kind.__name__}: {outcome}"] += 1

    def _note(self, data: bytes) -> None:
        if self.last is not None:
            self.last.write_bytes(data)

    def shard(self) -> str:
        good = self.chance.choice(self.shards)
        ways = (self.mutate.bytes, self.mutate.footer, self.mutate.footer, self.mutate.page, self.mutate.values)
        way = self.chance.choice(ways)
        data = way(good.data)
        if self.chance.random() < 0.2:
            data = self.mutate.bytes(data)
        forged = way != self.mutate.bytes or self.chance.random() < 0.7
        name = parquet.name_of(data) if forged else good.rows[0].shard
        self._note(data)
        reader = ShardReader(Memory({f"shards/{name}": data}), verify=self.chance.random() < 0.8)  # type: ignore[arg-type]
        try:
            found = reader.load([replace(row, shard=name) for row in good.rows])
            if self.chance.random() < 0.1:
                encoded = reader.load_encoded([replace(row, shard=name) for row in good.rows])
                assert all(isinstance(e, PayloadError) or e.token_ids.tolist() for e in encoded)
            if self.chance.random() < 0.1:
                for row, cache in zip(good.rows, good.caches, strict=True):
                    with contextlib.suppress(PayloadError):
                        assert reader.token_ids([replace(row, shard=name)]) == [cache.token_ids.tolist()]
            trusting = not reader._verify
        finally:
            reader.close()
        for item, cache in zip(found, good.caches, strict=True):
            if isinstance(item, PayloadError):
                continue
            assert item.token_ids.tolist() == cache.token_ids.tolist(), "other tokens"
            # Without checksums, or with ones that were made to match, numbers may be others; and a manifest that was
            # changed may give them another shape, which is then held against the model's.
            if not trusting and way != self.mutate.values:
                kinds = [(c.keys.shape, c.values.shape, c.keys.dtype) for c in (item, cache)]
                assert same(item, cache) or (forged and kinds[0] != kinds[1]), "other numbers"
            assert item.nbytes <= 64 * len(data) + 4096, "more than it can hold"
        return "|".join(sorted({type(item).__name__ for item in found}))

    def table(self) -> str:
        data = self.chance.choice((self.mutate.bytes, self.mutate.footer, self.mutate.page))(self.catalog)
        self._note(data)
        try:
            table = read_rows(data, ["document_id", "token_digest", "codec", "shard", "created_at", "check"])
        except Exception as error:  # what it is becomes a StoreUnavailableError
            return "MemoryError" if isinstance(error, MemoryError | pa.ArrowMemoryError) else "refused"
        assert table.nbytes <= 256 * len(data) + 2**20
        table.to_pylist()
        return "read"

    def copy(self) -> str:
        good = self.chance.choice(self.shards)
        data = self.chance.choice((self.mutate.bytes, self.mutate.footer, self.mutate.page))(good.copy)
        self._note(data)
        storage: Any = Memory({f"tokens/{good.rows[0].shard}": data})
        found = [read_tokens(storage, row) for row in good.rows]
        read_copies(storage, good.rows[0].shard)
        is_tokens_file(storage, good.rows[0].shard)
        for ids, cache in zip(found, good.caches, strict=True):
            assert ids is None or ids == cache.token_ids.tolist(), "other tokens"
        return "read" if any(found) else "refused"

    def record(self) -> str:
        deleted = b'{"format":1,"namespace":"default","ids":["a","b"],"fingerprint":null,"codec":null,"until":5}'
        collecting = b'{"format":1,"shards":["' + b"0" * 64 + b'.parquet"]}'
        deleted, collecting = self.mutate.text(deleted), self.mutate.text(collecting)
        self._note(deleted + b"\n" + collecting)
        storage: Any = Memory({"deleted/a.json": deleted, "collecting/a.json": collecting})
        assert all(len(name) == 72 for name in being_collected(storage))
        try:
            return "read" if read_deleted(storage) else "empty"
        except KVLinkError as error:
            return type(error).__name__

    def log(self) -> str:
        path = self.chance.choice(sorted(self.directory.glob("catalog/_delta_log/*.json")))
        good = path.read_bytes()
        lines = good.splitlines(keepends=True)
        place = self.chance.randrange(len(lines))
        lines[place] = self.mutate.text(lines[place].strip()) + b"\n"
        self._note(b"".join(lines))
        path.write_bytes(b"".join(lines))
        rows = self.shards[-1].rows
        row = rows[0]
        try:
            catalog = Catalog(open_storage(str(self.directory)), row.namespace, row.fingerprint, row.codec)
            catalog.refresh()
            found = catalog.index.by_id(["a", "b"])
            known = {r.document_id: r for r in rows}
            assert all(found[i] == known[i] for i in found), "another row"
            return "read" if found else "empty"
        except KVLinkError as error:
            return type(error).__name__
        finally:
            path.write_bytes(good)


def work(seed: int, seconds: float, last: Path) -> None:
    """Fuzz for some time in this process, and print what became of the inputs."""
    torch.set_num_threads(1)
    logging.disable(logging.CRITICAL)
    with tempfile.TemporaryDirectory() as scratch:
        fuzzer = Fuzzer(seed, real_files(Path(scratch) / "store"), last)
        for _ in range(200):
            fuzzer.run()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            fuzzer.run()
        grown = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    assert grown < MEMORY, f"grew by {grown} bytes"
    print(json.dumps({"counts": fuzzer.counts, "grown": grown}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--findings", type=Path, default=Path("fuzz-findings"), help="where inputs that fail are put")
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.seed, 60 * given.minutes, given.work)
        return
    end, seed, findings = time.monotonic() + 60 * given.minutes, given.seed, 0
    counts: collections.Counter[str] = collections.Counter()
    grown = 0
    with tempfile.TemporaryDirectory() as scratch:
        last = Path(scratch) / "last"
        while (left := end - time.monotonic()) > 1:  # minute by minute: a crash loses the counts of one
            command = [sys.executable, __file__, "--work", str(last), "--seed", str(seed)]
            command += ["--minutes", str(min(60.0, left) / 60)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                findings += 1
                given.findings.mkdir(exist_ok=True)
                (given.findings / f"{seed}.input").write_bytes(last.read_bytes() if last.exists() else b"")
                (given.findings / f"{seed}.txt").write_text(f"exit code {done.returncode}\n{done.stderr}")
                print(f"seed {seed}: exit code {done.returncode}; {done.stderr.strip().splitlines()[-1:]}", flush=True)
            else:
                result = json.loads(done.stdout)
                counts.update(result["counts"])
                grown = max(grown, result["grown"])
            seed += 1
    for outcome, count in sorted(counts.items()):
        print(f"{count:>10,}  {outcome}")
    print(f"{sum(counts.values()):,} inputs, {findings} findings; memory grew by {grown / 2**20:.0f} MiB at most")
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
