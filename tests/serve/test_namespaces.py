"""Namespaces of a replica: opened once, bounded, and not closed under those who use them."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from serve.namespaces import Namespaces, Opened
from serve.wire import ApiException


class Opener:
    def __init__(self) -> None:
        self.opened: list[str] = []
        self.closed: list[str] = []
        self.slow = threading.Event()
        self.slow.set()

    def __call__(self, name: str) -> Opened:
        assert self.slow.wait(30)
        self.opened.append(name)
        session: Any = name
        return Opened(session, None, lambda: self.closed.append(name))


def test_each_is_opened_once_and_the_one_used_longest_ago_makes_room() -> None:
    opener = Opener()
    namespaces = Namespaces(opener, most=2)
    for name in ("a", "b", "a", "c", "a"):
        with namespaces.use(name) as opened:
            assert opened.session == name  # type: ignore[comparison-overlap]
    assert opener.opened == ["a", "b", "c"]
    assert opener.closed == ["b"]
    assert namespaces.is_open("a")
    assert not namespaces.is_open("b")


def test_those_in_use_stay_and_when_all_are_more_is_refused() -> None:
    opener = Opener()
    namespaces = Namespaces(opener, most=2)
    with namespaces.use("a"):
        with namespaces.use("b"), pytest.raises(ApiException) as refused, namespaces.use("c"):
            pass
        assert refused.value.error.status == 503
        with namespaces.use("c"):
            pass
    assert opener.closed == ["b"]


def test_two_that_ask_at_once_share_one() -> None:
    opener = Opener()
    opener.slow.clear()
    namespaces = Namespaces(opener, most=2)

    def use() -> int:
        with namespaces.use("a") as opened:
            return id(opened)

    with ThreadPoolExecutor(4) as pool:
        asked = [pool.submit(use) for _ in range(4)]
        opener.slow.set()
        assert len({each.result() for each in asked}) == 1
    assert opener.opened == ["a"]


def test_what_cannot_be_opened_is_tried_again() -> None:
    faults = [OSError("away")]

    def open_one(name: str) -> Opened:
        if faults:
            raise faults.pop()
        session: Any = name
        return Opened(session, None, lambda: None)

    namespaces = Namespaces(open_one, most=1)
    with pytest.raises(OSError, match="away"), namespaces.use("a"):
        pass
    with namespaces.use("a"):
        pass
