"""``fp8``, ``int8`` and ``int4``: what they store is what FORMAT.md says, with no more error than they promise."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from typing import Any

import codec_oracle as oracle
import pytest
import torch
from codec_caches import caches
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.compress import EncodedDocument, codec_spec, dtype_name, get_codec, groups
from kvlink_core.errors import ConfigError, CorpusError
from kvlink_core.types import DocumentCache

SPECS = st.builds(
    "{}:group={},keys={},zstd={}".format,
    st.sampled_from(["fp8", "int8", "int4"]),
    st.sampled_from([1, 2, 3, 4, 5, 8, 13, 64, 65536]),
    st.sampled_from(["channel", "token"]),
    st.sampled_from([0, 0, 1, 3]),
)


def layouts(spec: str, cache: DocumentCache) -> dict[str, oracle.Layout]:
    params = get_codec(spec).params
    size = int(params["group"])
    return {
        name: oracle.Layout(*tensor.shape[1:], axis, size)
        for name, tensor, axis in (("k", cache.keys, str(params["keys"])), ("v", cache.values, "token"))
    }


def plain(encoded: EncodedDocument, name: str) -> list[bytes]:
    """The values of a column that nothing has compressed."""
    column = encoded.columns[name]
    data, at = column.data.numpy().tobytes(), 0
    values = []
    for length in column.lengths:
        values.append(data[at : at + length])
        at += length
    return values


@settings(max_examples=150, deadline=None)
@given(caches(), SPECS, st.sampled_from([1, 40, 200, 2**19]))
def test_any_cache_comes_back_as_the_format_says(cache: DocumentCache, spec: str, at_once: int) -> None:
    codec = get_codec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "_CPU_ELEMENTS", at_once)  # cut in runs of any length, it is the same
        encoded = codec.encode(cache)
        decoded = codec.decode(encoded)
    unpacked = get_codec(codec_spec(codec).replace("zstd=1", "zstd=0").replace("zstd=3", "zstd=0")).encode(cache)
    limits = codec.value_bytes(encoded.shape)
    for name in codec.columns:
        assert all(limits[name][0] <= length <= limits[name][1] for length in encoded.columns[name].lengths)
    for name, found in (("k", decoded.keys), ("v", decoded.values)):
        layout = layouts(spec, cache)[name]
        values = zip(plain(unpacked, name), plain(unpacked, f"{name}_groups"), strict=True)
        for layer, (codes, ends) in enumerate(values):
            expected = oracle.decode(codec.name, layout, encoded.shape.dtype, codes, ends)
            assert [float(x) for x in oracle.flat(found[layer])] == expected


@settings(max_examples=150, deadline=None)
@given(caches(), SPECS)
def test_errors_are_within_their_bounds(cache: DocumentCache, spec: str) -> None:
    codec = get_codec(spec.partition("zstd")[0] + "zstd=0")
    encoded = codec.encode(cache)
    decoded = codec.decode(encoded)
    dtype = dtype_name(cache.keys.dtype)
    for name, wanted, found in (("k", cache.keys, decoded.keys), ("v", cache.values, decoded.values)):
        layout = layouts(spec, cache)[name]
        for layer, data in enumerate(plain(encoded, f"{name}_groups")):
            ends = oracle.read(data, oracle.endpoint_dtype(dtype))
            members: dict[int, list[tuple[Fraction, float]]] = {}
            numbers = zip(layout.elements(), oracle.flat(wanted[layer]), oracle.flat(found[layer]), strict=True)
            for group, x, y in numbers:
                inside = max(-oracle.LIMIT, min(oracle.LIMIT, x))
                members.setdefault(group, []).append((Fraction(inside), y))
            check = check_float if codec.name == "fp8" else check_affine
            for group, pairs in members.items():
                check(codec.name, [ends[i] for i in range(group, len(ends), layout.groups)], pairs, dtype)


def tight(end: float, bound: Fraction, dtype: str, *, upper: bool) -> bool:
    """Whether ``end`` bounds ``bound``, and no neighbour of it that is nearer does."""
    distance = Fraction(end) - bound if upper else bound - Fraction(end)
    return 0 <= distance < Fraction(oracle.spacing(end, dtype)) if distance else True


def check_affine(name: str, ends: list[float], pairs: list[tuple[Fraction, float]], dtype: str) -> None:
    lower, upper = ends
    assert tight(lower, min(x for x, _ in pairs), oracle.endpoint_dtype(dtype), upper=False)
    assert tight(upper, max(x for x, _ in pairs), oracle.endpoint_dtype(dtype), upper=True)
    step = (Fraction(upper) - Fraction(lower)) / (15 if name == "int4" else 255)
    most = Fraction(max(abs(lower), abs(upper)))
    for x, y in pairs:
        rounding = most / 2**20 + Fraction(2) ** -140 + Fraction(oracle.spacing(y, dtype)) / 2
        assert abs(x - Fraction(y)) <= step / 2 + rounding


def check_float(_: str, ends: list[float], pairs: list[tuple[Fraction, float]], dtype: str) -> None:
    (end,) = ends
    assert tight(end, max(abs(x) for x, _ in pairs), oracle.endpoint_dtype(dtype), upper=True)
    scale = Fraction(end) / 448
    for x, y in pairs:
        rounding = abs(x) / 2**20 + Fraction(2) ** -140 + Fraction(oracle.spacing(y, dtype)) / 2
        assert abs(x - Fraction(y)) <= max(abs(x) / 16, scale / 1024) + rounding


@settings(max_examples=60, deadline=None)
@given(caches(), SPECS)
def test_encoding_again_changes_nothing_more(cache: DocumentCache, spec: str) -> None:
    """Not so for any quantiser: it holds because the endpoints are codes themselves."""
    codec = get_codec(spec)
    once = codec.decode(codec.encode(cache))
    if cache.keys.dtype == torch.float32:
        return  # its endpoints are rounded, so that the second range is another
    twice = codec.decode(codec.encode(once))
    for a, b in ((once.keys, twice.keys), (once.values, twice.values)):
        worst = float((a.double() - b.double()).abs().max())
        assert worst <= float(a.double().abs().max()) * 2**-6


def test_all_codes_of_fp8() -> None:
    """Every code that is a number, in one group whose scale is 1."""
    codes = [c for c in range(256) if c & 0x7F != 0x7F]
    keys = torch.tensor([oracle.e4m3(c) for c in codes], dtype=torch.bfloat16).view(1, 1, -1, 1)
    cache = DocumentCache(torch.arange(len(codes)), keys, keys)
    codec = get_codec("fp8:group=1024")
    encoded = codec.encode(cache)
    assert encoded.columns["k"].data.tolist() == codes
    assert torch.equal(codec.decode(encoded).keys, keys)


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_is_refused(name: str, dtype: torch.dtype, odd: float) -> None:
    for which in (0, 1):
        pair = [torch.zeros(2, 1, 3, 4, dtype=dtype) for _ in range(2)]
        pair[which][1, 0, 2, 3] = odd
        with pytest.raises(CorpusError, match=r"not finite.*raw or lossless"):
            get_codec(name).encode(DocumentCache(torch.arange(3), *pair))


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_float64_is_refused(name: str) -> None:
    pair = [torch.zeros(1, 1, 3, 4, dtype=torch.float64) for _ in range(2)]
    with pytest.raises(ConfigError, match="float64"):
        get_codec(name).encode(DocumentCache(torch.arange(3), *pair))


def test_bytes_per_token_are_what_one_counts() -> None:
    """A Llama-3.1-8B document of 512 tokens, one layer of it."""
    pair = [torch.randn(1, 8, 512, 128, dtype=torch.bfloat16) for _ in range(2)]
    cache = DocumentCache(torch.arange(512), *pair)
    sizes = {}
    for spec in ("int4:group=128", "int4", "int4:group=32", "int8", "fp8"):
        columns = get_codec(spec).encode(cache).columns.values()
        sizes[spec] = sum(c.data.numel() for c in columns) / cache.nbytes
    expected = {"int4:group=128": 4.25, "int4": 4.5, "int4:group=32": 5, "int8": 8.25, "fp8": 8.125}
    assert sizes == {spec: bits / 16 for spec, bits in expected.items()}


def test_keys_by_channel_stand_channels_of_their_own_size() -> None:
    """What the grouping is for: one loud channel must not drown the others."""
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(1, 2, 128, 32, generator=generator)
    keys[..., 7] = 100 + keys[..., 7]
    cache = DocumentCache(torch.arange(128), keys, keys)
    quiet = [c for c in range(32) if c != 7]
    errors: dict[str, Any] = {}
    for axis in ("channel", "token"):
        codec = get_codec(f"int4:keys={axis}")
        error = codec.decode(codec.encode(cache)).keys - keys
        errors[axis] = math.sqrt(float(error[..., quiet].square().mean()))
    assert errors["channel"] < 0.15
    assert errors["token"] > 5 * errors["channel"]


def test_the_cache_that_is_encoded_is_left_alone() -> None:
    pair = [torch.randn(2, 2, 5, 4) for _ in range(2)]
    cache = DocumentCache(torch.arange(5), *pair)
    before = [t.clone() for t in pair]
    for name in ("fp8", "int8", "int4", "lossless"):
        codec = get_codec(name)
        encoded = codec.encode(cache)
        stored = {n: c.data.clone() for n, c in encoded.columns.items()}
        codec.decode(replace(encoded))
        assert all(torch.equal(a, b) for a, b in zip(pair, before, strict=True))
        assert all(torch.equal(encoded.columns[n].data, data) for n, data in stored.items())
