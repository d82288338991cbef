"""The network of the family: ``TrainingLlama`` with embedding rows beyond the vocabulary, and its export."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save
from torch import Tensor, nn

from kvlink_core.training.export import export_weights
from kvlink_core.training.family.rows import EXTRA, HEADER, LINK_ROWS, VOCABULARY
from kvlink_core.training.llama import Attend, Shape, TrainingLlama, attend_dense
from kvlink_core.training.tokenizer import LINKS


class FamilyLlama(TrainingLlama):
    """Ids from ``VOCABULARY`` on are rows of ``extra``: link tokens, header and trailer that a frozen base is given."""

    def __init__(self, shape: Shape, seed: int = 0, attend: Attend = attend_dense) -> None:
        super().__init__(shape, seed, attend)
        generator = torch.Generator().manual_seed(seed + 1)
        self.extra = nn.Parameter(torch.randn(EXTRA, shape.width, generator=generator) * 0.06)

    def forward(self, ids: Tensor, positions: Tensor, mask: Any, at: Tensor) -> Tensor:
        """Logits ``[B, A, vocabulary]``; as ``TrainingLlama.forward``."""
        angle = positions[:, None, :, None].float() * self.get_buffer("frequency")
        cos, sin = angle.cos(), angle.sin()
        x = F.embedding(ids, torch.cat([self.model.embed_tokens.weight, self.extra]))
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, self.attend)
        x = torch.gather(x, 1, at[..., None].expand(-1, -1, x.shape[-1]))
        logits: Tensor = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return logits.float()


def export(shape: Shape, weights: Mapping[str, Tensor], variant: str, layout: Path, folder: Path, name: str) -> None:
    """Write a directory that ``load_model`` takes: weights in bfloat16, tokenizer and ``kvlink.json`` of ``variant``.

    Args:
        shape, weights: of a ``FamilyLlama``.
        variant: ``base``, ``k0``, ``k1``, ``k5``, ``link-only`` or ``wrap``.
        layout: a directory with the tokenizer's files and the ``kvlink.json`` to start from.
        folder: where to write.
        name: public model id.
    """
    from transformers import AutoTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(layout / file, folder / file)
    tokenizer = AutoTokenizer.from_pretrained(layout)
    tensors = {key: tensor for key, tensor in weights.items() if key != "extra"}
    ids = [int(tokenizer.convert_tokens_to_ids(link)) for link in LINKS]
    extra = weights["extra"].detach().float().cpu()
    if variant == "link-only":
        rows = tensors["model.embed_tokens.weight"].detach().float().cpu().clone()
        rows[ids] = extra[LINK_ROWS - VOCABULARY : LINK_ROWS - VOCABULARY + len(ids)]
        tensors["model.embed_tokens.weight"] = rows
    export_weights(shape, tensors, tokenizer, folder)
    kvlink = json.loads((layout / "kvlink.json").read_text("utf-8"))
    kvlink["name"] = name
    k = {"k1": 1, "k5": 5, "link-only": 5}.get(variant, 0)
    for key in ("link_tokens", "default_linker"):
        kvlink.pop(key, None)
    if k:
        kvlink["link_tokens"] = {"k": k, "ids": ids[:k], "per_place": False}
    if variant == "wrap":
        wrap = extra[5:]
        tensors = {"header": wrap[:HEADER].contiguous(), "trailer": wrap[HEADER:].contiguous()}
        (folder / "soft_wrap.safetensors").write_bytes(save(tensors))
        kvlink["soft_wrap"] = "soft_wrap.safetensors"
    if variant == "base":
        kvlink["default_linker"] = "full"
    (folder / "kvlink.json").write_text(json.dumps(kvlink, indent=2) + "\n", encoding="utf-8")
