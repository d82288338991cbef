"""What a codec is: a document cache to columns of bytes and back.

A codec knows nothing of files. It turns K and V into named columns, one value of bytes per layer, plus the parameters
that decoding needs; the store writes the columns down, checks them when it reads them, and hands them back.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch

from kvlink_core.errors import PayloadCorruptError, PrunedCacheError
from kvlink_core.types import DocumentCache

#: What a parameter may be: anything that JSON writes and reads back unchanged.
ParamValue = str | int | float | bool

#: The dtypes that can be stored, by the name they have in fingerprints and manifests.
DTYPES: Mapping[str, torch.dtype] = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float64": torch.float64,
}


def dtype_name(dtype: torch.dtype) -> str:
    """The stored name of ``dtype``, e.g. ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True, slots=True)
class CacheShape:
    """The shape of a document cache: keys ``[layers, kv_heads, tokens, head_dim]``, values with ``value_dim``.

    That of a pruned document is the shape that it had; how many of its ``tokens`` are left, its codec says.
    """

    layers: int
    kv_heads: int
    tokens: int
    head_dim: int
    value_dim: int
    dtype: str

    @classmethod
    def of(cls, cache: DocumentCache) -> CacheShape:
        """The shape of ``cache``.

        Raises:
            PrunedCacheError: it lacks tokens, which no codec stores that does not prune.
        """
        if cache.kept is not None:
            raise PrunedCacheError("a pruned cache can be stored by a codec with keep alone.", param="codec")
        layers, kv_heads, tokens, head_dim = cache.keys.shape
        return cls(layers, kv_heads, tokens, head_dim, cache.values.shape[3], dtype_name(cache.keys.dtype))

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch knows it. Raises ``PayloadCorruptError`` for a name that is not in ``DTYPES``."""
        if self.dtype not in DTYPES:
            raise PayloadCorruptError(f"dtype {self.dtype!r} is none of {sorted(DTYPES)}")
        return DTYPES[self.dtype]

    @property
    def keys_shape(self) -> tuple[int, int, int, int]:
        """Shape of the keys."""
        return (self.layers, self.kv_heads, self.tokens, self.head_dim)

    @property
    def values_shape(self) -> tuple[int, int, int, int]:
        """Shape of the values."""
        return (self.layers, self.kv_heads, self.tokens, self.value_dim)


@dataclass(frozen=True, slots=True)
class EncodedColumn:
    """The values of one column, one per layer, laid end to end.

    Attributes:
        data: uint8 ``[sum(lengths)]``, contiguous, on the CPU; or, as values of equal length lie in a shard,
            ``[layers, length]`` with gaps between them. May be a view of memory that must not be written.
        lengths: bytes of each layer's value.
    """

    data: torch.Tensor
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class EncodedDocument:
    """A document cache as a codec wrote it.

    Attributes:
        shape: of the cache that it decodes to, before pruning.
        token_ids: int64 ``[tokens]``.
        columns: by name, exactly those of the codec.
        params: what decoding this very document needs beyond the codec's own parameters.
    """

    shape: CacheShape
    token_ids: torch.Tensor
    columns: Mapping[str, EncodedColumn]
    params: Mapping[str, ParamValue] = field(default_factory=dict)


class Codec(Protocol):
    """How K and V become bytes. Implementations are stateless and safe to use from several threads."""

    @property
    def name(self) -> str:
        """The name that users and shards call it by."""
        ...

    @property
    def params(self) -> Mapping[str, ParamValue]:
        """All parameters that it was made with, so that ``make_codec(name, params)`` makes an equal one."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """The names of the columns, in the order in which they are stored."""
        ...

    def value_bytes(self, shape: CacheShape) -> Mapping[str, tuple[int, int]]:
        """By column, the fewest and the most bytes that the value of one layer may have in a document of ``shape``.

        Costs nothing, whatever the shape says. Raises ``PayloadCorruptError`` for a dtype that the codec does not take.
        """
        ...

    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """Encode ``cache``, on its device. The result may share memory with it.

        Raises ``InputError`` for a cache that this codec cannot store.
        """
        ...

    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        """Decode ``document`` onto ``device`` (``None``: the CPU), to which the bytes travel as small as they are.

        The result may share memory with it, so it must not be written to.

        Raises ``PayloadCorruptError`` when columns or parameters do not fit the shape, before memory is allocated for
        what the shape claims.
        """
        ...


def codec_spec(codec: Codec) -> str:
    """The codec as one string, fit for a key: ``raw``, or ``name:key=value,...`` sorted by key."""
    if not codec.params:
        return codec.name
    return codec.name + ":" + ",".join(f"{key}={codec.params[key]}" for key in sorted(codec.params))


def no_document_params(codec: str, document: EncodedDocument) -> None:
    """Raise ``PayloadCorruptError`` when the document has parameters, of which ``codec`` knows none."""
    if document.params:
        raise PayloadCorruptError(f"codec {codec!r} knows no parameters {sorted(document.params)} of a document")


def fresh(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Memory for a tensor, its content undefined.

    On the CPU NumPy's, which asks the system for large pages where there are any: the first touch of small ones takes
    longer than most codecs do.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(math.prod(shape) * dtype.itemsize, dtype=np.uint8)).view(dtype).view(shape)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of ``tensor`` in C order as uint8 ``[nbytes]`` on the CPU; a view where possible."""
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def packed(data: torch.Tensor) -> torch.Tensor:
    """The bytes of a column (``EncodedColumn.data``) as uint8 ``[sum(lengths)]``, copied where there are gaps."""
    # NumPy's copy, not torch's, which would start threads of its own for each thread that reads.
    return data if data.ndim == 1 else torch.from_numpy(data.numpy().copy()).view(-1)


def tensor_of(data: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Read bytes as a tensor, without a copy unless the bytes are not aligned for ``dtype``.

    Where ``data`` has gaps (``EncodedColumn.data``) the tensor has them too, between its layers.

    Raises ``PayloadCorruptError`` when the number of bytes is not that of ``shape``.
    """
    needed = math.prod(shape) * dtype.itemsize
    if data.numel() != needed:
        raise PayloadCorruptError(f"{data.numel()} bytes for a tensor {list(shape)} that needs {needed}")
    item = dtype.itemsize
    if (
        data.data_ptr() % item or data.storage_offset() % item or (data.ndim > 1 and data.stride(0) % item)
    ):  # torch would read it on this processor, but nothing promises that it may
        data = packed(data) if data.ndim > 1 else torch.from_numpy(data.numpy().copy())
    return data.view(dtype).view(shape)
