"""Caches of any shape, dtype and numbers, for property tests."""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import strategies as st

from kvlink_core.compress import DTYPES
from kvlink_core.types import DocumentCache

QUANTISABLE = ("float32", "float16", "bfloat16")
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}

#: What the numbers of a tensor are: of any bits, of ordinary size, a few of anything over and over, or of one kind.
KINDS = ("bits", "normal", "few", "zeros", "constant", "denormal", "huge", "outlier", "offset")


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: str, *, finite: bool = True) -> torch.Tensor:
    """A tensor of ``dtype``."""
    kind = draw(st.sampled_from(KINDS))
    made = _numbers(draw, kind, shape, DTYPES[dtype])
    if finite:
        made = torch.where(made.isfinite(), made, torch.zeros_like(made))
    return made


def _numbers(draw: Any, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    bits = _BITS[dtype.itemsize]
    most = torch.finfo(dtype).max
    normal = torch.randn(shape, generator=generator)
    match kind:
        case "bits":
            return torch.randint(
                torch.iinfo(bits).min, torch.iinfo(bits).max, shape, generator=generator, dtype=bits
            ).view(dtype)
        case "few":
            some = draw(st.lists(st.floats(width=32), min_size=1, max_size=5))
            return torch.tensor(some)[torch.randint(0, len(some), shape, generator=generator)].to(dtype)
        case "zeros":
            return torch.zeros(shape, dtype=dtype) * (-1 if draw(st.booleans()) else 1)
        case "constant":
            return torch.full(shape, draw(st.floats(-60000, 60000))).to(dtype)
        case "denormal":
            return torch.randint(0, 4, shape, generator=generator, dtype=bits).view(dtype) * normal.sign().to(dtype)
        case "huge":
            return (normal.sign() * torch.rand(shape, generator=generator)).to(dtype) * most
        case "outlier":
            flat = normal.flatten()
            flat[draw(st.integers(0, flat.numel() - 1))] = draw(st.floats(-60000, 60000))
            return flat.view(shape).to(dtype)
        case "offset":
            return (normal * draw(st.floats(0, 2)) + draw(st.floats(-3000, 3000))).to(dtype)
        case _:
            return normal.to(dtype)


@st.composite
def caches(draw: Any, dtypes: tuple[str, ...] = QUANTISABLE, *, finite: bool = True) -> DocumentCache:
    """A small document cache; sometimes not contiguous, as models make them."""
    layers, heads, dim, value_dim = (draw(st.integers(1, most)) for most in (2, 5, 7, 7))
    tokens = draw(st.integers(1, 12))
    dtype = draw(st.sampled_from(dtypes))
    pair = [draw(tensors((layers, heads, tokens, d), dtype, finite=finite)) for d in (dim, value_dim)]
    if draw(st.booleans()):
        pair = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in pair]
    return DocumentCache(torch.arange(tokens), *pair)
