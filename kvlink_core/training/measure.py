"""Exact match of whole answers, from one forward pass.

Greedy decoding gives exactly the reference answer if and only if, at each of its tokens and at the closing end token,
the most likely token given the reference so far is the reference's own. So accuracy over whole answers needs no
decoding loop: a question counts when every one of its tokens is the argmax.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvlink_core.training.batches import IGNORED, KINDS, MODES, SLOTS, Rows

TAGS = 16 * len(MODES) * len(KINDS)

#: (ids, positions, context, document, question, at) -> logits [B, A, vocabulary]
Forward = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def to_device(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens [5, B, S]``, ``answers [3, B, A]`` and ``tags [B, SLOTS]`` as int64 on ``device``."""
    arrays = [torch.from_numpy(array) for array in (rows.tokens, rows.answers, rows.tags)]
    if device.type == "cuda":
        arrays = [array.pin_memory() for array in arrays]
    tokens, answers, tags = (array.to(device, non_blocking=True).long() for array in arrays)
    return tokens, answers, tags


@torch.no_grad()
def count(logits: Tensor, answers: Tensor, tags: Tensor) -> Tensor:
    """``[2, TAGS]``: questions answered exactly, and questions, by tag."""
    wrong = (logits.argmax(-1) != answers[1]) & (answers[1] != IGNORED)
    errors = torch.zeros(tags.shape[0], SLOTS, device=tags.device)
    errors.scatter_add_(1, answers[2], wrong.float())
    used = tags >= 0
    right = (used & (errors == 0)).float()
    out = torch.zeros(2, TAGS, device=tags.device)
    index = tags.clamp(min=0).flatten()
    out[0].scatter_add_(0, index, right.flatten())
    out[1].scatter_add_(0, index, used.float().flatten())
    return out


def evaluate(forward: Forward, rows: Rows, device: torch.device, rows_each: int = 64, crop: bool = False) -> Tensor:
    """``count`` over all rows, in batches of exactly ``rows_each`` (the last is padded, so that shapes stay fixed).

    Does not switch gradients off: a compiled forward would be compiled a second time for that. ``crop`` cuts the
    padding of a batch away, for a forward that takes any length.
    """
    total = torch.zeros(2, TAGS, device=device)
    tokens, answers, tags = to_device(rows, device)
    for start in range(0, tags.shape[0], rows_each):
        part = slice(start, start + rows_each)
        batch, wanted, slots = tokens[:, part], answers[:, part], tags[part]
        missing = rows_each - slots.shape[0]
        if missing:
            batch = torch.cat([batch, batch.new_zeros(5, missing, batch.shape[2])], dim=1)
            empty = wanted.new_zeros(3, missing, wanted.shape[2])
            empty[1] = IGNORED
            wanted = torch.cat([wanted, empty], dim=1)
            slots = torch.cat([slots, slots.new_full((missing, SLOTS), -1)])
        if crop:
            batch = batch[:, :, : int((batch[2] > 0).any(0).sum())]
        logits = forward(batch[0], batch[1], batch[2], batch[3], batch[4], wanted[0])
        total += count(logits.detach(), wanted, slots)
    return total


def report(total: Tensor) -> dict[str, Any]:
    """Accuracy by mode: ``all``, by kind, by number of passages (the tag's group), and the number of questions."""
    table = total.double().cpu().view(2, 16, len(MODES), len(KINDS))
    out: dict[str, Any] = {}
    for index, (name, _) in enumerate(MODES):
        # A question that nothing answers is reported, but is no part of the whole.
        right, asked = table[0, :, index, :-1], table[1, :, index, :-1]
        if asked.sum() == 0:
            continue
        row: dict[str, Any] = {"n": int(asked.sum()), "all": _share(right.sum(), asked.sum())}
        for kind, label in enumerate(KINDS):
            row[label] = _share(table[0, :, index, kind].sum(), table[1, :, index, kind].sum())
            row[f"n {label}"] = int(table[1, :, index, kind].sum())
        by_group = {g: _share(right[g].sum(), asked[g].sum()) for g in range(16) if asked[g].sum() > 0}
        row["by passages"] = by_group
        out[name] = row
    return out


def _share(right: Tensor, asked: Tensor) -> float:
    return round(float(right / asked), 4) if asked > 0 else float("nan")


def line(result: dict[str, Any]) -> str:
    """One printable line of ``report``."""
    parts = []
    for name, row in result.items():
        kinds = " ".join(f"{label[0]}{row[label]:.3f}" for label in KINDS)
        parts.append(f"{name} {row['all']:.3f} ({kinds})")
    return " | ".join(parts)
