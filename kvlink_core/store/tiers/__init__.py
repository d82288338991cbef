"""Document caches kept near the model: device memory, host memory, local disk, each of a fixed size."""

from kvlink_core.store.tiers.cache import CacheStats, TieredCache
from kvlink_core.store.tiers.found import TIERS, Found, Tier, Wanted
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.loading import ReadStats
from kvlink_core.store.tiers.memory_tier import TierStats
from kvlink_core.store.tiers.settings import TierSettings

__all__ = [
    "TIERS", "CacheKey", "CacheStats", "Found", "ReadStats", "Tier", "TierSettings", "TierStats", "TieredCache",
    "Wanted",
]  # fmt: skip
