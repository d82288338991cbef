"""The numbers that a group shares, in 16 bits, and still bounds of what it holds (FORMAT.md section 8, "Endpoints")."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from kvlink_core.errors import CorpusError, PayloadCorruptError

#: What endpoints are stored in, by the dtype of the cache. Exact for the 16-bit ones.
ENDPOINT_DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.bfloat16,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

#: The greatest magnitude of an endpoint: half of bfloat16's greatest, so that float32 holds the range of any group.
LIMIT = torch.finfo(torch.bfloat16).max / 2


def round_outward(numbers: torch.Tensor, dtype: torch.dtype, *, up: bool) -> torch.Tensor:
    """Numbers of float32 in the 16-bit ``dtype``, never below them (``up``) or never above; clipped to ``LIMIT``.

    Raises:
        CorpusError: one is not finite.
    """
    if not bool(numbers.isfinite().all()):
        raise CorpusError(
            "a cache with values that are not finite cannot be quantised; the model overflowed (try another dtype), or "
            "store it with codec raw or lossless."
        )
    numbers = numbers.clamp(-LIMIT, LIMIT)
    nearest = numbers.to(dtype)
    back = nearest.to(torch.float32)
    wrong = back < numbers if up else back > numbers
    # In magnitude one step up where that is the wanted direction. Zero has the sign of what was rounded to it, and at
    # the end none, so that the bytes are the same whichever of -0 and 0 a device takes for the least.
    bits = nearest.view(torch.int16)
    outward = ~bits.signbit() if up else bits.signbit()
    stepped = torch.where(wrong, bits + torch.where(outward, 1, -1).to(torch.int16), bits).view(dtype)
    return stepped.masked_fill_(stepped == 0, 0.0)


def check_endpoints(ends: torch.Tensor) -> None:
    """Raise ``PayloadCorruptError`` unless all are finite and within the limit."""
    # Magnitudes of 16-bit floats are in the order of their bits read as integers, and torch compares many of these at a
    # time.
    most = _bits(min(LIMIT, torch.finfo(ends.dtype).max), ends.dtype)
    if int(ends.view(torch.int16).bitwise_and(0x7FFF).max()) > most:
        raise PayloadCorruptError("an endpoint that no group may have")


def _bits(number: float, dtype: torch.dtype) -> int:
    """Of a 16-bit float that is not negative."""
    return int(torch.tensor(number, dtype=dtype).view(torch.int16))
