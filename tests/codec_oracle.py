"""FORMAT.md section 8 in plain Python, number by number: slow, and sharing nothing with the product.

Numbers are Python's floats; every float32 operation is done in double precision and rounded, which is exact for one
operation at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

ITEM = {"float32": 4, "float16": 2, "bfloat16": 2, "float64": 8}
#: The greatest magnitude of an endpoint.
LIMIT = float.fromhex("0x1.fep+126")


def single(x: float) -> float:
    """To the nearest float32."""
    return float(struct.unpack("<f", struct.pack("<f", x))[0])


def read(data: bytes, dtype: str) -> list[float]:
    """Numbers from their bytes."""
    match dtype:
        case "float32":
            return [n for (n,) in struct.iter_unpack("<f", data)]
        case "float64":
            return [n for (n,) in struct.iter_unpack("<d", data)]
        case "float16":
            return [n for (n,) in struct.iter_unpack("<e", data)]
        case "bfloat16":  # a float32 without its lower half
            return [struct.unpack("<f", bytes(2) + data[i : i + 2])[0] for i in range(0, len(data), 2)]
    raise AssertionError(dtype)


def rounded(x: float, dtype: str) -> float:
    """A float32 number to the nearest of ``dtype``, ties to even."""
    if dtype == "float32":
        return x
    if dtype == "float16":
        return float(struct.unpack("<e", struct.pack("<e", x))[0])
    (bits,) = struct.unpack("<I", struct.pack("<f", x))
    low, high = bits & 0xFFFF, bits >> 16
    high += low > 0x8000 or (low == 0x8000 and high & 1)
    return float(struct.unpack("<f", struct.pack("<I", high << 16))[0])


def spacing(x: float, dtype: str) -> float:
    """The distance of neighbouring numbers of ``dtype`` at ``x``."""
    digits, least = {"float32": (24, -149), "float16": (11, -24), "bfloat16": (8, -133)}[dtype]
    return math.ldexp(1.0, max(math.frexp(x)[1] - digits, least)) if x else math.ldexp(1.0, least)


def endpoint_dtype(dtype: str) -> str:
    return {"float32": "bfloat16", "bfloat16": "bfloat16", "float16": "float16"}[dtype]


def e4m3(code: int) -> float:
    """The number of a code, from the definition of the format."""
    sign, exponent, mantissa = code >> 7, code >> 3 & 15, code & 7
    size = math.ldexp(mantissa / 8, -6) if exponent == 0 else math.ldexp(1 + mantissa / 8, exponent - 7)
    return -size if sign else size


@dataclass(frozen=True)
class Layout:
    """Where the group of an element is: FORMAT.md, "Groups"."""

    heads: int
    tokens: int
    dim: int
    axis: str
    size: int

    @property
    def counts(self) -> tuple[int, int, int]:
        if self.axis == "channel":
            return self.heads, math.ceil(self.tokens / self.size), self.dim
        return math.ceil(self.heads / self._heads), self.tokens, math.ceil(self.dim / min(self.size, self.dim))

    @property
    def _heads(self) -> int:
        return max(1, min(self.heads, self.size // self.dim)) if self.size >= self.dim else 1

    def group_of(self, head: int, token: int, channel: int) -> int:
        if self.axis == "channel":
            place = (head, token // self.size, channel)
        else:
            place = (head // self._heads, token, channel // min(self.size, self.dim))
        _, b, c = self.counts
        return (place[0] * b + place[1]) * c + place[2]

    def elements(self) -> Iterator[int]:
        """The group of every element, in C order."""
        for head in range(self.heads):
            for token in range(self.tokens):
                for channel in range(self.dim):
                    yield self.group_of(head, token, channel)

    @property
    def groups(self) -> int:
        return math.prod(self.counts)


def codes_of(data: bytes, name: str, count: int) -> list[int]:
    """Codes of one value, in order."""
    if name != "int4":
        return list(data)
    half = math.ceil(count / 2)
    return [data[i] & 15 if i < half else data[i - half] >> 4 for i in range(count)]


def decode(name: str, layout: Layout, dtype: str, codes: bytes, ends: bytes) -> list[float]:
    """The numbers of one layer from the plain bytes of its two values."""
    numbers = read(ends, endpoint_dtype(dtype))
    found = []
    for code, group in zip(
        codes_of(codes, name, layout.heads * layout.tokens * layout.dim), layout.elements(), strict=True
    ):
        if name == "fp8":
            exact = single(e4m3(code) * single(numbers[group] / 448))
        else:
            lower, upper = numbers[group], numbers[layout.groups + group]
            step = single(single(upper - lower) / (15 if name == "int4" else 255))
            exact = single(lower + single(code * step))
        found.append(rounded(exact, dtype))
    return found


def flat(tensor: torch.Tensor) -> list[float]:
    """The numbers of a tensor, through its bytes."""
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return read(data, str(tensor.dtype).removeprefix("torch."))


def planes(tensor: torch.Tensor) -> bytes:
    """The plain value of ``lossless`` for one layer."""
    item = tensor.dtype.itemsize
    data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
    return b"".join(data[place::item] for place in range(item))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are equal bit for bit, NaNs included."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return np.array_equal(a.contiguous().view(torch.uint8).numpy(), b.contiguous().view(torch.uint8).numpy())
