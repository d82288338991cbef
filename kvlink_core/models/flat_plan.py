"""Which rows of queries meet which keys in a flat pass, and how their results belong together again."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.models.flat_parts import Segment, Slots, Span
from kvlink_core.models.turning import QueryTurner

#: The model's predicate: batch, head, position of the query, position of the key -> seen or not.
Seen = Callable[..., torch.Tensor]


@dataclass(slots=True)
class Call:
    """Rows ``begin..end-1`` over one context.

    Attributes:
        lanes: over how many lanes, a row each; 1 for any number of rows over one.
        keys, values: ``[layers, lanes, kv_heads, slots, dim]``, views.
        mask: additive, ``[lanes, 1, rows of a lane x groups, slots]``; ``None`` where all is seen.
        hidden: makes a layer's mask ``[1, kv_heads, rows x groups, slots]``, boolean, of what is seen, where each layer
            and head has other tokens and some are out of sight.
    """

    begin: int
    end: int
    lanes: int
    keys: torch.Tensor
    values: torch.Tensor
    mask: torch.Tensor | None
    hidden: Callable[[int], torch.Tensor] | None = None

    def context(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer."""
        return self.keys[layer], self.values[layer]


@dataclass(slots=True)
class Plan:
    """How a layer attends.

    Attributes:
        rows: int64, the token of each row; rows that read documents come first.
        turned: how many those are.
        distances: by how much each of these is turned back.
        calls: over all rows, in order.
        table, there: as ``merge_parts`` takes them.
        groups: query heads of a key head.
    """

    rows: torch.Tensor
    turned: int
    distances: torch.Tensor
    calls: list[Call]
    table: torch.Tensor
    there: torch.Tensor | None
    groups: int
    _tables: list[tuple[torch.Tensor, ...]] | None = field(default=None, repr=False)

    def tables(self, turner: QueryTurner) -> list[tuple[torch.Tensor, ...]]:
        """Tables that turn the rows back; made by the first layer that asks."""
        if self._tables is None:
            self._tables = turner.tables(self.distances)
        return self._tables


def make_plan(
    spans: Sequence[Span],
    starts: Sequence[int],
    positions: torch.Tensor,
    seen: Seen | None,
    *,
    groups: int,
    dtype: torch.dtype,
) -> Plan:
    """Plan the attention of one kind of layers.

    Args:
        spans: those with one token first, and of these, those of one memory side by side, by lane.
        starts: the first token of each.
        positions: int64, of all tokens.
        seen: the model's predicate, or ``None`` for plain causality.
        groups, dtype: of the queries.
    """
    maker = _Maker(positions, seen, groups, dtype)
    maker.documents(spans, starts)
    turned = maker.count
    single = [(span, start) for span, start in zip(spans, starts, strict=True) if len(span.slots) == 1]
    while single:
        memory = single[0][0].memory
        together = [pair for pair in single if pair[0].memory is memory]
        single = single[len(together) :]
        maker.lanes(memory, together)
    for span, start in zip(spans, starts, strict=True):
        if len(span.slots) > 1:
            maker.chunk(span, start)
    return maker.plan(turned)


class _Maker:
    def __init__(self, positions: torch.Tensor, seen: Seen | None, groups: int, dtype: torch.dtype) -> None:
        self._positions = positions
        self._seen = seen
        self._groups = groups
        self._dtype = dtype
        self._device = positions.device
        self._zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=self._device)
        self._rows: list[torch.Tensor] = []
        self._distances: list[torch.Tensor] = []
        self._calls: list[Call] = []
        self.count = 0

    def documents(self, spans: Sequence[Span], starts: Sequence[int]) -> None:
        """Every document once, with the rows of all prompts that read it."""
        readers: dict[int, tuple[Segment, list[int], list[int], list[int]]] = {}
        for span, begin in zip(spans, starts, strict=True):
            for reading in span.readings:
                behind = bisect_right(span.positions, reading.start)
                entry = readers.setdefault(id(reading.segment), (reading.segment, [], [], []))
                those = range(begin + behind, begin + len(span.positions))
                entry[1].extend(those)
                entry[2].extend([reading.start] * len(those))
                entry[3].extend([reading.turn] * len(those))
        for segment, tokens, firsts, turns in readers.values():
            if not tokens:
                continue
            rows, start, turn = (torch.tensor(x, device=self._device) for x in (tokens, firsts, turns))
            keys, values = segment.keys[:, None], segment.values[:, None]
            if self._seen is None:
                self._add(rows, keys, values, None, turn)
            elif segment.kept is None:
                slots = start[:, None] + torch.arange(segment.slots, device=self._device)
                self._part(rows, slots, keys, values, turn)
            else:
                self._add(rows, keys, values, None, turn)
                self._calls[-1].hidden = self._by_head(self._seen, rows, start, segment.kept)

    def _by_head(
        self, seen: Seen, rows: torch.Tensor, start: torch.Tensor, kept: torch.Tensor
    ) -> Callable[[int], torch.Tensor]:
        """What rows see of a pruned document, by layer: each of its heads has other tokens."""

        def visible(layer: int) -> torch.Tensor:
            asked = self._positions[rows][None, None, :, None]
            held = kept[layer][None, :, None] + start[None, None, :, None]
            return seen(self._zero, self._zero, asked, held).repeat_interleave(self._groups, 2)

        return visible

    def lanes(self, memory: Slots, together: Sequence[tuple[Span, int]]) -> None:
        """One token in each of several lanes of one memory."""
        low, high = together[0][0].lane, together[-1][0].lane + 1
        last = [span.slots[0] for span, _ in together]
        length = max(last) + 1
        keys, values = memory.keys[:, low:high, :, :length], memory.values[:, low:high, :, :length]
        at = {span.lane: (start, span.slots[0]) for span, start in together}
        # A lane in between that is idle gets a row that nobody asks for.
        filled = [at.get(lane, (-1, 0)) for lane in range(low, high)]
        tokens = torch.tensor([token for token, _ in filled], device=self._device)
        if self._seen is None and all(slot + 1 == length for _, slot in filled):
            self._add(tokens, keys, values, None, lanes=high - low)
            return
        ends = torch.tensor([slot for _, slot in filled], device=self._device)[:, None, None, None]
        visible = torch.arange(length, device=self._device)[None, None, None] <= ends
        if self._seen is not None:
            asked = self._positions[tokens.clamp(min=0)][:, None, None, None]
            visible = visible & self._seen(
                self._zero, self._zero, asked, memory.positions[low:high, None, None, :length]
            )
            idle = (tokens < 0)[:, None, None, None]
            visible = visible | (idle & (torch.arange(length, device=self._device) == 0))
        self._add(tokens, keys, values, visible.expand(-1, 1, self._groups, -1), lanes=high - low)

    def chunk(self, span: Span, start: int) -> None:
        """Several tokens of one prompt: over what is there, and over themselves."""
        rows = torch.arange(start, start + len(span.slots), device=self._device)
        first, end = span.slots[0], span.slots[-1] + 1
        keys, values = span.memory.keys[:, span.lane, None], span.memory.values[:, span.lane, None]
        slots = span.memory.positions[span.lane]
        if first and self._seen is None:
            self._add(rows, keys[..., :first, :], values[..., :first, :], None)
        elif first:
            self._part(rows, slots[None, :first], keys[..., :first, :], values[..., :first, :])
        self._part(rows, slots[None, first:end], keys[..., first:end, :], values[..., first:end, :])

    def _part(
        self,
        rows: torch.Tensor,
        slots: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        turn: torch.Tensor | None = None,
    ) -> None:
        """A call without the rows that see nothing and the slots that nobody sees.

        Args:
            rows: tokens.
            slots: positions of the slots ``[rows or 1, slots]``.
            keys, values: ``[layers, 1, kv_heads, slots, dim]``.
            turn: by how much each row is turned back.
        """
        asked = self._positions[rows][:, None]
        if self._seen is None:
            visible = slots <= asked
        else:
            visible = self._seen(self._zero, self._zero, asked[None, None], slots[None, None])[0, 0]
        visible = visible.expand(rows.shape[0], slots.shape[1])
        some = torch.nonzero(visible.any(1)).flatten()
        if not some.shape[0]:
            return
        columns = torch.nonzero(visible.any(0)).flatten()
        low, high = int(columns[0]), int(columns[-1]) + 1
        visible = visible[some, low:high]
        mask = None if bool(visible.all()) else visible.repeat_interleave(self._groups, 0)[None, None]
        turn = None if turn is None else turn[some]
        self._add(rows[some], keys[..., low:high, :], values[..., low:high, :], mask, turn)

    def _add(
        self,
        rows: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        visible: torch.Tensor | None,
        turn: torch.Tensor | None = None,
        *,
        lanes: int = 1,
    ) -> None:
        mask = None
        if visible is not None:
            mask = torch.zeros(visible.shape, dtype=self._dtype, device=self._device)
            mask = mask.masked_fill_(~visible, -torch.inf)
        count = rows.shape[0]
        self._calls.append(Call(self.count, self.count + count, lanes, keys, values, mask))
        self._rows.append(rows)
        if turn is not None:
            self._distances.append(turn)
        self.count += count

    def plan(self, turned: int) -> Plan:
        """What was collected."""
        rows = torch.cat(self._rows)
        table, there = _table(rows, self._positions.shape[0])
        distances = torch.cat(self._distances) if self._distances else rows[:0]
        assert distances.shape[0] == turned
        return Plan(rows.clamp(min=0), turned, distances, self._calls, table, there, self._groups)


def _table(rows: torch.Tensor, tokens: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """By token, the rows that are its; every token has one. A negative number in ``rows`` is nobody's."""
    order = torch.argsort(rows, stable=True)
    order = order[int((rows < 0).sum()) :]
    counts = torch.bincount(rows[order], minlength=tokens)
    firsts = counts.cumsum(0) - counts
    most = int(counts.max())
    along = torch.arange(most, device=rows.device)
    there = along[None] < counts[:, None]
    table = order[(firsts[:, None] + along).where(there, firsts[:, None])]
    return table, None if bool(there.all()) else there
