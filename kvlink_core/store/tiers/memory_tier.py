"""Decoded caches kept in memory, ready to be linked."""

from __future__ import annotations

import functools
import math
import threading
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, fields

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
    parts: Mapping[str, tuple[torch.Size, torch.dtype]]  # of the block, one after the other
    beside: Mapping[str, torch.Tensor]  # what the block has no place for
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
            self._lent_bytes += entry.block.nbytes if not entry.leases else 0
            entry.leases += 1
            lent = self._memory.lend(entry.block, functools.partial(self._ended.append, entry))
        return DocumentCache(**_views(lent, entry))

    def put(self, key: CacheKey, cache: DocumentCache) -> bool:
        """Keep a copy of ``cache``, evicting others for it; false when there is no room that is not in use."""
        inside, beside = _split(cache, self._memory.on_device)
        with self._lock:
            self._settle()
            if key in self._entries or key in self._filling:
                return True
            block = None if self._closed else self._room(sum(_rounded(t.nbytes) for t in inside.values()))
            if block is None:
                self._refused += 1
                return False
            self._filling.add(key)
            space = self._memory.lend(block, lambda: None)
        entry = _Entry(block, {name: (t.shape, t.dtype) for name, t in inside.items()}, beside)
        try:
            for name, view in _views(space, entry).items():
                if name in inside:
                    _copy(inside[name], view)
            if self._memory.on_device:  # whoever reads it may do so in another stream
                torch.cuda.current_stream(space.device).synchronize()
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

    def close(self) -> None:
        """Forget everything. What is lent stays valid."""
        with self._lock:
            self._closed = True
            self._entries.clear()
            self._memory.close()

    def _room(self, nbytes: int) -> Block | None:
        """Memory for ``nbytes``, by evicting what is not lent; evicts nothing where the bytes would not suffice."""
        if self._memory.counted(nbytes) > self._memory.capacity - self._lent_bytes:
            return None
        while (block := self._memory.take(nbytes)) is None:
            key = self._policy.evict(lambda k: not self._entries[k].leases)
            if key is None:
                return None
            self._memory.give(self._entries.pop(key).block)
            self._evictions += 1
        return block

    def _settle(self) -> None:
        """Count the leases that have ended."""
        while self._ended:
            entry = self._ended.popleft()
            entry.leases -= 1
            self._lent_bytes -= entry.block.nbytes if not entry.leases else 0


def _split(cache: DocumentCache, on_device: bool) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a cache by name: those for the tier's memory, and those that stay outside."""
    tensors = {f.name: getattr(cache, f.name) for f in fields(cache)}
    inside = {name: t for name, t in tensors.items() if t is not None and not (on_device and name == "token_ids")}
    return inside, {"token_ids": cache.token_ids.cpu().clone()} if on_device else {}


def _views(lent: torch.Tensor, entry: _Entry) -> dict[str, torch.Tensor]:
    """The tensors of an entry by name, over its memory."""
    views = dict(entry.beside)
    at = 0
    for name, (shape, dtype) in entry.parts.items():
        nbytes = math.prod(shape) * dtype.itemsize
        views[name] = lent[at : at + nbytes].view(dtype).view(shape)
        at += _rounded(nbytes)
    return views


def _rounded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.device.type == target.device.type == "cpu":
        # Not torch's copy, which would start threads of its own for each thread that copies.
        np.copyto(_flat(target).numpy(), _flat(source.contiguous()).numpy())
    else:
        target.copy_(source)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
