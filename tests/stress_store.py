"""Writers and readers of one store at once, writers being killed: ``python tests/stress_store.py --seconds 60``.

Each writer commits documents, and notes in a file of its own what it is about to commit and what has been committed. It
is killed (SIGKILL) at random instants and another takes its place. Readers look all the time whether

- everything that was noted as committed before they looked is there: nothing committed is lost;
- nothing is there that no writer was about to commit, nor a part of a commit: nothing uncommitted is seen;
- everything that is there is, bit for bit, what its id says: every read is whole.

Each document's numbers follow from its id, so a reader needs nobody to tell it what they must be.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from store_places import FINGERPRINT, make_cache, same

from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import StoreKeeper, verify

#: Documents of one commit: all of them are seen, or none.
TOGETHER = 3


def cache_of(document_id: str) -> Any:
    """The only numbers that a document of this id may have."""
    return make_cache(3 + zlib.crc32(document_id.encode()) % 6, zlib.crc32(document_id.encode()))


def batch(name: str) -> list[str]:
    return [f"{name}/{i}" for i in range(TOGETHER)]


class Notes:
    """Lines of a process's own file: a line is there whole or not at all, since one call of the system writes it."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def add(self, *words: object) -> None:
        os.write(self._file, (json.dumps(words) + "\n").encode())


def read_notes(directory: Path) -> dict[str, set[str]]:
    """What writers noted so far: by kind, the names of commits."""
    found: dict[str, set[str]] = {"begun": set(), "committed": set(), "written": set()}
    for path in directory.glob("writer-*"):
        for line in path.read_text().splitlines():
            kind, name = json.loads(line)
            found[kind].add(name)
    return found


def open_store(url: str, options: Mapping[str, str]) -> DocumentStore:
    return DocumentStore.open(url, fingerprint=FINGERPRINT, storage_options=options or None)


def write(url: str, options: Mapping[str, str], directory: Path, name: str) -> None:
    """Commit batch after batch until killed; every fifth is written and never committed."""
    notes = Notes(directory / f"writer-{name}")
    with open_store(url, options) as store:
        step = 0
        while True:
            this = f"{name}-{step}"
            rows = store.write_shard([(i, cache_of(i)) for i in batch(this)])
            if step % 5 == 4:
                notes.add("written", this)
            else:
                notes.add("begun", this)
                store.commit(rows)
                notes.add("committed", this)
            step += 1


def look(store: DocumentStore, directory: Path) -> int:
    """Look at everything once; returns how many documents were read. Raises ``AssertionError``."""
    before = read_notes(directory)
    store.refresh()
    names = sorted(set().union(*before.values()))
    rows = store.lookup([i for name in names for i in batch(name)])
    after = read_notes(directory)
    for name in names:
        seen = [i in rows for i in batch(name)]
        assert all(seen) or not any(seen), f"a part of {name}"
        assert all(seen) or name not in before["committed"], f"{name} was committed and is not there"
        assert not any(seen) or name in before["begun"] | after["begun"], f"{name} was never committed and is there"
    assert store._catalog.index.rows <= TOGETHER * len(after["begun"]), "rows of nobody"
    chosen = random.sample(sorted(rows), min(len(rows), 60))
    for document_id, found in zip(chosen, store.load([rows[i] for i in chosen]), strict=True):
        assert same(found, cache_of(document_id)), f"{document_id}: {found!r}"
    return len(chosen)


def read(url: str, options: Mapping[str, str], directory: Path, name: str) -> None:
    """Look again and again until told to stop by a file."""
    notes = Notes(directory / f"reader-{name}")
    with open_store(url, options) as store:
        while not (directory / "stop").exists():
            notes.add("read", look(store, directory))


@dataclass(frozen=True)
class Outcome:
    """What a run did."""

    commits: int
    documents: int
    killed: int
    in_doubt: int
    looks: int
    read: int
    failures: list[str]


def run(
    url: str, options: Mapping[str, str], *, seconds: float, writers: int, readers: int, every: float, seed: int = 0
) -> Outcome:
    """Run it on a store that exists, killing a writer about ``every`` so many seconds; ends all that it started."""
    chance, environment = random.Random(seed), os.environ | {"OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as scratch, ExitStack() as stack:
        directory = Path(scratch)

        def start(role: str, name: str) -> subprocess.Popen[bytes]:
            command = [sys.executable, __file__, "--role", role, "--name", name, "--notes", scratch, "--store", url]
            command += ["--options", json.dumps(dict(options))]
            with (directory / f"errors-{name}").open("wb") as errors:
                process = subprocess.Popen(command, env=environment, stderr=errors)
            stack.callback(process.wait)
            stack.callback(process.kill)
            return process

        working = {f"{n}.0": start("write", f"{n}.0") for n in range(writers)}
        looking = [start("read", f"r{n}") for n in range(readers)]
        failures: list[str] = []
        killed, generation = 0, 0
        _until(
            lambda: (
                len(list(directory.glob("writer-*"))) == writers and len(list(directory.glob("reader-*"))) == readers
            )
        )
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(chance.uniform(0.5, 1.5) * every)
            # One that works, not one that is still starting.
            ready = [n for n in working if (directory / f"writer-{n}").exists()]
            victim = chance.choice(ready or list(working))
            process = working.pop(victim)
            if process.poll() is not None:
                failures.append(
                    f"writer {victim} ended by itself: {(directory / f'errors-{victim}').read_text()[-500:]}"
                )
            process.send_signal(signal.SIGKILL)
            process.wait()
            killed, generation = killed + 1, generation + 1
            working[f"{victim.partition('.')[0]}.{generation}"] = start(
                "write", f"{victim.partition('.')[0]}.{generation}"
            )
        for process in working.values():
            process.kill()
            process.wait()
        killed += len(working)
        (directory / "stop").touch()
        for number, process in enumerate(looking):
            if process.wait(120):
                failures.append(f"reader {number}: {_said(directory, f'r{number}')}")
        notes = read_notes(directory)
        with open_store(url, options) as store:  # a new reader, and everything at once
            names = sorted(notes["begun"] | notes["written"])
            rows = store.lookup([i for name in names for i in batch(name)])
            seen = {i.rpartition("/")[0] for i in rows}
            failures += [f"lost: {n}" for n in notes["committed"] - seen] + [
                f"seen: {n}" for n in notes["written"] & seen
            ]
            failures += [f"a part of {n}" for n in seen if not all(i in rows for i in batch(n))]
            wanted = list(rows)
            loaded = store.load(list(rows.values()))
            failures += [f"{i}: {c!r}" for i, c in zip(wanted, loaded, strict=True) if not same(c, cache_of(i))]
        with StoreKeeper.open(url, storage_options=options or None) as keeper:
            failures += [p.message for p in verify(keeper).problems]
        looks = [json.loads(line)[1] for p in directory.glob("reader-*") for line in p.read_text().splitlines()]
        doubtful = len(notes["begun"] - notes["committed"])
        return Outcome(len(notes["committed"]), len(rows), killed, doubtful, len(looks), sum(looks), failures)


def _said(directory: Path, name: str) -> str:
    return (directory / f"errors-{name}").read_text()[-500:]


def _until(condition: Any, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "they do not start"
        time.sleep(0.1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", help="where to make the store; `s3` for a bucket of a server that is started for it")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--writers", type=int, default=8)
    parser.add_argument("--readers", type=int, default=4)
    parser.add_argument("--every", type=float, default=2.0, help="seconds between two kills, about")
    parser.add_argument("--seed", type=int, default=0)
    for name in ("role", "name", "notes", "options"):
        parser.add_argument(f"--{name}", default="", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.role:
        part = write if given.role == "write" else read
        part(given.store, json.loads(given.options), Path(given.notes), given.name)
        return
    from store_places import local_place, s3_place

    with ExitStack() as stack:
        if given.store == "s3":
            from moto.server import ThreadedMotoServer

            logging.getLogger("werkzeug").setLevel(logging.ERROR)
            server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
            server.start()
            stack.callback(server.stop)
            place = s3_place("http://{}:{}".format(*server.get_host_and_port()))
        else:
            place = local_place(Path(given.store or stack.enter_context(tempfile.TemporaryDirectory())) / "store")
        place.open(create=True).close()
        done = run(
            place.url, place.options or {}, seconds=given.seconds, writers=given.writers, readers=given.readers,
            every=given.every, seed=given.seed,
        )  # fmt: skip
    print(f"{done.commits:,} commits by {given.writers} writers; {done.killed} killed, {done.in_doubt} in a commit")
    print(f"{done.documents:,} documents; {given.readers} readers looked {done.looks:,} times, read {done.read:,}")
    print(f"{len(done.failures)} failures", *done.failures[:20], sep="\n")
    sys.exit(1 if done.failures else 0)


if __name__ == "__main__":
    main()
