"""Tiers over a real store of eight documents, behind a wire that tests can slow down, cut and hold up."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from slow_store import SlowStore
from store_places import Place, make_cache

from kvlink_core.store.tiers import CacheKey, TieredCache, TierSettings, Wanted

CACHES = {f"d{n}": make_cache(40 + 17 * n, n) for n in range(8)}


class Scene:
    """The store, and tiers over it that are closed in the end."""

    def __init__(self, store: SlowStore) -> None:
        self.store = store
        self.rows = store.lookup(CACHES)
        self.made: list[TieredCache] = []

    def tiers(self, **changes: Any) -> TieredCache:
        """New ones; by default, 1 MiB of host memory, and loading whatever can be loaded."""
        accept = changes.pop("accept", lambda cache: None)
        settings = TierSettings(**{"host_bytes": 2**20, "recompute": "never", "timeout_s": 20.0, **changes})
        self.made.append(TieredCache(settings, device=torch.device("cpu"), payloads=self.store, accept=accept))
        return self.made[-1]

    def wanted(self, *names: str, computable: bool = True) -> list[Wanted]:
        return [Wanted(CacheKey.of(self.rows[n]), self.rows[n], CACHES[n].tokens, computable) for n in names]

    def key(self, name: str) -> CacheKey:
        return CacheKey.of(self.rows[name])


@pytest.fixture(params=["raw"])
def scene(local: Place, request: pytest.FixtureRequest) -> Iterator[Scene]:
    store = local.open(create=True, codec=request.param)
    store.commit(store.write_shard(list(CACHES.items())))
    made = Scene(SlowStore(store))
    yield made
    made.store.open.set()
    for tiers in made.made:
        tiers.close()


@pytest.fixture
def soon() -> Callable[[Callable[[], object]], None]:
    """Waits until something is true, for ten seconds at most."""
    import time

    def wait(what: Callable[[], object]) -> None:
        deadline = time.monotonic() + 10
        while not what():
            assert time.monotonic() < deadline
            time.sleep(0.002)

    return wait
