"""A scene for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slow_store import SlowStore
from store_places import Place
from tier_scene import CACHES, Scene


@pytest.fixture
def scene(local: Place, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """With the codec that the test is parametrized with, or ``raw``."""
    store = local.open(create=True, codec=getattr(request, "param", "raw"))
    store.commit(store.write_shard(list(CACHES.items())))
    made = Scene(SlowStore(store))
    yield made
    made.store.gate.set()
    for tiers in made.made:
        tiers.close()
