"""Exact match on held-out tales from one masked forward pass (see ``training/measure.py`` for why that is enough)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kvlink_core.training.family.feed import to_device
from kvlink_core.training.family.rows import ANSWERS, IGNORED, ROW, SLOTS, Rows, TalePacker
from kvlink_core.training.family.tales import KINDS, make_tale
from kvlink_core.training.worlds import TEST_SEEDS

#: (ids, positions, context, document, question, at) -> logits [B, A, vocabulary]
Forward = Callable[..., Tensor]


@torch.no_grad()
def right_answers(logits: Tensor, answers: Tensor) -> Tensor:
    """Whether each slot's answer is right: ``[B, SLOTS]`` (greedy decoding would give exactly the answer)."""
    wrong = (logits.argmax(-1) != answers[1]) & (answers[1] != IGNORED)
    errors = torch.zeros(logits.shape[0], SLOTS, device=logits.device)
    errors.scatter_add_(1, answers[2], wrong.float())
    return errors == 0


def count(logits: Tensor, answers: Tensor, tags: Tensor, groups: int) -> Tensor:
    """``[2, groups]``: questions answered exactly, and questions, by tag (below ``groups``)."""
    used = (tags >= 0).flatten()
    index = tags.clamp(min=0).flatten()
    out = torch.zeros(2, groups, device=tags.device)
    out[0].scatter_add_(0, index, (right_answers(logits, answers).flatten() & used).float())
    out[1].scatter_add_(0, index, used.float())
    return out


def held_out(
    tokenizer_file: Path, many: int, mode: str, *, own_links: bool, passages: tuple[int, int] = (4, 20)
) -> tuple[Rows, list[int]]:
    """All questions of the held-out tales in one mode, numbered in order, and the kind of each."""
    tales = [make_tale(seed, passages) for seed in range(TEST_SEEDS.start, TEST_SEEDS.start + many)]
    packer = TalePacker(tokenizer_file, own_links=own_links)
    kinds = [KINDS.index(q.kind) for tale in tales for q in tale.questions]
    stream, first = [], 0
    each = 8 if mode == "wrap" else 24  # as many as fit a row beside the longest tale
    for tale in tales:
        for start in range(0, len(tale.questions), each):
            part = tale.questions[start : start + each]
            stream.append((type(tale)(tale.passages, part), list(range(first, first + len(part)))))
            first += len(part)
    return Rows.joined(list(packer.rows(iter(stream), [mode], whole=True))), kinds


def measure(forward: Forward, rows: Rows, device: torch.device, rows_each: int) -> list[bool]:
    """Whether each numbered question is answered exactly, from one pass over its row (see ``training/measure.py``)."""
    tokens, answers, tags = to_device(rows, device)
    out = [False] * (int(tags.max()) + 1)
    for start in range(0, tags.shape[0], rows_each):
        part = slice(start, start + rows_each)
        batch, wanted, slots = tokens[:, part], answers[:, part], tags[part]
        missing = rows_each - slots.shape[0]
        if missing:
            batch = torch.cat([batch, batch.new_zeros(5, missing, ROW)], dim=1)
            empty = wanted.new_zeros(3, missing, ANSWERS)
            empty[1] = IGNORED
            wanted = torch.cat([wanted, empty], dim=1)
            slots = torch.cat([slots, slots.new_full((missing, SLOTS), -1)])
        right = right_answers(forward(*batch.unbind(0), wanted[0]).detach(), wanted)
        for tag, value in zip(slots[slots >= 0].tolist(), right[slots >= 0].tolist(), strict=True):
            out[tag] = value
    return out


def by_kind(right: list[bool], kinds: list[int]) -> Mapping[str, float]:
    """Share of right answers: all, and by kind."""
    table = {"all": sum(right) / len(right)}
    for number, kind in enumerate(KINDS):
        chosen = [r for r, k in zip(right, kinds, strict=True) if k == number]
        table[kind] = sum(chosen) / max(len(chosen), 1)
    return {k: round(v, 4) for k, v in table.items()}
