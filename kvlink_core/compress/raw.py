"""Codec ``raw``: the bytes of K and V as the model made them. Reading it computes nothing."""

from __future__ import annotations

from collections.abc import Mapping

from kvlink_core.compress.codec import (
    CacheShape,
    ColumnSpec,
    EncodedColumn,
    EncodedDocument,
    ParamValue,
    bytes_of,
    tensor_of,
)
from kvlink_core.errors import ConfigError, PayloadCorruptError
from kvlink_core.types import DocumentCache


class RawCodec:
    """Columns ``k`` and ``v`` in the model's own dtype; both directions are views where memory allows."""

    name = "raw"
    params: Mapping[str, ParamValue] = {}
    columns = (ColumnSpec("k"), ColumnSpec("v"))

    @classmethod
    def from_params(cls, params: Mapping[str, ParamValue]) -> RawCodec:
        """Make one. Raises ``ConfigError`` for any parameter, because it has none."""
        if params:
            raise ConfigError(f"codec 'raw' has no parameters, but got {sorted(params)}", param="codec")
        return cls()

    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """See ``Codec.encode``."""
        layers = cache.keys.shape[0]
        columns = {
            name: EncodedColumn(data=bytes_of(tensor), lengths=(tensor[0].nbytes,) * layers)
            for name, tensor in (("k", cache.keys), ("v", cache.values))
        }
        return EncodedDocument(CacheShape.of(cache), cache.token_ids.cpu(), columns)

    def decode(self, document: EncodedDocument) -> DocumentCache:
        """See ``Codec.decode``."""
        if document.params:
            raise PayloadCorruptError(f"codec 'raw' knows no parameters {sorted(document.params)}")
        shape = document.shape
        tensors = {}
        for name, expected in (("k", shape.keys_shape), ("v", shape.values_shape)):
            column = document.columns[name]
            if len(column.lengths) != shape.layers or len(set(column.lengths)) > 1:
                raise PayloadCorruptError(f"column {name!r} is not {shape.layers} values of equal length")
            tensors[name] = tensor_of(column.data, expected, shape.torch_dtype)
        return DocumentCache(document.token_ids, tensors["k"], tensors["v"])
