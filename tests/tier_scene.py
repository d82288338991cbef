"""Tiers over a real store of eight documents, behind a wire that tests can slow down, cut and hold up."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from slow_store import SlowStore
from store_places import make_cache

from kvlink_core.store.tiers import CacheKey, TieredCache, TierSettings, Wanted

CACHES = {f"d{n}": make_cache(40 + 17 * n, n) for n in range(8)}


class Scene:
    """The store, and tiers over it that are closed in the end."""

    def __init__(self, store: SlowStore) -> None:
        self.store = store
        self.rows = store.lookup(CACHES)
        self.made: list[TieredCache] = []

    def tiers(self, *, alone: bool = False, **changes: Any) -> TieredCache:
        """New ones; by default, 1 MiB of host memory, and loading whatever can be loaded. ``alone``: no store."""
        accept = changes.pop("accept", lambda cache: None)
        settings = TierSettings(**{"host_bytes": 2**20, "recompute": "never", "timeout_s": 20.0, **changes})
        payloads = None if alone else self.store
        self.made.append(TieredCache(settings, device=torch.device("cpu"), payloads=payloads, accept=accept))
        return self.made[-1]

    def wanted(self, *names: str, computable: bool = True) -> list[Wanted]:
        return [Wanted(CacheKey.of(self.rows[n]), self.rows[n], CACHES[n].tokens, computable) for n in names]

    def key(self, name: str) -> CacheKey:
        return CacheKey.of(self.rows[name])


class Clock:
    """Time that stands still until it is moved."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def soon(what: Callable[[], object]) -> None:
    """Wait until something is true, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def reading_threads() -> list[str]:
    """Threads of tiers that live."""
    return [t.name for t in threading.enumerate() if t.name in ("kvlink-disk", "kvlink-store")]


def kept(tiers: TieredCache) -> None:
    """Wait until everything that was on its way is where it is kept."""
    soon(lambda: not tiers._flights._flying)


def on_disk(directory: Path) -> int:
    """Bytes that the file system has given out for files, as ``du`` counts them."""
    total = 0
    for path in directory.rglob("*"):
        try:
            status = path.stat()
        except FileNotFoundError:
            continue
        total += max(status.st_blocks * 512, status.st_size) if path.is_file() else 0
    return total
