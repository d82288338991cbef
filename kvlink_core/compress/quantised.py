"""What ``fp8``, ``int8`` and ``int4`` have in common: groups, their endpoints, codes, bytes (FORMAT.md section 8)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Protocol

import torch

from kvlink_core.compress.codec import (
    CacheShape,
    EncodedColumn,
    EncodedDocument,
    ParamValue,
    bytes_of,
    fresh,
    no_document_params,
    tensor_of,
)
from kvlink_core.compress.endpoints import ENDPOINT_DTYPES, check_endpoints
from kvlink_core.compress.groups import Axis, Groups
from kvlink_core.compress.nibbles import join, split
from kvlink_core.compress.params import ZSTD_OFF, Choice, Rule, Whole, check_params
from kvlink_core.compress.values import least_bytes, pack_values, unpack_values
from kvlink_core.errors import ConfigError, PayloadCorruptError
from kvlink_core.types import DocumentCache

_Shape = tuple[int, int, int, int]


class Quantiser(Protocol):
    """From numbers to codes and back, group by group.

    ``elements`` are float32 ``[layers, heads, tokens, dim]``, a run of layers and heads; ``ends`` their groups'
    endpoints ``[per_group, layers, *counts]``, 16-bit floats; ``scales`` what follows from these, float32
    ``[layers, *counts]`` each.
    """

    @property
    def bits(self) -> int:
        """Bits of a code, 4 or 8."""
        ...

    @property
    def per_group(self) -> int:
        """Endpoints of a group."""
        ...

    def measure(self, elements: torch.Tensor, groups: Groups, ends: torch.Tensor) -> None:
        """Write the endpoints into ``ends``. Raises ``CorpusError`` for elements that are not finite."""
        ...

    def scales(self, ends: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What codes are made and read with."""
        ...

    def quantise(self, elements: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Codes, uint8 in the shape of ``elements``, which are overwritten."""
        ...

    def dequantise(
        self, codes: torch.Tensor, groups: Groups, scales: tuple[torch.Tensor, ...], elements: torch.Tensor
    ) -> None:
        """Write what ``codes`` stand for into ``elements``."""
        ...

    def check(self, codes: torch.Tensor, ends: torch.Tensor) -> None:
        """Raise ``PayloadCorruptError`` for what no writer writes: ``codes`` as stored, ``ends`` finite."""
        ...


class QuantisedCodec:
    """Columns ``k`` and ``v`` of codes, ``k_groups`` and ``v_groups`` of endpoints. Computes where the cache is.

    Args:
        name: as registered.
        quantiser: makes the codes.
        params: ``group``, elements that share endpoints; ``keys``, how keys are grouped; ``zstd``, its level or 0.
        group: the default of the first.

    Raises:
        ConfigError: a parameter that is none of these, or out of range.
    """

    columns = ("k", "k_groups", "v", "v_groups")

    def __init__(self, name: str, quantiser: Quantiser, params: Mapping[str, ParamValue], *, group: int) -> None:
        rules: dict[str, Rule] = {
            "group": Whole(group, 1, 65536),
            "keys": Choice(("channel", "token")),
            "zstd": ZSTD_OFF,
        }
        self.name = name
        self.params: Mapping[str, ParamValue] = check_params(name, params, rules)
        self._quantiser = quantiser
        self._group = int(self.params["group"])
        self._level = int(self.params["zstd"])
        self._axes: Mapping[str, Axis] = {"k": "token" if self.params["keys"] == "token" else "channel", "v": "token"}

    def value_bytes(self, shape: CacheShape) -> dict[str, tuple[int, int]]:
        """See ``Codec.value_bytes``. Raises ``PayloadCorruptError`` for a dtype that it does not take."""
        _endpoint_dtype(shape)
        sizes: dict[str, tuple[int, int]] = {}
        for name, full in _shapes(shape).items():
            codes, ends = self._sizes(self._groups(name, full))
            sizes |= {
                n: (least_bytes(size, self._level), size) for n, size in ((name, codes), (f"{name}_groups", ends))
            }
        return sizes

    @torch.no_grad()
    def encode(self, cache: DocumentCache) -> EncodedDocument:
        """See ``Codec.encode``.

        Raises:
            ConfigError: a cache of float64.
            CorpusError: a cache with values that are not finite.
        """
        shape = CacheShape.of(cache)
        if shape.dtype not in ENDPOINT_DTYPES:
            raise ConfigError(
                f"codec {self.name!r} does not take {shape.dtype}; use raw or lossless, or load the model as "
                f"{' or '.join(ENDPOINT_DTYPES)}.",
                param="codec",
            )
        columns: dict[str, EncodedColumn] = {}
        for name, tensor in (("k", cache.keys), ("v", cache.values)):
            codes, ends = self._quantise(tensor, self._groups(name, _shapes(shape)[name]), _endpoint_dtype(shape))
            columns[name] = pack_values(codes, self._level)
            columns[f"{name}_groups"] = pack_values(bytes_of(ends).view(shape.layers, -1), self._level)
        return EncodedDocument(shape, cache.token_ids.cpu(), columns)

    def _quantise(self, tensor: torch.Tensor, groups: Groups, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes as stored ``[layers, bytes]``, and endpoints ``[layers, per_group, *counts]``."""
        layers, device = groups.shape[0], tensor.device
        stored = torch.empty(layers, self._sizes(groups)[0], dtype=torch.uint8, device=device)
        ends = torch.empty(layers, self._quantiser.per_group, *groups.counts, dtype=dtype, device=device)
        for run in groups.layer_runs(device):
            codes = torch.empty(tensor[run].shape, dtype=torch.uint8, device=device)
            for heads in groups.head_runs(device):
                elements = tensor[run, heads].to(torch.float32, copy=True).contiguous()
                of_piece = ends[run, :, groups.of_heads(heads)].transpose(0, 1)
                self._quantiser.measure(elements, groups, of_piece)
                codes[:, heads] = self._quantiser.quantise(elements, groups, self._quantiser.scales(of_piece))
            stored[run] = join(codes.flatten(1)) if self._quantiser.bits == 4 else codes.flatten(1)
        return stored, ends

    @torch.no_grad()
    def decode(self, document: EncodedDocument, device: torch.device | None = None) -> DocumentCache:
        """See ``Codec.decode``."""
        no_document_params(self.name, document)
        dtype = _endpoint_dtype(document.shape)
        tensors: dict[str, torch.Tensor] = {}
        for name, full in _shapes(document.shape).items():
            groups = self._groups(name, full)
            size, ends_size = self._sizes(groups)
            stored = unpack_values(name, document.columns[name], groups.shape[0], size, self._level)
            ends_name = f"{name}_groups"
            bounds = unpack_values(
                ends_name, document.columns[ends_name], groups.shape[0], ends_size, self._level
            ).view(-1)
            ends = tensor_of(bounds, (groups.shape[0], self._quantiser.per_group, *groups.counts), dtype)
            check_endpoints(ends)
            self._quantiser.check(stored, ends.transpose(0, 1))
            tensors[name] = self._dequantise(
                stored.to(device), ends.to(device).transpose(0, 1), groups, document.shape.torch_dtype
            )
        return DocumentCache(document.token_ids, tensors["k"], tensors["v"])

    def _dequantise(self, stored: torch.Tensor, ends: torch.Tensor, groups: Groups, dtype: torch.dtype) -> torch.Tensor:
        device = stored.device
        decoded = fresh(groups.shape, dtype, device)
        most = groups.most_at_once(device)
        # Lent to one piece after the other, since memory that is new costs more than all that is done in it.
        numbers = decoded if dtype == torch.float32 else fresh((most,), torch.float32, device)
        nibbles = fresh((most,), torch.uint8, device) if self._quantiser.bits == 4 else None
        scales = self._quantiser.scales(ends)
        of_head = math.prod(groups.shape[2:])
        for run in groups.layer_runs(device):
            for heads in groups.head_runs(device):
                piece = decoded[run, heads]
                elements = piece if numbers is decoded else numbers[: piece.numel()].view(piece.shape)
                if nibbles is not None:
                    codes = nibbles[: piece.numel()].view(piece.shape)
                    split(stored[run], heads.start * of_head, codes.view(piece.shape[0], -1))
                else:
                    codes = stored[run].view(-1, *groups.shape[1:])[:, heads]
                of_run = tuple(s[run, groups.of_heads(heads)] for s in scales)
                self._quantiser.dequantise(codes, groups, of_run, elements)
                if elements is not piece:
                    piece.copy_(elements)
        return decoded

    def _groups(self, name: str, shape: _Shape) -> Groups:
        return Groups.of(shape, self._axes[name], self._group)

    def _sizes(self, groups: Groups) -> tuple[int, int]:
        """Bytes of one layer's codes and of its endpoints."""
        codes = math.ceil(math.prod(groups.shape[1:]) * self._quantiser.bits / 8)
        return codes, 2 * self._quantiser.per_group * groups.per_layer


def _shapes(shape: CacheShape) -> dict[str, _Shape]:
    return {"k": shape.keys_shape, "v": shape.values_shape}


def _endpoint_dtype(shape: CacheShape) -> torch.dtype:
    if shape.dtype not in ENDPOINT_DTYPES:
        raise PayloadCorruptError(f"a quantised cache cannot be {shape.dtype!r}")
    return ENDPOINT_DTYPES[shape.dtype]
