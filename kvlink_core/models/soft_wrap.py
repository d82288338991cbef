"""Trained embeddings around every document of a model (KV Packet, arXiv 2604.13226): a safetensors file beside it.

``kvlink.json`` names the file in ``soft_wrap``. It has two tensors, ``header [h, hidden]`` and ``trailer [t, hidden]``,
either of which may have no rows. They stand where the model's token embeddings do: in place of what its
``get_input_embeddings()`` returns. A wrapped document is a row of token ids like any other, in which ids from
``FIRST_WRAP_ID`` on name rows of header and trailer, so that storing, hashing and placing know nothing of it.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from kvlink_core.errors import ConfigError, ModelError, UnsupportedModelError
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.template import FIRST_WRAP_ID, WrapRows
from kvlink_core.text import first_line

_NAMES = ("header", "trailer")

#: Tokens of the trial in ``SoftWrap.check``.
_TRIAL = 5


@dataclass(frozen=True, slots=True)
class SoftWrap:
    """Header and trailer of a model.

    Attributes:
        embeddings: ``[h + t, hidden]``, the header's rows and then the trailer's, as they are in the file.
        rows: how many of each.
        digest: SHA-256 over names, dtypes, shapes and bytes of the two tensors.
    """

    embeddings: torch.Tensor
    rows: WrapRows
    digest: str

    def embed(self, embedding: torch.nn.Module, token_ids: torch.Tensor) -> torch.Tensor:
        """What the model's layers are given: ``[batch, n, hidden]``, in the dtype of ``embedding``.

        Args:
            embedding: the model's own.
            token_ids: int64 ``[batch, n]``, of the vocabulary or rows of the wrap.
        """
        wrapped = token_ids >= FIRST_WRAP_ID
        embedded: torch.Tensor = embedding(token_ids.masked_fill(wrapped, 0))
        embedded[wrapped] = self.embeddings.to(embedded)[token_ids[wrapped] - FIRST_WRAP_ID]
        return embedded

    def check(self, lm: CausalLM) -> None:
        """Try whether the model takes embeddings for tokens, and these.

        Raises:
            ConfigError: they are not as wide as the model's own.
            UnsupportedModelError: the model reads token ids in other places too, where a wrap has none.
        """
        embedding = lm.network.get_input_embeddings()
        token_ids = torch.arange(1, _TRIAL + 1, device=lm.device)[None]
        with torch.inference_mode():
            embedded = embedding(token_ids)
        if embedded.shape[-1] != self.embeddings.shape[1]:
            raise ConfigError(
                f"the soft_wrap embeddings are {self.embeddings.shape[1]} wide, and the model's are "
                f"{embedded.shape[-1]}: they were trained for another model."
            )
        try:
            asked, given = lm.encode(input_ids=token_ids), lm.encode(inputs_embeds=embedded)
        except (ValueError, TypeError, AttributeError, RuntimeError) as error:
            raise UnsupportedModelError(f"{_NOT_BY_EMBEDDINGS} ({first_line(error)}).") from error
        pairs = zip([*asked.keys, *asked.values], [*given.keys, *given.values], strict=True)
        if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5) for a, b in pairs):
            raise UnsupportedModelError(f"{_NOT_BY_EMBEDDINGS}.")


_NOT_BY_EMBEDDINGS = (
    "this model computes something else from embeddings than from the token ids they stand for, as models with inputs "
    "for each layer do; a soft wrap has no token ids. Remove soft_wrap from its kvlink.json"
)


def read_soft_wrap(directory: Path, name: str) -> SoftWrap:
    """Read a wrap.

    Args:
        directory: the model's.
        name: of the file in it.

    Raises:
        ConfigError: no such file, or its tensors are not those of a wrap.
        ModelError: it cannot be read.
    """
    path = directory / name
    if not path.is_file():
        raise ConfigError(f"kvlink.json names the soft_wrap file {name!r}, and {str(directory)!r} has no such file.")
    try:
        with safe_open(path, framework="pt") as file:
            tensors: dict[str, Any] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  # no mapping
    except (OSError, SafetensorError) as error:
        raise ModelError(f"cannot read the soft_wrap file {str(path)!r}: {first_line(error)}") from error
    if set(tensors) != set(_NAMES):
        raise ConfigError(f"{str(path)!r} has the tensors {', '.join(sorted(tensors))}, not header and trailer.")
    header, trailer = (tensors[key] for key in _NAMES)
    if header.ndim != 2 or trailer.ndim != 2 or header.shape[1] != trailer.shape[1] or not len(header) + len(trailer):
        raise ConfigError(
            f"{str(path)!r}: header {list(header.shape)} and trailer {list(trailer.shape)} are not rows of embeddings, "
            "one at least, all equally wide."
        )
    if not all(t.dtype.is_floating_point and bool(t.isfinite().all()) for t in (header, trailer)):
        raise ConfigError(f"{str(path)!r} has values that are not finite numbers.")
    return SoftWrap(
        torch.cat([header.float(), trailer.float()]), WrapRows(len(header), len(trailer)), _digest(header, trailer)
    )


def _digest(header: torch.Tensor, trailer: torch.Tensor) -> str:
    digest = hashlib.sha256()
    for name, tensor in zip(_NAMES, (header, trailer), strict=True):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
