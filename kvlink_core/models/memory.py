"""Memory for the keys and values of prompts, kept from one request to the next.

On a CPU the first touch of a fresh page costs several times what writing to it costs: for a context of 5,000 tokens
that is as much as all the copying and rotating. On accelerators torch keeps memory itself.
"""

from __future__ import annotations

import math
import threading

import torch


class SlotMemory:
    """A free list of CPU buffers. Safe to use from several threads.

    Args:
        idle_bytes: the most to keep for later; what comes back beyond that is let go, the oldest first.
    """

    def __init__(self, idle_bytes: int = 2**30) -> None:
        self._idle_bytes = idle_bytes
        self._idle: list[torch.Tensor] = []
        self._lock = threading.Lock()

    def take(self, nbytes: int) -> torch.Tensor:
        """A buffer, uint8 ``[at least nbytes]``, its content undefined; give it back when nobody uses it any more."""
        with self._lock:
            fitting = [b for b in self._idle if nbytes <= b.shape[0] <= 4 * nbytes]
            if fitting:
                best = min(fitting, key=lambda b: b.shape[0])
                self._idle = [b for b in self._idle if b is not best]
                return best
        # A quarter more, so that the next, slightly longer prompt fits too.
        return torch.empty(nbytes + nbytes // 4, dtype=torch.uint8)

    def give(self, buffer: torch.Tensor) -> None:
        """Take a buffer back."""
        with self._lock:
            self._idle.append(buffer)
            while sum(b.shape[0] for b in self._idle) > self._idle_bytes:
                del self._idle[0]


def view(buffer: torch.Tensor, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """``buffer`` from byte ``offset`` on as a tensor of ``shape``."""
    end = offset + math.prod(shape) * dtype.itemsize
    return buffer[offset:end].view(dtype).view(shape)
