"""Where each token of a decode step writes and reads, as tables of addresses for ``decode_triton``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kvlink_core.models.flat_parts import Segment, Slots, Span

#: Integers of an entry of ``Tables.tokens`` and of ``Tables.parts``.
TOKEN_FIELDS, PART_FIELDS = 8, 10


@dataclass(frozen=True, slots=True)
class Tables:
    """One decode step, as lists of integers. Strides are in elements.

    Attributes:
        token_ids, positions: of each span's token.
        tokens: of each: address of its key's slot in layer 0 and head 0, strides of layers and heads, the same three of
            its value, the address of the slot's position, and the position.
        parts: of each tile of keys: address of the first one in layer 0 and head 0, strides of layers and heads, the
            same three of the values, how many slots, the first of its ``rows``, how many, the number of its first
            result; rows of a part have consecutive results.
        rows, turns: tokens that read, by part or several parts of one document; by how much each is turned back.
        bounds, order: token i's results are ``order[bounds[i]:bounds[i + 1]]``.
    """

    token_ids: list[int]
    positions: list[int]
    tokens: list[tuple[int, ...]]
    parts: list[tuple[int, ...]]
    rows: list[int]
    turns: list[int]
    bounds: list[int]
    order: list[int]


def make_tables(spans: Sequence[Span], tile: int) -> Tables:
    """The tables of a step in which every span has one token, and sees all of its context.

    Args:
        spans: as for ``FlatPass``.
        tile: keys of a part at most.
    """
    readers: dict[int, tuple[Segment, list[int], list[int]]] = {}
    for token, span in enumerate(spans):
        for reading in span.readings:
            if reading.start < span.positions[0]:
                entry = readers.setdefault(id(reading.segment), (reading.segment, [], []))
                entry[1].append(token)
                entry[2].append(reading.turn)
    parts: list[tuple[int, ...]] = []
    rows: list[int] = []
    turns: list[int] = []
    results: list[list[int]] = [[] for _ in spans]
    count = 0

    def add(place: tuple[int, ...], slots: int, first: int, tokens: Sequence[int], widths: tuple[int, int]) -> None:
        nonlocal count
        key, key_layer, key_head, value, value_layer, value_head = place
        for begin in range(0, slots, tile):
            size = min(tile, slots - begin)
            at = (key + begin * widths[0], key_layer, key_head, value + begin * widths[1], value_layer, value_head)
            parts.append((*at, size, first, len(tokens), count))
            for token in tokens:
                results[token].append(count)
                count += 1

    for segment, tokens, distances in readers.values():
        keys, values = segment.keys, segment.values
        place = (keys.data_ptr(), *keys.stride()[:2], values.data_ptr(), *values.stride()[:2])
        add(place, segment.slots, len(rows), tokens, _widths(keys, values))
        rows += tokens
        turns += distances
    written: list[tuple[int, ...]] = []
    for token, span in enumerate(spans):
        memory, slot = span.memory, span.slots[0]
        widths = _widths(memory.keys, memory.values)
        place = _lane(memory, span.lane)
        add(place, slot + 1, len(rows), (token,), widths)
        rows.append(token)
        turns.append(0)
        key, key_layer, key_head, value, value_layer, value_head = place
        at = memory.positions.data_ptr() + (span.lane * memory.positions.stride(0) + slot) * 8
        key, value = key + slot * widths[0], value + slot * widths[1]
        written.append((key, key_layer, key_head, value, value_layer, value_head, at, span.positions[0]))
    bounds = [0]
    for those in results:
        bounds.append(bounds[-1] + len(those))
    return Tables(
        [span.token_ids[0] for span in spans],
        [span.positions[0] for span in spans],
        written, parts, rows, turns, bounds,
        [result for those in results for result in those],
    )  # fmt: skip


def _widths(keys: torch.Tensor, values: torch.Tensor) -> tuple[int, int]:
    """Bytes of a slot's key and value."""
    return keys.shape[-1] * keys.element_size(), values.shape[-1] * values.element_size()


def _lane(memory: Slots, lane: int) -> tuple[int, ...]:
    keys, values = memory.keys, memory.values
    return (
        keys.data_ptr() + lane * keys.stride(1) * keys.element_size(), keys.stride(0), keys.stride(2),
        values.data_ptr() + lane * values.stride(1) * values.element_size(), values.stride(0), values.stride(2),
    )  # fmt: skip
