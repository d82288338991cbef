"""The tiers that need no reading: device memory over host memory."""

from __future__ import annotations

from dataclasses import fields, replace

import torch

from kvlink_core.store.tiers.found import Found, Tier
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memory import open_memory
from kvlink_core.store.tiers.memory_tier import MemoryTier, TierStats
from kvlink_core.types import DocumentCache


class Memories:
    """Device and host memory, either of which may be left out. Safe to use from several threads.

    Args:
        device_bytes, host_bytes: sizes; 0 leaves that tier out.
        device: the model's. Where it is a GPU, host memory is locked in place.

    Raises:
        ConfigError: memory cannot be had.
    """

    def __init__(self, device_bytes: int, host_bytes: int, device: torch.device) -> None:
        pinned = device.type == "cuda"
        self._model_on = device
        self.device = MemoryTier(open_memory(device_bytes, device, pinned=False)) if device_bytes else None
        self.host = MemoryTier(open_memory(host_bytes, None, pinned=pinned)) if host_bytes else None

    def stats(self) -> dict[Tier, TierStats]:
        """Of the tiers that there are."""
        named: tuple[tuple[Tier, MemoryTier | None], ...] = (("device", self.device), ("host", self.host))
        return {name: tier.stats for name, tier in named if tier is not None}

    def __contains__(self, key: CacheKey) -> bool:
        return any(k in tier for k in (key, key.computed()) for tier in (self.device, self.host) if tier is not None)

    def where(self, key: CacheKey) -> list[Tier]:
        """The memory tiers that hold a document, the fastest first; looking does not count as use."""
        named: tuple[tuple[Tier, MemoryTier | None], ...] = (("device", self.device), ("host", self.host))
        return [n for n, tier in named if tier is not None and any(k in tier for k in (key, key.computed()))]

    def get(self, key: CacheKey, *, promote: bool = True) -> Found | None:
        """The cache of ``key``, or the same document's as it was computed here, which loses nothing to a codec.

        With ``promote``, what is in host memory is taken to the device: it has to go there anyway to be linked.
        """
        for wanted in dict.fromkeys((key, key.computed())):
            if self.device is not None and (cache := self.device.get(wanted)) is not None:
                return Found(cache, "device")
            if self.host is not None and (cache := self.host.get(wanted)) is not None:
                return Found(self._promoted(wanted, cache) if promote else cache, "host")
        return None

    def _promoted(self, key: CacheKey, cache: DocumentCache) -> DocumentCache:
        if self.device is None or not self.device.put(key, cache):
            return cache
        return self.device.get(key) or cache

    def place(self, cache: DocumentCache) -> DocumentCache:
        """The cache where the model is: it has to go there to be linked, and then it can be kept there."""
        if self._model_on.type == "cpu" or cache.keys.device == self._model_on:
            return cache
        moved = {f.name: getattr(cache, f.name) for f in fields(cache) if f.name != "token_ids"}
        placed = replace(cache, **{n: t.to(self._model_on) for n, t in moved.items() if t is not None})
        torch.cuda.current_stream(self._model_on).synchronize()
        return placed

    def keep(self, key: CacheKey, cache: DocumentCache, placed: DocumentCache | None = None) -> None:
        """Keep a copy in each tier that has room for it.

        Args:
            key: what it is found by.
            cache: wherever it is.
            placed: the same where the model is, if it is there already.
        """
        if self.device is not None:
            self.device.put(key, placed or cache)
        if self.host is not None:
            self.host.put(key, cache)

    def close(self) -> None:
        """Forget everything. What is lent stays valid."""
        for tier in (self.device, self.host):
            if tier is not None:
                tier.close()
