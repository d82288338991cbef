"""Which elements of K or V share numbers (FORMAT.md section 8, "Groups").

Keys differ most from channel to channel, values from token to token; so keys are grouped by channel over tokens and
values by token over channels (KIVI, arXiv 2402.02750; KVQuant, arXiv 2401.18079, which adds: keys before RoPE).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

Axis = Literal["channel", "token"]

#: Elements worked on at a time: on a processor, for each thread, what a core's cache holds in float32 and as codes; on
#: a GPU more, since each step costs a launch.
_CPU_ELEMENTS, _GPU_ELEMENTS = 2**18, 2**26


@dataclass(frozen=True, slots=True)
class Groups:
    """The groups of a tensor ``[layers, heads, tokens, dim]``; those of one layer are ``counts``.

    Attributes:
        shape: of the tensor.
        block: heads, tokens and channels of a whole group.
    """

    shape: tuple[int, int, int, int]
    block: tuple[int, int, int]

    @classmethod
    def of(cls, shape: tuple[int, int, int, int], axis: Axis, size: int) -> Groups:
        """Groups of ``size`` elements along ``axis``."""
        _, heads, tokens, dim = shape
        if axis == "channel":
            return cls(shape, (1, min(size, tokens), 1))
        return cls(shape, (max(1, min(heads, size // dim)), 1, min(size, dim)))

    @property
    def counts(self) -> tuple[int, int, int]:
        """Groups of one layer along heads, tokens and channels."""
        heads, tokens, dim = (math.ceil(n / b) for n, b in zip(self.shape[1:], self.block, strict=True))
        return heads, tokens, dim

    @property
    def per_layer(self) -> int:
        """Groups of one layer."""
        return math.prod(self.counts)

    def layer_runs(self, device: torch.device) -> list[slice]:
        """The layers in runs to be worked on at a time."""
        return _runs(self.shape[0], _limit(device) // math.prod(self.shape[1:]))

    def head_runs(self, device: torch.device) -> list[slice]:
        """The heads in runs to be worked on at a time, cut where no group straddles."""
        blocks = _limit(device) // (self.block[0] * math.prod(self.shape[2:]))
        return _runs(self.shape[1], max(1, blocks) * self.block[0])

    def most_at_once(self, device: torch.device) -> int:
        """The most elements of a run of layers and a run of heads together."""
        layers: int = self.layer_runs(device)[0].stop
        heads: int = self.head_runs(device)[0].stop
        return layers * heads * math.prod(self.shape[2:])

    def of_heads(self, heads: slice) -> slice:
        """Which groups, along heads, a run of heads has."""
        return slice(heads.start // self.block[0], math.ceil(heads.stop / self.block[0]))

    def parts(self, elements: torch.Tensor, *numbers: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
        """Views of a run of layers and heads and of numbers of its groups, that broadcast against each other.

        All have seven dimensions: layers, then along heads, tokens and channels the groups and the elements in each
        (of the numbers 1). All whole groups come together, and those that the tensor's end cuts short by themselves.

        Args:
            elements: ``[layers, heads, tokens, dim]``.
            numbers: ``[layers, *counts]`` each.
        """
        cuts = [_cuts(n, b) for n, b in zip(elements.shape[1:], self.block, strict=True)]
        whole = all(len(along) == 1 for along in cuts)  # then there is nothing to cut, and slices cost time
        for heads, tokens, dim in itertools.product(*cuts):
            part = elements if whole else elements[:, heads.elements, tokens.elements, dim.elements]
            inside = part.view(-1, heads.count, heads.block, tokens.count, tokens.block, dim.count, dim.block)
            of_part = (n if whole else n[:, heads.groups, tokens.groups, dim.groups] for n in numbers)
            yield inside, *(n.view(-1, heads.count, 1, tokens.count, 1, dim.count, 1) for n in of_part)


def _limit(device: torch.device) -> int:
    return _CPU_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else _GPU_ELEMENTS


def _runs(length: int, at_once: int) -> list[slice]:
    step = max(1, at_once)
    return [slice(start, min(start + step, length)) for start in range(0, length, step)]


@dataclass(frozen=True, slots=True)
class _Cut:
    """A run of equal groups along one axis."""

    start: int
    count: int
    block: int
    first: int

    @property
    def elements(self) -> slice:
        """Where its elements are."""
        return slice(self.start, self.start + self.count * self.block)

    @property
    def groups(self) -> slice:
        """Where its groups are."""
        return slice(self.first, self.first + self.count)


@functools.lru_cache(maxsize=256)
def _cuts(length: int, block: int) -> tuple[_Cut, ...]:
    """The whole groups along an axis, and the last one where it is shorter."""
    count, left = divmod(length, block)
    whole = (_Cut(0, count, block, 0),) if count else ()
    return whole + ((_Cut(count * block, 1, left, count),) if left else ())
