"""``int8`` and ``int4``: the range of each group in equal steps (asymmetric, as in KIVI, arXiv 2402.02750)."""

from __future__ import annotations

import torch

from kvlink_core.compress.endpoints import round_outward
from kvlink_core.compress.groups import Groups
from kvlink_core.errors import PayloadCorruptError


class Affine:
    """Codes ``0..levels`` for the numbers from a group's lower endpoint to its upper one, in steps of equal size.

    Error of one element: at most half a step, and rounding: float32's, at most ``2**-20`` of the greater endpoint's
    magnitude (and ``2**-140``, of numbers that small), and half a unit in the last place of the cache's dtype. A step
    is ``(upper - lower) / levels``. The endpoints are the group's least and greatest number, for float32 caches rounded
    outward to the next bfloat16, by less than ``2**-7`` of their magnitude.

    Args:
        bits: of a code: 4 or 8.
    """

    per_group = 2

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._levels = 2**bits - 1

    def measure(self, elements: torch.Tensor, groups: Groups, ends: torch.Tensor) -> None:
        """See ``Quantiser.measure``."""
        least, greatest = torch.empty_like(ends, dtype=torch.float32)
        for part, low, high in groups.parts(elements, least, greatest):
            torch.amin(part, (2, 4, 6), keepdim=True, out=low)
            torch.amax(part, (2, 4, 6), keepdim=True, out=high)
        ends[0] = round_outward(least, ends.dtype, up=False)
        ends[1] = round_outward(greatest, ends.dtype, up=True)

    def scales(self, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Quantiser.scales``: the size of a step, and the lower endpoint."""
        lower, upper = ends.to(torch.float32)
        return (upper - lower).div_(self._levels), lower

    def quantise(self, elements: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See ``Quantiser.quantise``."""
        step, lower = scales
        step = torch.where(step == 0, 1, step)  # all elements of the group are its lower endpoint
        for part, size, low in groups.parts(elements, step, lower):
            part.sub_(low).div_(size)
        elements.round_().clamp_(0, self._levels)
        if self._levels < 128:
            return elements.to(torch.int8).view(torch.uint8)
        return elements.sub_(128).to(torch.int8).view(torch.uint8).bitwise_xor_(128)  # torch is slow at float to uint8

    def dequantise(
        self, codes: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...], elements: torch.Tensor
    ) -> None:
        """See ``Quantiser.dequantise``."""
        elements.copy_(codes)
        for part, size, low in groups.parts(elements, *scales):
            part.mul_(size).add_(low)

    def check(self, codes: torch.Tensor, ends: torch.Tensor) -> None:
        """See ``Quantiser.check``."""
        if bool((ends[0] > ends[1]).any()):
            raise PayloadCorruptError("a group's lower endpoint is above its upper one")
