"""Codec ``raw``: the bytes of K and V as the model made them. Reading it computes nothing."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvlink_core.compress.codec import (
    CacheShape,
    EncodedColumn,
    EncodedDocument,
    ParamValue,
    bytes_of,
    no_document_params,
    tensor_of,
)
from kvlink_core.compress.params import check_params
from kvlink_core.errors import PayloadCorruptError
from kvlink_core.types import DocumentCache


class RawCodec:
    """Columns ``k`` and ``v`` in the model's own dtype; both directions are views where memory allows."""

    name = "raw"
    params: Mapping[str, ParamValue] = {}
    columns = ("k", "v")

    @classmethod
    def from_params(cls, params: Mapping[str, ParamValue]) -> RawCodec:
        """Make one. Raises ``ConfigError`` for any parameter, because it has none."""
        check_params(cls.name, params, {})
        return cls()

    def value_bytes(self, shape: CacheShape) -> dict[str, tuple[int, int]]:
        """See ``Codec.value_bytes``."""
        item = shape.torch_dtype.itemsize
        sizes = {"k": math.prod(shape.keys_shape[1:]) * item, "v": math.prod(shape.values_shape[1:]) * item}
        return {name: (size, size) for name, size in sizes.items()}

    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """See ``Codec.encode``."""
        layers = cache.keys.shape[0]
        columns = {
            name: EncodedColumn(data=bytes_of(tensor), lengths=(tensor[0].nbytes,) * layers)
            for name, tensor in (("k", cache.keys), ("v", cache.values))
        }
        return EncodedDocument(CacheShape.of(cache), cache.token_ids.cpu(), columns)

    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        """See ``Codec.decode``."""
        no_document_params(self.name, document)
        shape = document.shape
        tensors = {}
        for name, expected in (("k", shape.keys_shape), ("v", shape.values_shape)):
            column = document.columns[name]
            if len(column.lengths) != shape.layers or len(set(column.lengths)) > 1:
                raise PayloadCorruptError(f"column {name!r} is not {shape.layers} values of equal length")
            tensors[name] = tensor_of(column.data, expected, shape.torch_dtype).to(device)
        return DocumentCache(document.token_ids, tensors["k"], tensors["v"])
