"""Codec ``raw`` and the registry."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.compress import DTYPES, EncodedColumn, codec_names, codec_spec, get_codec, make_codec
from kvlink_core.errors import ConfigError, PayloadCorruptError, UnknownCodecError
from kvlink_core.types import DocumentCache

SIZE = st.integers(1, 5)


@settings(max_examples=50, deadline=None)
@given(SIZE, SIZE, st.integers(1, 40), SIZE, SIZE, st.sampled_from(sorted(DTYPES)), st.booleans())
def test_raw_is_bit_for_bit(
    layers: int, heads: int, tokens: int, dim: int, value_dim: int, dtype: str, transposed: bool
) -> None:
    keys = torch.randn(layers, heads, tokens, dim).to(DTYPES[dtype])
    values = torch.randn(layers, heads, tokens, value_dim).to(DTYPES[dtype])
    keys[0, 0, 0, 0], values[0, 0, 0, 0] = float("nan"), float("-inf")
    if transposed:  # as models make them: not contiguous
        keys = keys.transpose(1, 2).contiguous().transpose(1, 2)
    encoded = get_codec("raw").encode(DocumentCache(torch.arange(tokens), keys, values))
    assert encoded.columns["k"].data.numpy().tobytes() == keys.contiguous().view(torch.uint8).numpy().tobytes()
    decoded = get_codec("raw").decode(encoded)
    for name, expected in (("keys", keys), ("values", values)):
        found = getattr(decoded, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


def test_raw_reads_without_copying_unless_unaligned() -> None:
    cache = DocumentCache(torch.arange(3), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4))
    encoded = get_codec("raw").encode(cache)
    assert encoded.columns["k"].data.data_ptr() == cache.keys.data_ptr()
    shifted = torch.empty(encoded.columns["k"].data.numel() + 1, dtype=torch.uint8)[1:]
    shifted.copy_(encoded.columns["k"].data)
    columns = {**encoded.columns, "k": EncodedColumn(shifted, encoded.columns["k"].lengths)}
    decoded = get_codec("raw").decode(replace(encoded, columns=columns))
    assert decoded.values.data_ptr() == cache.values.data_ptr()
    assert decoded.keys.data_ptr() % 4 == 0
    assert torch.equal(decoded.keys, cache.keys)


def test_raw_refuses_what_does_not_fit_the_shape() -> None:
    codec = get_codec("raw")
    encoded = codec.encode(DocumentCache(torch.arange(3), torch.randn(2, 1, 3, 4), torch.randn(2, 1, 3, 4)))
    k = encoded.columns["k"]
    wrong = [
        replace(encoded, shape=replace(encoded.shape, head_dim=5)),
        replace(encoded, shape=replace(encoded.shape, dtype="int4")),
        replace(encoded, params={"group": 3}),
        replace(encoded, columns={**encoded.columns, "k": EncodedColumn(k.data[:-4], (48, 44))}),
        replace(encoded, columns={**encoded.columns, "k": EncodedColumn(k.data, (40, 56))}),
        replace(encoded, columns={**encoded.columns, "k": EncodedColumn(k.data, (96,))}),
    ]
    for document in wrong:
        with pytest.raises(PayloadCorruptError):
            codec.decode(document)


def test_codecs_are_found_by_name() -> None:
    assert codec_names() == ("raw",)
    assert codec_spec(get_codec("raw")) == "raw"
    with pytest.raises(UnknownCodecError, match="there are: raw"):
        get_codec("zip")
    with pytest.raises(UnknownCodecError):
        make_codec("", {})
    for spec in ("raw:group=3", "raw:x", "raw:=3", "raw:a=1,a=2", "raw:,"):
        with pytest.raises(ConfigError):
            get_codec(spec)
