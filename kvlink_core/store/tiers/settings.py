"""How large the tiers are, and how long a store is waited for."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kvlink_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TierSettings:
    """Sizes are bytes of this process; 0 leaves a tier out. Raises ``ConfigError`` for what is impossible.

    Attributes:
        device_bytes: GPU memory for caches, beside weights and the contexts of running requests.
        host_bytes: host memory for decoded caches; locked in place where the model is on a GPU.
        disk_bytes: local disk for copies of payloads, encoded as in the store.
        disk_path: directory for them.
        threads: rounds of reading that may run at the same time.
        timeout_s: a store that takes longer to answer has failed.
        failures: so many in a row, and the store is left alone...
        retry_after_s: ...for so long, then tried with one request; doubled each time that fails, up to a minute.
        recompute: ``auto`` computes a document again where that is expected to be faster than loading it; ``never``
            loads whatever can be loaded.
        probe_every_s: how often a source that ``auto`` avoids is tried, beside the request, to see if it is faster now.
    """

    device_bytes: int = 0
    host_bytes: int = 0
    disk_bytes: int = 0
    disk_path: str | Path | None = None
    threads: int = 4
    timeout_s: float = 10.0
    failures: int = 3
    retry_after_s: float = 5.0
    recompute: Literal["auto", "never"] = "auto"
    probe_every_s: float = 10.0

    def __post_init__(self) -> None:
        for name in ("device_bytes", "host_bytes", "disk_bytes", "retry_after_s", "probe_every_s"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be 0 or more.", param=name)
        for name in ("threads", "failures", "timeout_s"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be more than 0.", param=name)
        if self.recompute not in ("auto", "never"):
            raise ConfigError(f"recompute is {self.recompute!r}; it must be 'auto' or 'never'.", param="recompute")
        if bool(self.disk_bytes) != (self.disk_path is not None):
            raise ConfigError("the disk tier needs both disk_path and disk_bytes.", param="disk_path")
