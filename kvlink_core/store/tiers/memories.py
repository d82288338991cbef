"""The tiers that need no reading: device memory over host memory."""

from __future__ import annotations

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
        self.device = MemoryTier(open_memory(device_bytes, device, pinned=False)) if device_bytes else None
        self.host = MemoryTier(open_memory(host_bytes, None, pinned=pinned)) if host_bytes else None

    def stats(self) -> dict[Tier, TierStats]:
        """Of the tiers that there are."""
        named: tuple[tuple[Tier, MemoryTier | None], ...] = (("device", self.device), ("host", self.host))
        return {name: tier.stats for name, tier in named if tier is not None}

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

    def keep(self, key: CacheKey, cache: DocumentCache) -> None:
        """Keep a cache where it is now, if there is a tier for that, and in host memory."""
        if self.device is not None and cache.keys.device.type != "cpu":
            self.device.put(key, cache)
        if self.host is not None:
            self.host.put(key, cache)

    def close(self) -> None:
        """Forget everything. What is lent stays valid."""
        for tier in (self.device, self.host):
            if tier is not None:
                tier.close()
