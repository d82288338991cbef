"""The namespaces of one replica: for each a session of its own over one model, opened when it is first asked for.

Nothing of one namespace is found through another: each has its own view of the catalog. Which namespaces there are
is the ingress's to say, from its keys; a request never names one.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from kvlink_core.session import Session
from kvlink_core.store import DocumentStore
from serve.wire import ApiError, ApiException


@dataclass(slots=True, eq=False)
class Opened:
    """A namespace: its session, its store if there is one, how to close them, and how many use it now."""

    session: Session
    store: DocumentStore | None
    close: Callable[[], None]
    users: int = 0


class Namespaces:
    """Opens namespaces and closes the one that was used longest ago when there are too many. Safe for several threads.

    Args:
        open_one: opens one by name; may take as long as reading its catalog does.
        most: how many are held open at a time.
    """

    def __init__(self, open_one: Callable[[str], Opened], *, most: int) -> None:
        self._open_one = open_one
        self._most = most
        self._lock = threading.Lock()
        self._opening = threading.Lock()
        self._held: OrderedDict[str, Opened] = OrderedDict()

    @contextmanager
    def use(self, name: str) -> Iterator[Opened]:
        """A namespace, held open while it is used. Blocks where it has to be opened.

        Raises:
            ApiException: as many as allowed are in use.
            StoreError: the store does not answer.
        """
        opened = self._take(name) or self._open(name)
        try:
            yield opened
        finally:
            with self._lock:
                opened.users -= 1

    def is_open(self, name: str) -> bool:
        """Whether ``use`` would not block."""
        return name in self._held

    def _take(self, name: str) -> Opened | None:
        with self._lock:
            opened = self._held.get(name)
            if opened is not None:
                opened.users += 1
                self._held.move_to_end(name)
            return opened

    def _open(self, name: str) -> Opened:
        with self._opening:  # one at a time: two that ask for the same one must not open it twice
            if (found := self._take(name)) is not None:
                return found
            self._make_room()
            opened = self._open_one(name)
            opened.users = 1
            with self._lock:
                self._held[name] = opened
            return opened

    def _make_room(self) -> None:
        with self._lock:
            if len(self._held) < self._most:
                return
            idle = next((name for name, opened in self._held.items() if not opened.users), None)
            if idle is None:
                message = "too many namespaces are in use; try again."
                raise ApiException(ApiError(503, message, "overloaded", retry_after_s=1.0))
            closed = self._held.pop(idle)
        closed.close()
