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
    assert codec_names() == ("fp8", "int4", "int8", "lossless", "raw")
    assert codec_spec(get_codec("raw")) == "raw"
    assert codec_spec(get_codec("int4")) == "int4:group=64,keys=channel,zstd=0"
    assert codec_spec(get_codec("fp8:zstd=3,keys=token")) == "fp8:group=128,keys=token,zstd=3"
    assert codec_spec(get_codec("lossless")) == "lossless:zstd=1"
    for name in codec_names():
        assert codec_spec(get_codec(codec_spec(get_codec(name)))) == codec_spec(get_codec(name))
        assert make_codec(name, get_codec(name).params).params == get_codec(name).params
    with pytest.raises(UnknownCodecError, match="there are: fp8, int4, int8, lossless, raw"):
        get_codec("zip")
    with pytest.raises(UnknownCodecError):
        make_codec("", {})
    for spec in ("raw:group=3", "raw:x", "raw:=3", "raw:a=1,a=2", "raw:,"):
        with pytest.raises(ConfigError):
            get_codec(spec)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("int4:grup=64", "has no parameter 'grup'; it has group, keys, zstd"),
        ("int4:group=0", "group is a whole number from 1 to 65536, not 0"),
        ("int8:group=65537", "not 65537"),
        ("int8:group=64.0", "not 64.0"),
        ("fp8:group=True", "not True"),
        ("fp8:group=nan", "not nan"),
        ("fp8:keys=rows", "keys is one of channel, token, not 'rows'"),
        ("int4:zstd=23", "zstd is a whole number from 0 to 22, not 23"),
        ("lossless:zstd=-1", "not -1"),
        ("lossless:group=64", "it has zstd"),
        ("raw:zstd=1", "it has none"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        get_codec(spec)
    assert caught.value.param == "codec"
