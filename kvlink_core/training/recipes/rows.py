"""Rows of packed examples, in an order that depends on the recipe alone, and as tensors."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from kvlink_core.errors import ConfigError
from kvlink_core.training.recipes.examples import Example, Pair, Reader

IGNORED = -100
#: Rows that are filled side by side, so that a long example does not end a row half empty.
_OPEN = 8


class RowDataset(Dataset[list[Pair]]):
    """Rows by number: the same for the same sources, seed and length, whoever asks and from wherever one resumes.

    Rows are planned from the first on, as far as one has been asked for; what is kept of the plan is which examples
    stand in which row.

    Args:
        readers: the sources.
        rows: how many rows there are.
        max_tokens: length of a row.
        seed: of the draws.
    """

    def __init__(self, readers: Sequence[Reader], rows: int, max_tokens: int, seed: int) -> None:
        self._readers, self._rows, self._max = readers, rows, max_tokens
        self._random = random.Random(seed)
        self._weights = [r.source.weight for r in readers]
        self._orders: list[list[int]] = [[] for _ in readers]
        self._unusable: list[set[int]] = [set() for _ in readers]
        self._sizes: list[dict[int, int]] = [{} for _ in readers]
        self._open: list[tuple[int, list[tuple[int, int]]]] = []
        self._plan: list[list[tuple[int, int]]] = []

    def __len__(self) -> int:
        return self._rows

    def __getitem__(self, row: int) -> list[Pair]:
        while len(self._plan) <= row:
            self._draw()
        pairs = [self._readers[source].pair(index) for source, index in self._plan[row]]
        return [p for p in pairs if p is not None]

    @property
    def left_out(self) -> int:
        """Lines met so far that are longer than a row, or too short to cut."""
        return sum(map(len, self._unusable))

    def _draw(self) -> None:
        source = self._random.choices(range(len(self._readers)), self._weights)[0]
        order = self._orders[source]
        if not order:
            order.extend(range(len(self._readers[source])))
            self._random.shuffle(order)
        index = order.pop()
        size = self._size(source, index)
        if size is None:
            return
        for place, (used, row) in enumerate(self._open):
            if used + size <= self._max:
                row.append((source, index))
                self._open[place] = (used + size, row)
                return
        self._open.append((size, [(source, index)]))
        if len(self._open) > _OPEN:
            fullest = max(range(len(self._open)), key=lambda place: self._open[place][0])
            self._plan.append(self._open.pop(fullest)[1])

    def _size(self, source: int, index: int) -> int | None:
        if index in self._unusable[source]:
            return None
        if index not in self._sizes[source]:
            pair = self._readers[source].pair(index)
            if pair is None:
                self._unusable[source].add(index)
                if len(self._unusable[source]) == len(self._readers[source]):
                    name = self._readers[source].source.path.name
                    raise ConfigError(
                        f"no line of {name!r} makes an example: all are longer than max_tokens ({self._max}), or texts "
                        "shorter than a segment. Change max_tokens or segment_tokens, or leave the source out."
                    )
                return None
            self._sizes[source][index] = pair.tokens
        return self._sizes[source][index]


def collate(rows: Sequence[Sequence[Pair]], multiple: int = 8) -> dict[str, Any]:
    """Tensors of some rows, padded to the longest of them, rounded up to ``multiple``.

    Returns:
        int64 ``[rows, tokens]``: ``input_ids``; ``positions``, from 0 in each example; ``context``, the example's
        number in its row, from 1, 0 for padding; ``document`` as in ``Example``; ``labels``, at the token that
        predicts. With ``teacher_`` before the name, the same for the teachers' examples, if they have some.
    """
    batch = _tensors([[pair.example for pair in row] for row in rows], multiple)
    if all(pair.teacher is not None for row in rows for pair in row):
        teachers = [[pair.teacher for pair in row if pair.teacher is not None] for row in rows]
        batch |= {f"teacher_{name}": tensor for name, tensor in _tensors(teachers, multiple).items()}
    return batch


def _tensors(rows: Sequence[Sequence[Example]], multiple: int) -> dict[str, Tensor]:
    longest = max(sum(len(e.token_ids) for e in row) for row in rows)
    shape = (len(rows), -(-longest // multiple) * multiple)
    out = {name: torch.zeros(shape, dtype=torch.int64) for name in ("input_ids", "positions", "context", "document")}
    out["labels"] = torch.full(shape, IGNORED, dtype=torch.int64)
    for number, row in enumerate(rows):
        at = 0
        for context, example in enumerate(row, start=1):
            end = at + len(example.token_ids)
            ids = torch.tensor(example.token_ids, dtype=torch.int64)
            out["input_ids"][number, at:end] = ids
            out["positions"][number, at:end] = torch.arange(end - at)
            out["context"][number, at:end] = context
            out["document"][number, at:end] = torch.tensor(example.documents, dtype=torch.int64)
            out["labels"][number, at + example.target - 1 : end - 1] = ids[example.target :]
            at = end
    return out
