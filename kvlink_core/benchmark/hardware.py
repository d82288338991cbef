"""What figures were measured on, and whether anything else was at work there."""

from __future__ import annotations

import os
import platform
import time
from pathlib import Path

import torch
import transformers

from kvlink_core import __version__
from kvlink_core.benchmark.results import Hardware

#: The share of all cores that others may keep busy before figures are called doubtful.
BUSY_SHARE = 0.1


class CoreWatch:
    """Counts, from when it is made, how busy other processes keep the machine's cores."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        self._stat = stat
        self._load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        self._started = self._sample()

    @property
    def load_before(self) -> float | None:
        """The load average over the minute before, or ``None`` where the system keeps none."""
        return self._load

    def others(self) -> float | None:
        """Cores that other processes kept busy on average so far, or ``None`` where the system does not say."""
        now = self._sample()
        if now is None or self._started is None:
            return None
        elapsed, busy, own = (b - a for a, b in zip(self._started, now, strict=True))
        return max(0.0, (busy - own) / elapsed) if elapsed > 0 else None

    def warning(self) -> str | None:
        """Why figures are not to be trusted, or ``None``."""
        cores = os.cpu_count() or 1
        others = self.others()
        if others is not None and others > BUSY_SHARE * cores:
            load = f" (load average before: {self._load:.2f})" if self._load is not None else ""
            return f"other processes kept {others:.1f} of {cores} cores busy{load}: do not trust these figures."
        if others is None and self._load is not None and self._load > BUSY_SHARE * cores:
            return f"the load average before was {self._load:.2f} on {cores} cores: these figures may be disturbed."
        return None

    def _sample(self) -> tuple[float, float, float] | None:
        """Seconds by the clock, of all cores' work, and of this process and its children."""
        try:
            fields = self._stat.read_text("ascii").split("\n", 1)[0].split()
            user, nice, system, _, _, irq, softirq, steal = (int(f) for f in fields[1:9])
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        return time.monotonic(), (user + nice + system + irq + softirq + steal) / ticks, sum(os.times()[:4])


def describe_hardware(device: torch.device, watch: CoreWatch) -> Hardware:
    """The machine, as it was while ``watch`` looked."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return Hardware(
        cpu=_processor(),
        cores=_cores(),
        threads=torch.get_num_threads(),
        memory_gib=_memory_gib(),
        gpu=gpu.name if gpu else None,
        gpu_memory_gib=round(gpu.total_memory / 2**30, 1) if gpu else None,
        load_before=watch.load_before,
        others_busy=watch.others(),
    )


def describe_versions() -> dict[str, str]:
    """Versions of everything that computes."""
    versions = {
        "kvlink": __version__,
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "system": f"{platform.system()} {platform.machine()}",
    }
    return versions | ({"cuda": torch.version.cuda} if torch.version.cuda else {})


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _cores() -> int:
    """Cores that this process may use: what the scheduler allows, and no more than a container's quota."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text("ascii").split()
        return usable if quota == "max" else max(1, min(usable, round(int(quota) / int(period))))
    except (OSError, ValueError):
        return usable


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30, 1)
    except (ValueError, OSError):
        return None
