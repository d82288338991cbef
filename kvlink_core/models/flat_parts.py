"""What the new tokens of a flat pass attend to: documents that prompts share, and slots of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Memory for the own tokens of some prompts, one lane each.

    Attributes:
        keys, values: ``[layers, lanes, kv_heads, slots, dim]``; finite everywhere, also where nothing was written yet.
        positions: int64 ``[lanes, slots]``, of what each slot holds.
    """

    keys: torch.Tensor
    values: torch.Tensor
    positions: torch.Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Segment:
    """A document's keys, rotated to its own positions, and its values: ``[layers, kv_heads, slots, dim]``. Shared.

    Attributes:
        kept: ``[layers, kv_heads, slots]``, the tokens that are left of a pruned document; ``None`` for all of them.
    """

    keys: torch.Tensor
    values: torch.Tensor
    kept: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """How many."""
        return int(self.keys.shape[2])


@dataclass(frozen=True, slots=True)
class Reading:
    """A segment in one prompt.

    Attributes:
        segment: what is read.
        start: the position of its first token in the prompt.
        turn: by how many positions a query is turned back to read it.
    """

    segment: Segment
    start: int
    turn: int


@dataclass(frozen=True, slots=True)
class Span:
    """New tokens of one prompt (or document) in a pass.

    Attributes:
        token_ids, positions: of the tokens, ascending.
        slots: where their keys and values go, ascending. Everything before the first of them that the first token may
            see was written by earlier passes.
        memory, lane: whose slots.
        readings: documents; a token sees those that start before it.
        wants_logits: whether the logits after the last token are wanted.
        unrotated: ``[layers, kv_heads, slots, dim]``, where the keys before RoPE go as well, or ``None``.
    """

    token_ids: Sequence[int]
    positions: Sequence[int]
    slots: Sequence[int]
    memory: Slots
    lane: int
    readings: Sequence[Reading] = ()
    wants_logits: bool = True
    unrotated: torch.Tensor | None = None
