"""Pruning around every codec: what is left is what the codec makes of those tokens, and which these are is stored."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import torch
from codec_caches import caches
from codec_oracle import same_bits
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.compress import EncodedColumn, EncodedDocument, codec_spec, get_codec, make_codec, pruning_of
from kvlink_core.compress.pruning import take
from kvlink_core.compress.scorers import get_scorer, scorer_names
from kvlink_core.errors import ConfigError, PayloadCorruptError, PrunedCacheError, UnknownScorerError
from kvlink_core.types import DocumentCache

#: Those that judge by the cache alone.
ALONE = ("random", "knorm", "compactor")

CODECS = st.sampled_from(["raw", "lossless", "fp8:group=3", "int8:zstd=1", "int4:group=4", "int4:keys=token"])
SHARES = st.integers(1, 999).map(lambda k: k / 1000)


def pruned_spec(codec: str, keep: float, scorer: str) -> str:
    return f"{codec}{',' if ':' in codec else ':'}keep={keep},scorer={scorer}"


def positions(encoded: EncodedDocument) -> list[list[list[int]]]:
    """By layer and head, the tokens that a stored document names: FORMAT.md, bit by bit."""
    column, shape = encoded.columns["kept"], encoded.shape
    data = column.data.numpy().tobytes()
    row = math.ceil(shape.tokens / 8)
    assert set(column.lengths) == {shape.kv_heads * row}
    found = []
    for layer in range(shape.layers):
        heads = []
        for head in range(shape.kv_heads):
            start = (layer * shape.kv_heads + head) * row
            heads.append([t for t in range(8 * row) if data[start + t // 8] >> (t % 8) & 1])
        found.append(heads)
    return found


def picked(cache: DocumentCache, where: list[list[list[int]]]) -> DocumentCache:
    """A document of the tokens that are named, one by one."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return torch.stack(
            [
                torch.stack([torch.stack([tensor[i, j, t] for t in h]) for j, h in enumerate(w)])
                for i, w in enumerate(where)
            ]
        )

    return DocumentCache(torch.arange(len(where[0][0])), of(cache.keys), of(cache.values))


@settings(max_examples=150, deadline=None)
@given(caches(), CODECS, SHARES, st.sampled_from(ALONE))
def test_what_is_left_is_what_the_codec_makes_of_it(cache: DocumentCache, name: str, keep: float, scorer: str) -> None:
    codec = get_codec(pruned_spec(name, keep, scorer))
    encoded = codec.encode(cache)
    assert tuple(encoded.columns) == codec.columns
    where = positions(encoded)
    left = math.ceil(Fraction(str(keep)) * cache.tokens)
    assert {len(head) for layer in where for head in layer} == {left}
    assert max(t for layer in where for head in layer for t in head) < cache.tokens

    plain = get_codec(name)
    expected = plain.encode(picked(cache, where))
    for column in plain.columns:
        assert encoded.columns[column].lengths == expected.columns[column].lengths
        assert torch.equal(encoded.columns[column].data, expected.columns[column].data)
    decoded, by_hand = codec.decode(encoded), plain.decode(expected)
    assert same_bits(decoded.keys, by_hand.keys)
    assert same_bits(decoded.values, by_hand.values)
    assert torch.equal(decoded.token_ids, cache.token_ids)
    assert (decoded.tokens, decoded.slots) == (cache.tokens, left)
    assert (
        decoded.kept.tolist() if decoded.kept is not None else [[list(range(left))] * len(where[0])] * len(where)
    ) == where

    limits = codec.value_bytes(encoded.shape)
    for column in codec.columns:
        assert all(limits[column][0] <= length <= limits[column][1] for length in encoded.columns[column].lengths)
    again = codec.encode(decoded)
    assert torch.equal(again.columns["kept"].data, encoded.columns["kept"].data)  # and never pruned twice


@settings(max_examples=60, deadline=None)
@given(caches(finite=False), st.sampled_from(ALONE))
def test_scores_are_those_of_the_same_cache_again(cache: DocumentCache, scorer: str) -> None:
    found = [pruning_of(get_codec(f"raw:keep=0.5,scorer={scorer}")).prune(cache) for _ in range(2)]  # type: ignore[union-attr]
    assert [f.slots for f in found] == [math.ceil(cache.tokens / 2)] * 2
    pairs = [f.kept for f in found]
    assert pairs[0] is pairs[1] is None or torch.equal(*pairs)  # type: ignore[arg-type]


def test_of_equal_tokens_the_earlier_are_kept() -> None:
    cache = DocumentCache(torch.arange(10), torch.ones(2, 3, 10, 4), torch.ones(2, 3, 10, 4))
    for scorer in ("knorm", "compactor"):
        where = positions(get_codec(f"raw:keep=0.4,scorer={scorer}").encode(cache))
        assert where == [[[0, 1, 2, 3]] * 3] * 2


def test_knorm_keeps_the_keys_of_least_norm() -> None:
    keys = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(1))
    where = positions(get_codec("raw:keep=0.25,scorer=knorm").encode(DocumentCache(torch.arange(40), keys, keys)))
    for layer, heads in enumerate(where):
        for head, kept in enumerate(heads):
            norms = [math.sqrt(math.fsum(float(x) ** 2 for x in key)) for key in keys[layer, head]]
            assert kept == sorted(sorted(range(40), key=norms.__getitem__)[:10])


def test_compactor_keeps_the_keys_of_greatest_leverage() -> None:
    """The diagonal of the hat matrix of keys over a ridge, through a singular value decomposition in float64."""
    keys = torch.randn(1, 2, 40, 8, generator=torch.Generator().manual_seed(2)) * torch.linspace(0.1, 3, 8)
    keys[0, 0, 17] += 5
    scores = get_scorer("compactor").score(DocumentCache(torch.arange(40), keys, keys), None)
    for head in range(2):
        matrix = keys[0, head].double().numpy()
        u, s, _ = np.linalg.svd(matrix - matrix.mean(0), full_matrices=False)
        expected = (u**2 * (s**2 / (s**2 + 0.01 * (s**2).mean()))).sum(1)
        np.testing.assert_allclose(scores[0, head].numpy(), expected, atol=1e-4)


def test_random_differs_by_text_layer_and_head_and_not_by_run() -> None:
    score = get_scorer("random").score
    one, other = (
        DocumentCache(torch.arange(20) + i, torch.zeros(2, 2, 20, 4), torch.zeros(2, 2, 20, 4)) for i in (0, 1)
    )
    assert torch.equal(score(one, None), score(one, None))
    found = score(one, None)
    different = [found[0, 0], found[0, 1], found[1, 0], found[1, 1], score(other, None)[0, 0]]
    assert all(not torch.equal(a, b) for i, a in enumerate(different) for b in different[:i])


def test_keeping_everything_is_the_codec_itself() -> None:
    cache = DocumentCache(torch.arange(5), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4))
    for name in ("raw", "lossless", "fp8", "int8", "int4"):
        ours, theirs = get_codec(f"{name}:keep=1,scorer=random"), get_codec(name)
        assert codec_spec(ours) == codec_spec(theirs)
        assert codec_spec(get_codec(f"{name}:keep=1.0")) == codec_spec(theirs)
        a, b = ours.encode(cache), theirs.encode(cache)
        assert tuple(a.columns) == tuple(b.columns)
        assert all(torch.equal(a.columns[n].data, b.columns[n].data) for n in b.columns)


def test_specs_and_parameters() -> None:
    codec = get_codec("int4:scorer=knorm,keep=0.50")
    assert codec_spec(codec) == "int4:group=64,keep=0.5,keys=channel,scorer=knorm,zstd=0"
    assert codec_spec(get_codec(codec_spec(codec))) == codec_spec(codec)
    assert make_codec(codec.name, codec.params).params == codec.params
    assert codec_spec(get_codec("raw:keep=0.5")).startswith("raw:keep=0.5,scorer=")
    for scorer in scorer_names():
        get_codec(f"raw:keep=0.5,scorer={scorer}")


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("raw:keep=0", "keep is a share from 0.001 to 1 of at most three decimals, not 0"),
        ("raw:keep=1.5", "not 1.5"),
        ("raw:keep=-0.5", "not -0.5"),
        ("raw:keep=0.1234", "not 0.1234"),
        ("raw:keep=nan", "not nan"),
        ("raw:keep=inf", "not inf"),
        ("raw:keep=True", "not True"),
        ("raw:keep=half", "not 'half'"),
        ("int4:keep=0.5,scorer=3", "scorer is a name of small letters"),
        ("int4:scorer=knorm", "say how many with keep"),
        ("int4:kept=0.5", "has no parameter 'kept'; it has group, keys, zstd, and every codec keep and scorer"),
    ],
)
def test_a_parameter_that_cannot_be_is_named(spec: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        get_codec(spec)
    assert caught.value.param == "codec"


def test_a_scorer_that_is_not_known_can_be_read_and_not_written() -> None:
    cache = DocumentCache(torch.arange(5), torch.randn(2, 2, 5, 4), torch.randn(2, 2, 5, 4))
    encoded = get_codec("raw:keep=0.5,scorer=knorm").encode(cache)
    later = make_codec("raw", {"keep": 0.5, "scorer": "of-next-year"})
    assert later.decode(encoded).slots == 3
    with pytest.raises(UnknownScorerError, match=r"no scorer 'of-next-year'; there are: compactor, "):
        later.encode(cache)
    with pytest.raises(UnknownScorerError):
        get_codec("raw:keep=0.5,scorer=of-next-year")


def test_what_cannot_be_pruned_is_refused() -> None:
    cache = DocumentCache(torch.arange(9), torch.randn(2, 2, 9, 4), torch.randn(2, 2, 9, 4))
    half = take(cache, torch.arange(5).expand(2, 2, 5))
    for name in ("raw", "lossless", "int4"):
        with pytest.raises(PrunedCacheError, match="a codec with keep alone"):
            get_codec(name).encode(half)
    with pytest.raises(PrunedCacheError, match="9 tokens was pruned to 5, and this codec keeps 3"):
        get_codec("raw:keep=0.25,scorer=knorm").encode(half)
    for scorer in ("expected-attention", "repeat"):
        with pytest.raises(PrunedCacheError, match="while it encodes a document"):
            get_codec(f"raw:keep=0.5,scorer={scorer}").encode(cache)


def damaged(encoded: EncodedDocument, data: list[int], lengths: tuple[int, ...] | None = None) -> EncodedDocument:
    column = encoded.columns["kept"]
    made = EncodedColumn(torch.tensor(data, dtype=torch.uint8), column.lengths if lengths is None else lengths)
    return replace(encoded, columns={**encoded.columns, "kept": made})


@pytest.mark.parametrize(
    ("data", "lengths", "says"),
    [
        ([0b111, 0, 0b1110, 0], None, "does not name 5 tokens"),
        ([0b11111, 1, 0b11111, 0], None, "does not name 5 tokens"),
        ([0, 0, 0b11111, 0], None, "does not name 5 tokens"),
        ([0b1111, 0b10, 0b11111, 0], None, "beyond the document's 9"),
        ([0b11111, 0b10000000, 0b11111, 0], None, "beyond the document's 9"),
        ([0b11111, 0], (2, 0), "is not 2 values of 2 bytes"),
        ([0b11111, 0, 0b11111], (2, 1), "is not 2 values of 2 bytes"),
        ([0b11111, 0, 0b11111, 0, 0], (2, 2), "is not 2 values of 2 bytes"),
        ([0b11111, 0, 0b11111, 0], (2, 2, 0), "is not 2 values of 2 bytes"),
    ],
)
def test_positions_that_cannot_be_are_refused(data: list[int], lengths: tuple[int, ...] | None, says: str) -> None:
    cache = DocumentCache(torch.arange(9), torch.randn(2, 1, 9, 4), torch.randn(2, 1, 9, 4))
    codec = get_codec("raw:keep=0.5,scorer=knorm")
    encoded = codec.encode(cache)
    assert codec.decode(damaged(encoded, [0b11111, 0, 0b11111, 0])).slots == 5
    with pytest.raises(PayloadCorruptError, match=says):
        codec.decode(damaged(encoded, data, lengths))


@settings(max_examples=60, deadline=None)
@given(caches(("float32",)), SHARES, st.binary(min_size=1, max_size=64), st.integers(0, 63))
def test_any_bytes_for_positions_are_positions_or_refused(
    cache: DocumentCache, keep: float, noise: bytes, at: int
) -> None:
    codec = get_codec(f"raw:keep={keep},scorer=random")
    encoded = codec.encode(cache)
    data = bytearray(encoded.columns["kept"].data.numpy().tobytes())
    for i, byte in enumerate(noise):
        data[(at + i) % len(data)] ^= byte
    try:
        decoded = codec.decode(damaged(encoded, list(data)))
    except PayloadCorruptError:
        return
    if decoded.kept is not None:
        assert decoded.kept.shape == decoded.keys.shape[:3]
        assert int(decoded.kept.min()) >= 0
        assert int(decoded.kept.max()) < cache.tokens
        assert bool((decoded.kept.diff(dim=2) > 0).all())
