"""Forward passes over a few tokens as CUDA graphs: recorded once, replayed with other tokens at other positions.

Launching the kernels of 32 layers one by one takes a CPU about 20 ms whatever they compute, which for a question and
its link tokens, or for one token of an answer, is several times what a GPU needs to compute them. A graph is launched
at once. What it reads and writes stays where it was when it was recorded, so

- keys and values live in ``SlotBuffer``s of a few sizes, which are used again for other prompts;
- the number of tokens is rounded up, by tokens in front that take the buffer's last slot, which is never read as
  anything else;
- the pass sees the whole buffer: a slot's position is its number, so the causal mask hides what is behind a token,
  and whatever stands there is finite.

A model that cannot be recorded (one that asks the GPU for a number half-way, as many mixtures of experts do) runs as it
always did, and so does one whose replay gives anything else than the pass it was recorded from.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

from kvlink_core.text import first_line

logger = logging.getLogger(__name__)

#: Numbers of tokens that graphs are recorded for; more are computed without: there the arithmetic is what takes time.
TOKENS = (8, 16, 32, 48, 64, 96, 128, 192, 256, 384, 512)

#: Buffers grow in steps of this many slots, or of an eighth of their size, whichever is more.
_STEP = 512

#: Share of the device's memory that buffers may keep while nobody uses them.
_IDLE_SHARE = 1 / 8

#: Largest root mean square difference of logits between a replay and the pass it was recorded from, relative to that of
#: the logits: other shapes run other kernels, which sum in another order. What is wrong is off by about 1.
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}

#: ``[n]`` token ids and positions, and the slots to attend over, to float32 logits ``[vocabulary]``.
Forward = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


class Recording(Protocol):
    """A pass that can be run again: fills ``logits`` from what ``inputs``, int64 ``[2, n]``, hold then."""

    inputs: torch.Tensor
    logits: torch.Tensor

    def replay(self) -> None:
        """Run it."""
        ...


@dataclass(slots=True, eq=False)
class SlotBuffer:
    """Memory for one prompt at a time: keys and values ``[layers, kv_heads, capacity, dim]``, and what was recorded."""

    keys: torch.Tensor
    values: torch.Tensor
    seen: set[int] = field(default_factory=set)
    recorded: dict[int, Recording] = field(default_factory=dict)

    @property
    def capacity(self) -> int:
        """Slots; the last one is not for tokens of the prompt."""
        return int(self.keys.shape[2])


class CudaRecording:
    """A CUDA graph. Raises whatever the pass raises that cannot be recorded."""

    def __init__(self, forward: Callable[[torch.Tensor], torch.Tensor], inputs: torch.Tensor, pool: Any) -> None:
        self.inputs = inputs
        torch.cuda.synchronize(inputs.device)
        self._graph = torch.cuda.CUDAGraph()
        # Another thread may be copying a document to this device meanwhile, which is none of this graph's business.
        with torch.cuda.graph(self._graph, pool=pool, capture_error_mode="thread_local"):
            self.logits = forward(inputs)

    def replay(self) -> None:
        """See ``Recording``."""
        self._graph.replay()


class Graphs:
    """The buffers of one model on one device, and the passes recorded over them. Safe to use from several threads.

    Args:
        device: where the model is.
        dtype: of keys, values and logits before they become float32.
        shapes: the shapes of keys and of values for so many slots.
        record: makes a recording; the default is a CUDA graph.
        idle_bytes: of buffers kept for later; ``None`` for a share of the device's memory.
    """

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        shapes: Callable[[int], tuple[tuple[int, ...], tuple[int, ...]]],
        *,
        record: Callable[[Callable[[torch.Tensor], torch.Tensor], torch.Tensor, Any], Recording] = CudaRecording,
        idle_bytes: int | None = None,
    ) -> None:
        self._device = device
        self._dtype = dtype
        self._shapes = shapes
        self._record = record
        self._idle_bytes = idle_bytes
        self._idle: list[SlotBuffer] = []
        self._lock = threading.Lock()
        self._running = threading.Lock()
        self._pool: Any = None
        self.usable = True

    def take(self, slots: int) -> SlotBuffer:
        """A buffer with room for ``slots`` and one more, everything in it finite; give it back when done."""
        capacity = buffer_size(slots + 1)
        with self._lock:
            fitting = [b for b in self._idle if b.capacity == capacity]
            if fitting:
                self._idle.remove(fitting[-1])  # the last one that was used: its graphs are the likeliest
                return fitting[-1]
        with torch.inference_mode(False):  # it goes from hand to hand, and not all of them are in inference mode
            keys, values = (torch.zeros(s, dtype=self._dtype, device=self._device) for s in self._shapes(capacity))
        return SlotBuffer(keys, values)

    def give(self, buffer: SlotBuffer) -> None:
        """Take a buffer back."""
        with self._lock:
            self._idle.append(buffer)
            limit = self._idle_bytes if self._idle_bytes is not None else self._share()
            while self._idle and sum(b.keys.nbytes + b.values.nbytes for b in self._idle) > limit:
                del self._idle[0]

    def _share(self) -> int:
        return int(torch.cuda.mem_get_info(self._device)[1] * _IDLE_SHARE)

    def compute(
        self, buffer: SlotBuffer, token_ids: torch.Tensor, positions: torch.Tensor, forward: Forward
    ) -> torch.Tensor:
        """``forward`` over the slots of ``buffer``, by a graph where there is one.

        A pass over as many tokens is recorded the second time that it is wanted of a buffer: what comes once is not
        worth recording.

        Args:
            token_ids, positions: int64 ``[n]`` on the CPU, positions ascending.
            forward: computes without a graph; writes the keys and values of the tokens into the buffer.
        """
        count, length = int(positions.shape[0]), int(positions[-1]) + 1
        size = next((size for size in TOKENS if size >= count), None)
        if not self.usable or size is None or count == length:
            return forward(token_ids.to(self._device), positions.to(self._device), length)
        with self._running:  # one after another: graphs share the memory that they compute in
            inputs = _padded(token_ids, positions, size, buffer.capacity)
            recording = buffer.recorded.get(size)
            if recording is None:
                plain = partial(forward, token_ids.to(self._device), positions.to(self._device), length)
                logits = plain()
                if size in buffer.seen and not self._record_as(buffer, size, inputs, forward, logits):
                    logits = plain()  # whatever was tried may have left other keys and values
                buffer.seen.add(size)
                return logits
            recording.inputs.copy_(_pinned(inputs, self._device), non_blocking=True)
            recording.replay()
            return recording.logits.clone()

    def _record_as(
        self, buffer: SlotBuffer, size: int, inputs: torch.Tensor, forward: Forward, expected: torch.Tensor
    ) -> bool:
        """Record a pass whose result is known already; where that cannot be done or is not the same, never again."""
        capacity = buffer.capacity
        try:
            if self._pool is None and self._device.type == "cuda":
                self._pool = torch.cuda.graph_pool_handle()
            recording = self._record(lambda at: forward(at[0], at[1], capacity), inputs.to(self._device), self._pool)
            recording.replay()
            off = float((recording.logits - expected).norm() / expected.norm())
        # Broad on purpose: what cannot be recorded says so in many ways, and runs without all the same.
        except Exception as error:
            logger.info("no CUDA graphs for this model, it runs without: %s", first_line(error))
            self.usable = False
            return False
        if not off <= TOLERANCE[self._dtype]:  # not a number is off, too
            logger.warning("replaying a CUDA graph changed logits by %.1e of their size; running without.", off)
            self.usable = False
            return False
        buffer.recorded[size] = recording
        return True


def buffer_size(slots: int) -> int:
    """Slots of the buffer for a prompt that needs ``slots``: few sizes, at most an eighth (or 512) too large."""
    step = max(_STEP, 1 << max(0, slots.bit_length() - 4))
    return -(-slots // step) * step


def _padded(token_ids: torch.Tensor, positions: torch.Tensor, size: int, capacity: int) -> torch.Tensor:
    """Int64 ``[2, size]``: ids and positions, those in front of token 0 at the last slot. The last one stays last."""
    front = size - int(positions.shape[0])
    padded = torch.zeros(2, size, dtype=torch.int64)
    padded[1, :front] = capacity - 1
    padded[0, front:] = token_ids
    padded[1, front:] = positions
    return padded


def _pinned(inputs: torch.Tensor, device: torch.device) -> torch.Tensor:
    return inputs.pin_memory() if device.type == "cuda" else inputs
