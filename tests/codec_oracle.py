"""FORMAT.md section 8 in plain Python, number by number: slow, and sharing nothing with the product.

Numbers are Python's floats; every float32 operation is done in double precision and rounded, which is exact for one
operation at a time.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

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


def outward(x: float, dtype: str, *, up: bool) -> float:
    """A float32 number, clipped to ``LIMIT``, to the next number of a 16-bit ``dtype`` that is not below (above) it."""
    x = max(-LIMIT, min(LIMIT, x))
    pattern = "<e" if dtype == "float16" else None

    def bits_of(number: float) -> int:
        if pattern:
            return int(struct.unpack("<H", struct.pack(pattern, number))[0])
        return int(struct.unpack("<I", struct.pack("<f", number))[0] >> 16)

    def number_of(bits: int) -> float:
        return read(struct.pack("<H", bits), dtype)[0]

    near = bits_of(rounded(x, dtype))
    found = number_of(near)
    if found == x or (found > x) == up:
        return found
    # One step outward: away from zero, where that is the side wanted, and else towards it.
    away = (math.copysign(1, found) > 0) == up
    return number_of(near + (1 if away else -1))


def encode(name: str, layout: Layout, dtype: str, numbers: list[float]) -> tuple[bytes, bytes]:
    """The plain bytes of the two values of one layer. Every number must have one nearest code, clearly.

    By fractions, so without an error of its own.
    """
    inside = [Fraction(max(-LIMIT, min(LIMIT, x))) for x in numbers]
    groups = list(layout.elements())
    members: list[list[Fraction]] = [[] for _ in range(layout.groups)]
    for x, group in zip(inside, groups, strict=True):
        members[group].append(x)
    ends_dtype = endpoint_dtype(dtype)
    if name == "fp8":
        ends = [outward(float(max(abs(x) for x in group)), ends_dtype, up=True) for group in members]
        codes = [_nearest_e4m3(x, Fraction(ends[group]) / 448) for x, group in zip(inside, groups, strict=True)]
    else:
        lower = [outward(float(min(group)), ends_dtype, up=False) for group in members]
        upper = [outward(float(max(group)), ends_dtype, up=True) for group in members]
        ends = lower + upper
        most = 15 if name == "int4" else 255
        codes = []
        for x, group in zip(inside, groups, strict=True):
            step = (Fraction(upper[group]) - Fraction(lower[group])) / most
            exact = (x - Fraction(lower[group])) / step if step else Fraction(0)
            assert abs(exact - math.floor(exact) - Fraction(1, 2)) > Fraction(1, 1000), "no clearly nearest code"
            codes.append(round(exact))
    if name == "int4":
        half = math.ceil(len(codes) / 2)
        padded = codes + [0] * (2 * half - len(codes))
        codes = [padded[i] | padded[half + i] << 4 for i in range(half)]
    pattern = "<e" if ends_dtype == "float16" else "<f"
    stored = [struct.pack(pattern, end + 0.0)[-2:] for end in ends]  # of a float32 the upper half; -0 becomes 0
    return bytes(codes), b"".join(stored)


def _nearest_e4m3(x: Fraction, scale: Fraction) -> int:
    if not scale:
        return 0x80 if str(float(x)).startswith("-") else 0
    target = abs(x) / scale
    code = min(range(0x7F), key=lambda c: (abs(Fraction(e4m3(c)) - target), c & 1))
    others = sorted(abs(Fraction(e4m3(c)) - target) for c in range(0x7F))[:2]
    assert others[1] - others[0] > Fraction(1, 100_000), "no clearly nearest code"
    return code | (0x80 if x < 0 else 0)


def frame(data: bytes) -> bytes:
    """A Zstandard frame (RFC 8878) of fewer than 256 bytes: a raw block of the first half, then runs."""
    half = len(data) // 2
    blocks = [(0, len(data[:half]), data[:half])]
    rest = data[half:]
    while rest:
        run = len(rest) - len(rest.lstrip(rest[:1]))
        blocks.append((1, run, rest[:1]))
        rest = rest[run:]
    made = b"\x28\xb5\x2f\xfd" + bytes([0b0010_0000, len(data)])  # single segment, its size in one byte, no checksum
    for number, (kind, size, content) in enumerate(blocks):
        last = number == len(blocks) - 1
        made += (last | kind << 1 | size << 3).to_bytes(3, "little") + content
    return made
