"""Computing documents that are not to be had otherwise, each once for all who want it at the same time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import torch

from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memories import Memories
from kvlink_core.types import DocumentCache

Documents = Mapping[CacheKey, Sequence[int]]
Encode = Callable[[list[Sequence[int]]], list[DocumentCache]]


class Computing:
    """Safe to use from several threads.

    Args:
        memories: keep what was computed.
        observe: is told how many tokens took how many seconds.
    """

    def __init__(self, memories: Memories, observe: Callable[[int, float], None]) -> None:
        self._memories = memories
        self._observe = observe
        self._lock = threading.Lock()
        self._running: dict[CacheKey, Future[DocumentCache]] = {}

    def compute(self, documents: Documents, encode: Encode) -> dict[CacheKey, DocumentCache]:
        """The caches of documents of known token ids.

        Raises what ``encode`` raises, for documents of this call alone.
        """
        mine: dict[CacheKey, Future[DocumentCache]] = {}
        theirs: dict[CacheKey, Future[DocumentCache]] = {}
        done: dict[CacheKey, DocumentCache] = {}
        with self._lock:
            for key in documents:
                # What another thread has finished since it was looked for is in memory now: it is kept before it ends.
                if key in self._running:
                    theirs[key] = self._running[key]
                elif (found := self._memories.get(key, promote=False)) is not None and found.cache is not None:
                    done[key] = found.cache
                else:
                    mine[key] = self._running[key] = Future()
        try:
            done |= self._encode({key: documents[key] for key in mine}, encode)
            for key, future in mine.items():
                future.set_result(done[key])
        except BaseException as error:
            for future in mine.values():
                future.set_exception(error)
            raise
        finally:
            with self._lock:
                for key in mine:
                    del self._running[key]
        # Only now, having finished ours: two calls that wait for each other would wait for ever.
        done |= {key: future.result() for key, future in theirs.items() if future.exception() is None}
        # Another call may have failed because of a document that is not ours.
        return done | self._encode({key: documents[key] for key in theirs if key not in done}, encode)

    def calibrate(self, lengths: Sequence[int], encode: Encode) -> None:
        """Compute documents of these lengths, keep nothing, and tell how long it took: each the least of three times.

        Rather too little than too much: what is believed to be fast is used, and seen to be slower; what is believed
        to be slow is not.
        """
        for tokens in lengths:
            self._observe(tokens, min(_timed([[0] * tokens], encode)[1] for _ in range(3)))

    def _encode(self, documents: Documents, encode: Encode) -> dict[CacheKey, DocumentCache]:
        if not documents:
            return {}
        caches, seconds = _timed(list(documents.values()), encode)
        self._observe(sum(c.tokens for c in caches), seconds)
        done = dict(zip(documents, caches, strict=True))
        for key, cache in done.items():
            self._memories.keep(key.computed(), cache)
        return done


def _timed(documents: list[Sequence[int]], encode: Encode) -> tuple[list[DocumentCache], float]:
    started = time.perf_counter()
    caches = encode(documents)
    if caches[0].keys.is_cuda:  # what was only handed to the GPU so far has not been computed
        torch.cuda.current_stream(caches[0].keys.device).synchronize()
    return caches, time.perf_counter() - started
