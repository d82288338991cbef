"""Pruning: each layer and head of a document keeps a share of its tokens, chosen by a scorer (FORMAT.md section 8).

All scorers are query-agnostic: a document is compressed before any question is known. Keys are pruned as they are
stored, before RoPE, together with the position that each had, so that what is left takes its true place in any prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from kvlink_core.compress.codec import CacheShape, Codec, EncodedDocument, ParamValue, dtype_name
from kvlink_core.compress.kept import KEPT, kept_bytes, kept_tokens, pack_kept, unpack_kept
from kvlink_core.compress.params import Rule, Share, Word, check_params
from kvlink_core.compress.scorers import DEFAULT_SCORER, Scorer, get_scorer
from kvlink_core.errors import ConfigError, PrunedCacheError
from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache

#: The parameters that every codec has, all or none of them in a shard.
RULES: Mapping[str, Rule] = {"keep": Share(), "scorer": Word(DEFAULT_SCORER)}


class Pruning:
    """Which tokens to keep, and taking the others out. Stateless.

    Args:
        thousandths: of its tokens that a document keeps, rounded up to whole tokens.
        scorer: says which.
    """

    def __init__(self, thousandths: int, scorer: Scorer) -> None:
        self._thousandths = thousandths
        self._scorer = scorer

    @property
    def reads(self) -> Reads:
        """What the scorer has to see of a document beyond its cache."""
        return self._scorer.reads

    @torch.no_grad()
    def prune(self, cache: DocumentCache, reading: Reading | None = None) -> DocumentCache:
        """A cache of the best tokens of each layer and head, of equal ones the earlier; itself where all are kept.

        Args:
            cache: not pruned; not written to.
            reading: as ``reads`` says; made of the same document.

        Raises:
            PrunedCacheError: the scorer has to see more than the cache, and ``reading`` is missing.
        """
        slots = kept_tokens(self._thousandths, cache.tokens)
        if slots == cache.tokens:
            return cache
        if reading is None and self._scorer.reads != "cache":
            raise PrunedCacheError(
                f"scorer {self._scorer.name!r} judges by what the model computes while it encodes a document; encode "
                "with the codec's own pruning (`DocumentEncoder(model, prune=pruning_of(codec))`).",
                param="codec",
            )
        scores = self._scorer.score(cache, reading).nan_to_num(nan=-torch.inf)
        assert scores.shape == cache.keys.shape[:3]
        best = scores.sort(dim=2, descending=True, stable=True).indices[:, :, :slots].sort(dim=2).values
        return take(cache, best)


def take(cache: DocumentCache, kept: torch.Tensor) -> DocumentCache:
    """The tokens ``kept``, int64 ``[layers, kv_heads, slots]`` and ascending, of an unpruned cache."""

    def of(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.gather(2, kept.unsqueeze(3).expand(-1, -1, -1, tensor.shape[3]))

    return DocumentCache(cache.token_ids, of(cache.keys), of(cache.values), kept.to(torch.int32))


class PrunedCodec:
    """Another codec, over the tokens that are kept, and a column that says which these are.

    Args:
        inner: the codec of the same name without pruning.
        params: ``keep``, below 1, and ``scorer``. The scorer need not be known as long as nothing is encoded.

    Raises:
        ConfigError: another parameter, or a value out of range.
    """

    def __init__(self, inner: Codec, params: Mapping[str, ParamValue]) -> None:
        own = check_params(inner.name, params, RULES)
        self.name = inner.name
        self.params: Mapping[str, ParamValue] = dict(sorted({**inner.params, **own}.items()))
        self.columns = (KEPT, *inner.columns)
        self._inner = inner
        self._thousandths = round(1000 * float(own["keep"]))

    @property
    def pruning(self) -> Pruning:
        """Its pruning. Raises ``UnknownScorerError``."""
        return Pruning(self._thousandths, get_scorer(str(self.params["scorer"])))

    def value_bytes(self, shape: CacheShape) -> dict[str, tuple[int, int]]:
        """See ``Codec.value_bytes``."""
        size = kept_bytes(shape)
        return {KEPT: (size, size), **self._inner.value_bytes(self._left_of(shape))}

    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """See ``Codec.encode``. A cache that is pruned already is taken as it is, one that is not is pruned first.

        Raises:
            UnknownScorerError, PrunedCacheError: it has to be pruned and cannot be, or has been to another share.
        """
        if cache.kept is None:
            cache = self.pruning.prune(cache)
        slots = kept_tokens(self._thousandths, cache.tokens)
        if cache.slots != slots:
            raise PrunedCacheError(
                f"a document of {cache.tokens} tokens was pruned to {cache.slots}, and this codec keeps {slots}."
            )
        layers, heads, _, head_dim = cache.keys.shape
        shape = CacheShape(
            layers, heads, cache.tokens, head_dim, cache.values.shape[3], dtype_name(cache.keys.dtype)
        )  # fmt: skip
        kept = cache.kept
        if kept is None:
            kept = torch.arange(slots, dtype=torch.int32).expand(layers, heads, slots)
        left = self._inner.encode(DocumentCache(cache.token_ids[:slots], cache.keys, cache.values))
        columns = {KEPT: pack_kept(kept, cache.tokens), **left.columns}
        return EncodedDocument(shape, cache.token_ids.cpu(), columns, left.params)

    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        """See ``Codec.decode``."""
        shape = document.shape
        left = self._left_of(shape)
        kept = unpack_kept(document.columns[KEPT], shape, left.tokens)
        columns = {name: document.columns[name] for name in self._inner.columns}
        token_ids = document.token_ids
        cache = self._inner.decode(
            EncodedDocument(left, token_ids[: left.tokens], columns, document.params), device
        )  # fmt: skip
        where = None if left.tokens == shape.tokens else kept.to(device)
        return DocumentCache(token_ids, cache.keys, cache.values, where)

    def _left_of(self, shape: CacheShape) -> CacheShape:
        """The shape of what is left of a cache of ``shape``."""
        return replace(shape, tokens=kept_tokens(self._thousandths, shape.tokens))


def pruned(inner: Codec, params: Mapping[str, ParamValue]) -> Codec:
    """``inner``, pruned as its ``params`` among ``RULES`` say; itself where they keep everything.

    Raises:
        ConfigError: a value out of range, or a scorer of nothing.
    """
    if not params:
        return inner
    if "keep" not in params:
        raise ConfigError(
            f"codec {inner.name!r} has a scorer and keeps all tokens; say how many with keep, e.g. keep=0.5.",
            param="codec",
        )
    made = PrunedCodec(inner, params)
    return inner if made.params["keep"] == 1 else made


def pruning_of(codec: Codec) -> Pruning | None:
    """What a ``DocumentEncoder`` needs, for a codec that prunes. Raises ``UnknownScorerError``."""
    return codec.pruning if isinstance(codec, PrunedCodec) else None
