"""``fp8``: numbers of the format E4M3, scaled so that each group's greatest magnitude is the format's greatest."""

from __future__ import annotations

import torch

from kvlink_core.compress.endpoints import round_outward
from kvlink_core.compress.groups import Groups
from kvlink_core.errors import PayloadCorruptError

#: The greatest number of E4M3.
_GREATEST = 448.0


class Float8:
    """E4M3 codes of a group's numbers divided by its scale, ``endpoint / 448``.

    Error of one element x: at most ``max(2**-4 * |x|, 2**-10 * scale)``, and rounding: float32's, at most
    ``2**-20 * |x|`` (and ``2**-140``, of numbers that small), and half a unit in the last place of the cache's dtype.
    The endpoint is the group's greatest magnitude, for float32 caches rounded up to the next bfloat16, by less than
    ``2**-7`` of it.
    """

    bits = 8
    per_group = 1

    def measure(self, elements: torch.Tensor, groups: Groups, ends: torch.Tensor) -> None:
        """See ``Quantiser.measure``."""
        least, greatest = torch.empty_like(ends[0], dtype=torch.float32), torch.empty_like(ends[0], dtype=torch.float32)
        for part, low, high in groups.parts(elements, least, greatest):
            torch.amin(part, (2, 4, 6), keepdim=True, out=low)
            torch.amax(part, (2, 4, 6), keepdim=True, out=high)
        ends[0] = round_outward(torch.maximum(greatest, -least), ends.dtype, up=True)

    def scales(self, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``Quantiser.scales``: what a code is multiplied with."""
        return (ends[0].to(torch.float32).div_(_GREATEST),)

    def quantise(self, elements: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """See ``Quantiser.quantise``."""
        scale = torch.where(scales[0] == 0, 1, scales[0])  # all elements of the group are zero
        for part, size in groups.parts(elements, scale):
            part.div_(size)
        return elements.clamp_(-_GREATEST, _GREATEST).to(torch.float8_e4m3fn).view(torch.uint8)

    def dequantise(
        self, codes: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...], elements: torch.Tensor
    ) -> None:
        """See ``Quantiser.dequantise``."""
        scale = scales[0]
        if codes.device.type == "cpu":
            # torch converts one E4M3 at a time on a processor. Its sign and the rest of it, moved to their places in a
            # float16, are the number over 256, exactly, also where it is subnormal; from float16 torch converts many.
            moved = codes.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)
            elements.copy_(moved.view(torch.float16))
            scale = scale * 256
        else:
            elements.copy_(codes.view(torch.float8_e4m3fn))
        for part, size in groups.parts(elements, scale):
            part.mul_(size)

    def check(self, codes: torch.Tensor, ends: torch.Tensor) -> None:
        """See ``Quantiser.check``."""
        if bool((ends < 0).any()):
            raise PayloadCorruptError("a group's greatest magnitude is below zero")
        if int(codes.bitwise_and(0x7F).max()) == 0x7F:
            raise PayloadCorruptError("a code that is no number of E4M3")
