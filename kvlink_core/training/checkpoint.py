"""Training checkpoints in parts of a limited size, without pickled code."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

PART_BYTES = 15 * 1024 * 1024


def save_checkpoint(folder: Path, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
    """Write ``part-*.bin`` (a safetensors file cut in pieces) and ``state.json``; the state is written last."""
    folder.mkdir(parents=True, exist_ok=True)
    data = memoryview(save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}))
    count = -(-len(data) // PART_BYTES)
    for index in range(count):
        part = data[index * PART_BYTES : (index + 1) * PART_BYTES]
        (folder / f"part-{index}.bin").write_bytes(part)
    (folder / "state.json").write_text(json.dumps({**state, "parts": count}), encoding="utf-8")


def load_checkpoint(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the state of ``save_checkpoint``. Raises ``FileNotFoundError`` if the folder holds none."""
    state: dict[str, Any] = json.loads((folder / "state.json").read_text(encoding="utf-8"))
    data = io.BytesIO()
    for index in range(int(state["parts"])):
        data.write((folder / f"part-{index}.bin").read_bytes())
    return load(data.getvalue()), state


def optimizer_tensors(optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """Both moments of every parameter in bfloat16, as ``m.NAME`` and ``v.NAME``."""
    out: dict[str, Tensor] = {}
    for parameter, name in names.items():
        state = optimizer.state[parameter]
        out[f"m.{name}"] = state["exp_avg"].to(torch.bfloat16)
        out[f"v.{name}"] = state["exp_avg_sq"].to(torch.bfloat16)
    return out


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], step: int
) -> None:
    """Put the moments of ``optimizer_tensors`` back into a fresh AdamW."""
    for parameter, name in names.items():
        optimizer.state[parameter] = {
            # A fused AdamW keeps its step on the parameter's device.
            "step": torch.tensor(float(step), device=parameter.device if parameter.is_cuda else None),
            "exp_avg": tensors[f"m.{name}"].to(parameter.device, parameter.dtype),
            "exp_avg_sq": tensors[f"v.{name}"].to(parameter.device, parameter.dtype),
        }
