"""Memory of a fixed size for the caches of a tier: counted before it is taken, and never lent out twice.

What is lent is a tensor over a *lease*, an object whose end is noticed: a block counts as in use for as long as any
tensor over it lives, whoever holds it, so nobody has to remember to hand anything back.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from kvlink_core.errors import ConfigError
from kvlink_core.store.tiers.arena import Arena

_PAGE = mmap.PAGESIZE

#: Kernels and copies of a GPU are fastest from addresses that are multiples of this.
_GPU_ALIGNMENT = 512

_Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True, eq=False)
class Block:
    """Memory that is taken. ``nbytes`` is what it counts, ``place`` is its memory's own business."""

    nbytes: int
    place: Any


class Memory(Protocol):
    """Memory of ``capacity`` bytes. Not thread-safe, but for ``lend``."""

    @property
    def capacity(self) -> int:
        """Bytes that there are."""
        ...

    @property
    def nbytes(self) -> int:
        """Bytes that are taken."""
        ...

    @property
    def on_device(self) -> bool:
        """Whether it is an accelerator's, so that token ids have no business there."""
        ...

    def counted(self, nbytes: int) -> int:
        """What a block for ``nbytes`` would count."""
        ...

    def take(self, nbytes: int) -> Block | None:
        """Memory for ``nbytes``, or ``None`` when there is none now; counted before it is allocated."""
        ...

    def give(self, block: Block) -> None:
        """Take a block back, of which nothing is lent."""
        ...

    def lend(self, block: Block, ended: Callable[[], None]) -> torch.Tensor:
        """The block as uint8 ``[at least its bytes]``; ``ended`` is called when the last tensor over it is gone.

        It may be called at any time by any thread, also in the middle of other code of this one: it must take no lock.
        """
        ...

    def close(self) -> None:
        """Let the memory go; what is lent stays valid."""
        ...


class HeapMemory:
    """Host memory, allocated block by block: nothing is lost to holes.

    Args:
        capacity: bytes.
        allocate: makes an uninitialised array of as many bytes.
    """

    on_device = False

    def __init__(self, capacity: int, allocate: Callable[[int], _Bytes] = lambda n: np.empty(n, np.uint8)) -> None:
        self.capacity = capacity
        self._allocate = allocate
        self._nbytes = 0
        # Arrays that exist, and those that no longer do: what counts is when memory is free, not when it was given up.
        self._alive: dict[int, tuple[weakref.ref[_Bytes], int]] = {}
        self._freed: deque[weakref.ref[_Bytes]] = deque()

    @property
    def nbytes(self) -> int:
        """See ``Memory``."""
        while self._freed:
            _, counted = self._alive.pop(id(self._freed.popleft()))
            self._nbytes -= counted
        return self._nbytes

    def counted(self, nbytes: int) -> int:
        """Whole pages, and one for the allocator's own notes."""
        return (-(-nbytes // _PAGE) + 1) * _PAGE

    def take(self, nbytes: int) -> Block | None:
        """See ``Memory.take``."""
        counted = self.counted(nbytes)
        if self.nbytes + counted > self.capacity:
            return None
        self._nbytes += counted
        try:
            array = self._allocate(nbytes)
        except MemoryError:
            self._nbytes -= counted
            return None
        freed = weakref.ref(array, self._freed.append)
        self._alive[id(freed)] = (freed, counted)
        return Block(counted, [array])

    def give(self, block: Block) -> None:
        """See ``Memory.give``."""
        block.place.clear()

    def lend(self, block: Block, ended: Callable[[], None]) -> torch.Tensor:
        """See ``Memory.lend``."""
        return _lend(block.place[0][:], ended)

    def close(self) -> None:
        """See ``Memory.close``."""


class PinnedMemory:
    """Host memory that a GPU reads at the full speed of its bus: one piece, locked in place once.

    Torch's own pinned memory would be rounded up to a power of two.
    """

    on_device = False

    def __init__(self, capacity: int) -> None:
        self._arena = Arena(capacity, alignment=_GPU_ALIGNMENT)
        self.capacity = self._arena.capacity
        self._bytes = np.frombuffer(mmap.mmap(-1, max(self.capacity, _PAGE)), np.uint8)
        self._registered = self._bytes.ctypes.data
        error = _cudart().cudaHostRegister(self._registered, len(self._bytes), 0)
        if int(error) != 0:
            raise ConfigError(
                f"the system does not lock {self.capacity} bytes of host memory for the GPU (CUDA error {int(error)}); "
                "lower the host tier's size, or raise the limit on locked memory (ulimit -l).",
                param="host_bytes",
            )

    @property
    def nbytes(self) -> int:
        """See ``Memory``."""
        return self.capacity - self._arena.free_bytes

    def counted(self, nbytes: int) -> int:
        """See ``Memory``."""
        return self._arena.rounded(nbytes)

    def take(self, nbytes: int) -> Block | None:
        """See ``Memory.take``."""
        return _take(self._arena, nbytes)

    def give(self, block: Block) -> None:
        """See ``Memory.give``."""
        self._arena.give(block.place)

    def lend(self, block: Block, ended: Callable[[], None]) -> torch.Tensor:
        """See ``Memory.lend``."""
        return _lend(self._bytes[block.place : block.place + block.nbytes], ended)

    def close(self) -> None:
        """See ``Memory.close``."""
        if self._registered:
            _cudart().cudaHostUnregister(self._registered)
            self._registered = 0


class CudaMemory:
    """Memory of a GPU: one piece, taken once."""

    on_device = True

    def __init__(self, capacity: int, device: torch.device) -> None:
        self._arena = Arena(capacity, alignment=_GPU_ALIGNMENT)
        self.capacity = self._arena.capacity
        self._device = device
        try:
            self._bytes = torch.empty(self.capacity, dtype=torch.uint8, device=device)
        except torch.OutOfMemoryError as error:
            raise ConfigError(
                f"{device} has no {self.capacity} bytes left for the device tier; lower its size.",
                param="device_bytes",
            ) from error

    @property
    def nbytes(self) -> int:
        """See ``Memory``."""
        return self.capacity - self._arena.free_bytes

    def counted(self, nbytes: int) -> int:
        """See ``Memory``."""
        return self._arena.rounded(nbytes)

    def take(self, nbytes: int) -> Block | None:
        """See ``Memory.take``. Waits for the GPU: kernels may still read what was kept at this place before."""
        block = _take(self._arena, nbytes)
        if block is not None:
            torch.cuda.synchronize(self._device)
        return block

    def give(self, block: Block) -> None:
        """See ``Memory.give``."""
        self._arena.give(block.place)

    def lend(self, block: Block, ended: Callable[[], None]) -> torch.Tensor:
        """See ``Memory.lend``."""
        lease = _CudaLease(self._bytes, block.place, block.nbytes)
        weakref.finalize(lease, ended).atexit = False
        return torch.as_tensor(lease, device=self._device)

    def close(self) -> None:
        """See ``Memory.close``."""
        self._bytes = torch.empty(0, dtype=torch.uint8)


class _CudaLease:
    """A part of GPU memory that torch takes a tensor over, which keeps this object alive."""

    def __init__(self, memory: torch.Tensor, start: int, nbytes: int) -> None:
        self._memory = memory
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (memory.data_ptr() + start, False),
            "version": 2,
        }


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _take(arena: Arena, nbytes: int) -> Block | None:
    start = arena.take(nbytes)
    return None if start is None else Block(arena.rounded(nbytes), start)


def _lend(lease: _Bytes, ended: Callable[[], None]) -> torch.Tensor:
    # ``lease`` is a view made for this call alone; torch's tensors keep it, and it keeps the memory.
    weakref.finalize(lease, ended).atexit = False
    return torch.from_numpy(lease)


def open_memory(capacity: int, device: torch.device | None, *, pinned: bool) -> Memory:
    """Memory of ``device``, or of the host.

    Raises ``ConfigError``, also for a device that is no CUDA GPU.
    """
    if device is not None:
        if device.type != "cuda":
            raise ConfigError(
                f"a device tier needs a CUDA GPU, and the model is on {str(device)!r}; use the host tier alone.",
                param="device_bytes",
            )
        return CudaMemory(capacity, device)
    return PinnedMemory(capacity) if pinned else HeapMemory(capacity)
