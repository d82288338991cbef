"""Some seconds of ``stress_store.py``: writers that are killed, readers that look all the time."""

from __future__ import annotations

from store_places import Place
from stress_store import run


def test_nothing_committed_is_lost_and_nothing_else_is_seen(place: Place) -> None:
    place.open(create=True)
    done = run(place.url, place.options or {}, seconds=6, writers=2, readers=1, every=1.5)
    assert done.failures == []
    assert done.killed >= 2
    assert min(done.commits, done.looks, done.read) > 0
