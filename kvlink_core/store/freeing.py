"""Memory that is free again, back to the system."""

from __future__ import annotations

import ctypes
import sys

import pyarrow as pa


def release_free_memory() -> None:
    """Give back what Arrow and the C library keep for later; of use after much was taken for a moment.

    The C library is asked where it can be (glibc); elsewhere it decides for itself.
    """
    pa.default_memory_pool().release_unused()
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
