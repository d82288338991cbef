"""Token ids of documents that were met: with them a document can be computed even when its store is away."""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence

#: 4 bytes each: 16 MB at most, beside 2 x layers x ... of the caches that they stand for.
_MOST_TOKENS = 4_000_000


class TokenMemory:
    """Token ids by their digest, the longest unused ones forgotten first. Safe to use from several threads.

    Args:
        most_tokens: that are remembered.
    """

    def __init__(self, most_tokens: int = _MOST_TOKENS) -> None:
        self._most_tokens = most_tokens
        self._held = 0
        self._items: OrderedDict[str, array[int]] = OrderedDict()
        self._lock = threading.Lock()

    def __contains__(self, digest: str) -> bool:
        with self._lock:
            return digest in self._items

    def get(self, digest: str) -> list[int] | None:
        """The token ids with this digest, if they are remembered."""
        with self._lock:
            found = self._items.get(digest)
            if found is None:
                return None
            self._items.move_to_end(digest)
            return found.tolist()

    def add(self, digest: str, token_ids: Sequence[int]) -> None:
        """Remember them."""
        if len(token_ids) > self._most_tokens:
            return
        with self._lock:
            if digest in self._items:
                return
            self._items[digest] = array("I", token_ids)
            self._held += len(token_ids)
            while self._held > self._most_tokens:
                _, oldest = self._items.popitem(last=False)
                self._held -= len(oldest)
