"""Decoded caches kept in memory, ready to be linked."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from dataclasses import dataclass

import numpy as np
import torch

from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memory import Block, Memory
from kvlink_core.store.tiers.s3fifo import S3Fifo
from kvlink_core.types import DocumentCache

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class TierStats:
    """What a tier holds, and what happened to it since start."""

    capacity: int
    nbytes: int
    documents: int
    evictions: int
    refused: int


@dataclass(slots=True)
class _Entry:
    block: Block
    keys: tuple[tuple[int, ...], torch.dtype]
    values: tuple[tuple[int, ...], torch.dtype]
    kept: bool  # whether the document is pruned
    token_ids: torch.Tensor | None  # where the memory has no place for them
    tokens: int
    leases: int = 0


class MemoryTier:
    """Copies of document caches in a fixed amount of memory. Safe to use from several threads.

    A cache that is lent is not evicted, and its memory is not used for anything else, until the last tensor of it is
    gone. The positions of a pruned cache count like keys and values, and so do token ids, but on an accelerator's,
    where they stay in ordinary memory.
    """

    def __init__(self, memory: Memory) -> None:
        self._memory = memory
        self._policy: S3Fifo[CacheKey] = S3Fifo(memory.capacity)
        self._entries: dict[CacheKey, _Entry] = {}
        self._filling: set[CacheKey] = set()
        self._lent_bytes = 0
        self._evictions = self._refused = 0
        self._lock = threading.Lock()
        # What leases call when they end, in the middle of anything: so without the lock, and counted later.
        self._ended: deque[_Entry] = deque()
        self._closed = False

    @property
    def stats(self) -> TierStats:
        """A consistent copy."""
        with self._lock:
            memory = self._memory
            return TierStats(memory.capacity, memory.nbytes, len(self._entries), self._evictions, self._refused)

    def __contains__(self, key: CacheKey) -> bool:
        with self._lock:
            return key in self._entries

    def get(self, key: CacheKey) -> DocumentCache | None:
        """The cache of ``key``, lent for as long as its tensors live; ``None`` if it is not here."""
        with self._lock:
            self._settle()
            entry = self._entries.get(key)
            if entry is None:
                return None
            self._policy.hit(key)
            self._lend(entry)
        return self._cache(entry, self._memory.lend(entry.block, functools.partial(self._ended.append, entry)))

    def put(self, key: CacheKey, cache: DocumentCache) -> bool:
        """Keep a copy of ``cache``, evicting others for it; false when there is no room that is not in use."""
        in_block = [cache.keys, cache.values] + ([] if cache.kept is None else [cache.kept])
        in_block += [] if self._memory.on_device else [cache.token_ids]
        with self._lock:
            self._settle()
            if key in self._entries or key in self._filling:
                return True
            block = None if self._closed else self._room(sum(_rounded(t.nbytes) for t in in_block))
            if block is None:
                self._refused += 1
                return False
            self._filling.add(key)
        entry = _Entry(
            block, (tuple(cache.keys.shape), cache.keys.dtype), (tuple(cache.values.shape), cache.values.dtype),
            cache.kept is not None, cache.token_ids.cpu().clone() if self._memory.on_device else None, cache.tokens,
        )  # fmt: skip
        try:
            self._fill(entry, cache)
        except BaseException:
            with self._lock:
                self._filling.discard(key)
                self._memory.give(block)
            raise
        with self._lock:
            self._filling.discard(key)
            if self._closed:
                return False
            self._entries[key] = entry
            self._policy.add(key, block.nbytes)
        return True

    def _fill(self, entry: _Entry, cache: DocumentCache) -> None:
        into = self._cache(entry, self._memory.lend(entry.block, lambda: None))
        _copy(cache.keys, into.keys)
        _copy(cache.values, into.values)
        if cache.kept is not None and into.kept is not None:
            _copy(cache.kept, into.kept)
        if not self._memory.on_device:
            _copy(cache.token_ids, into.token_ids)

    def close(self) -> None:
        """Forget everything. What is lent stays valid."""
        with self._lock:
            self._closed = True
            self._entries.clear()
            self._memory.close()

    def _room(self, nbytes: int) -> Block | None:
        """Memory for ``nbytes``, by evicting what is not lent; evicts nothing where the bytes would not suffice."""
        if nbytes > self._memory.capacity - self._lent_bytes:
            return None
        while (block := self._memory.take(nbytes)) is None:
            key = self._policy.evict(lambda k: not self._entries[k].leases)
            if key is None:
                return None
            self._memory.give(self._entries.pop(key).block)
            self._evictions += 1
        return block

    def _lend(self, entry: _Entry) -> None:
        self._lent_bytes += entry.block.nbytes if not entry.leases else 0
        entry.leases += 1

    def _settle(self) -> None:
        """Count the leases that have ended."""
        while self._ended:
            entry = self._ended.popleft()
            entry.leases -= 1
            self._lent_bytes -= entry.block.nbytes if not entry.leases else 0

    def _cache(self, entry: _Entry, lent: torch.Tensor) -> DocumentCache:
        keys, at = _part(lent, 0, *entry.keys)
        values, at = _part(lent, at, *entry.values)
        kept = None
        if entry.kept:
            kept, at = _part(lent, at, entry.keys[0][:3], torch.int32)
        token_ids = entry.token_ids if entry.token_ids is not None else _part(lent, at, (entry.tokens,), torch.int64)[0]
        return DocumentCache(token_ids, keys, values, kept)


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _part(lent: torch.Tensor, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[torch.Tensor, int]:
    end = at + math.prod(shape) * dtype.itemsize
    return lent[at:end].view(dtype).view(shape), _rounded(end)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.device.type == target.device.type == "cpu":
        # Not torch's copy, which would start threads of its own for each thread that copies.
        np.copyto(_flat(target).numpy(), _flat(source.contiguous()).numpy())
    else:
        target.copy_(source)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
