"""``lossless``: the bytes of K and V, sorted by their place in an element, and zstd. Bit for bit.

The highest bytes hold exponents, which repeat and shrink; the lowest ones hold the ends of mantissas, which do not.
FORMAT.md section 8 says why Parquet's own encoding for this does not serve.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

from kvlink_core.compress.codec import (
    CacheShape,
    EncodedDocument,
    ParamValue,
    fresh,
    no_document_params,
)
from kvlink_core.compress.params import ZSTD_ON, check_params
from kvlink_core.compress.values import least_bytes, pack_values, unpack_values
from kvlink_core.types import DocumentCache

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class LosslessCodec:
    """Columns ``k`` and ``v`` of planes of bytes.

    Args:
        params: ``zstd``, its level.

    Raises:
        ConfigError: another parameter, or a level that there is not.
    """

    name = "lossless"
    columns = ("k", "v")

    def __init__(self, params: Mapping[str, ParamValue]) -> None:
        self.params: Mapping[str, ParamValue] = check_params(self.name, params, {"zstd": ZSTD_ON})
        self._level = int(self.params["zstd"])

    def value_bytes(self, shape: CacheShape) -> dict[str, tuple[int, int]]:
        """See ``Codec.value_bytes``."""
        item = shape.torch_dtype.itemsize
        sizes = {"k": math.prod(shape.keys_shape[1:]) * item, "v": math.prod(shape.values_shape[1:]) * item}
        return {name: (least_bytes(size, self._level), size) for name, size in sizes.items()}

    @torch.no_grad()
    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """See ``Codec.encode``."""
        columns = {
            name: pack_values(_planes(tensor), self._level) for name, tensor in (("k", cache.keys), ("v", cache.values))
        }
        return EncodedDocument(CacheShape.of(cache), cache.token_ids.cpu(), columns)

    @torch.no_grad()
    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        """See ``Codec.decode``."""
        no_document_params(self.name, document)
        shape = document.shape
        tensors = {}
        for name, (_, size) in self.value_bytes(shape).items():
            expected = shape.keys_shape if name == "k" else shape.values_shape
            planes = unpack_values(name, document.columns[name], shape.layers, size, self._level).to(device)
            tensors[name] = _elements(planes, expected, shape.torch_dtype)
        return DocumentCache(document.token_ids, tensors["k"], tensors["v"])


def _planes(tensor: torch.Tensor) -> torch.Tensor:
    """Uint8 ``[layers, bytes]``: in each layer the lowest byte of every element, then the next one, and so on."""
    item = tensor.dtype.itemsize
    planes = torch.empty(tensor.shape[0], item, math.prod(tensor.shape[1:]), dtype=torch.uint8, device=tensor.device)
    for layer, of_layer in zip(tensor, planes, strict=True):
        bits = layer.contiguous().view(-1).view(_INTEGERS[item])
        for number, plane in enumerate(of_layer):
            plane.copy_(bits.bitwise_right_shift(8 * number))  # to uint8, which keeps the low byte
    return planes.flatten(1)


def _elements(planes: torch.Tensor, shape: tuple[int, int, int, int], dtype: torch.dtype) -> torch.Tensor:
    """The reverse, in ``shape``."""
    item = dtype.itemsize
    tensor = fresh(shape, dtype, planes.device)
    for layer, of_layer in zip(tensor, planes.view(shape[0], item, -1), strict=True):
        bits = layer.view(-1).view(_INTEGERS[item])
        bits.copy_(of_layer[-1])
        for plane in reversed(of_layer[:-1]):
            bits.bitwise_left_shift_(8).bitwise_or_(plane.to(bits.dtype))
    return tensor
