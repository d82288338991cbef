"""Tales as token rows, in the layout of ``embedded/kvlink.json``, for each mode of the family.

As in ``training/batches.py`` a row holds prompts one after the other, each with many questions that do not see each
other, and three integers a token say what it may attend to (``llama.dense_mask``). Here documents may stand between
rows of a soft wrap.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlink_core.training import tokenizer as tk
from kvlink_core.training.family.tales import KINDS, WHOLE, Tale, TaleLevel, TaleQuestion, make_tale

#: name -> link tokens after each document; -1: ordinary causal attention; "wrap": header and trailer around documents
MODES: dict[str, int] = {"full": -1, "k0": 0, "k1": 1, "k5": 5, "wrap": 0}
HEADER, TRAILER = 8, 8
VOCABULARY = tk.VOCABULARY
#: ids of the trained rows that no vocabulary has: link tokens of their own, then header and trailer
LINK_ROWS, WRAP_ROWS = VOCABULARY, VOCABULARY + 5
EXTRA = 5 + HEADER + TRAILER

ROW, ANSWERS, SLOTS = 1024, 448, 64
IGNORED = -100


@dataclass
class Rows:
    """``tokens``: int16 ``[5, rows, ROW]`` = ids, positions, context, document, question numbers; ``answers``: int16
    ``[3, rows, ANSWERS]`` = place of the predicting token, label, slot of the question in its row; ``tags``: int32
    ``[rows, SLOTS]``, the caller's number of each question, -1 for an unused slot.
    """

    tokens: NDArray[np.int16]
    answers: NDArray[np.int16]
    tags: NDArray[np.int32]

    @staticmethod
    def joined(parts: list[Rows]) -> Rows:
        """All rows of ``parts``, in order."""
        return Rows(
            np.concatenate([p.tokens for p in parts], axis=1),
            np.concatenate([p.answers for p in parts], axis=1),
            np.concatenate([p.tags for p in parts], axis=0),
        )


class _Row:
    def __init__(self) -> None:
        self.columns: tuple[list[int], ...] = ([], [], [], [], [])
        self.answers: tuple[list[int], ...] = ([], [], [])
        self.tags: list[int] = []
        self.contexts = 0

    def add(self, ids: list[int], first: int, document: int, question: int) -> None:
        n = len(ids)
        self.columns[0].extend(ids)
        self.columns[1].extend(range(first, first + n))
        self.columns[2].extend([self.contexts] * n)
        self.columns[3].extend([document] * n)
        self.columns[4].extend([question] * n)


class TalePacker:
    """Turns tales into rows. With ``own_links`` link tokens are the family's extra rows, not the vocabulary's."""

    def __init__(self, tokenizer_file: Path, *, own_links: bool = False) -> None:
        self._encoder = encoder = tk.FastEncoder(tokenizer_file)
        self._bos, self._end, self._user = encoder.id(tk.BOS), encoder.id(tk.END), encoder.id(tk.USER)
        self._assistant = encoder.id(tk.ASSISTANT)
        self._mem_start, self._mem_end = encoder.id(tk.MEM_START), encoder.id(tk.MEM_END)
        self._links = [LINK_ROWS + i for i in range(5)] if own_links else [encoder.id(link) for link in tk.LINKS]
        self._header = [WRAP_ROWS + i for i in range(HEADER)]
        self._trailer = [WRAP_ROWS + HEADER + i for i in range(TRAILER)]

    def _segments(self, tale: Tale, mode: str) -> list[tuple[list[int], int]]:
        k = MODES[mode]
        segments = [([self._bos, self._user, self._mem_start], 0)]
        for number, text in enumerate(tale.passages, start=1):
            ids = self._encoder.encode(f"Passage: {text}\n")
            if mode == "wrap":
                ids = [*self._header, *ids, *self._trailer]
            segments.append((ids, 0 if k < 0 else number))
            if k > 0:
                segments.append((self._links[:k], 0))
        segments.append(([self._mem_end], 0))
        return segments

    def turn(self, question: TaleQuestion) -> tuple[list[int], list[int]]:
        """Token ids of what follows the documents up to the answer, and of the answer with its end."""
        asked = [*self._encoder.encode(question.question), self._end, self._assistant]
        return asked, [*self._encoder.encode(question.answer), self._end]

    def fill(self, rows: list[_Row], modes: list[str], tale: Tale, tags: list[int], *, whole: bool = False) -> bool:
        """Add the tale to each of ``rows`` in its mode, with as many questions as fit all of them.

        Returns whether it fitted, with at least one question (all, with ``whole``); else no row is changed.
        """
        laid = [self._segments(tale, mode) for mode in modes]
        turns = [self.turn(q) for q in tale.questions]
        longest = max(sum(len(ids) for ids, _ in segments) for segments in laid)
        room = min(ROW - len(row.columns[0]) for row in rows) - longest
        slots = SLOTS - len(rows[0].tags)
        places = ANSWERS - len(rows[0].answers[0])
        count = 0
        for asked, answer in turns:
            room -= len(asked) + len(answer) - 1
            places -= len(answer)
            if room < 0 or places < 0 or count == slots:
                break
            count += 1
        if count < (len(turns) if whole else 1):
            return False
        for row, segments in zip(rows, laid, strict=True):
            row.contexts += 1
            position = 0
            for ids, document in segments:
                row.add(ids, position, document, 0)
                position += len(ids)
            for number, (asked, answer) in enumerate(turns[:count], start=1):
                start = len(row.columns[0]) + len(asked) - 1
                row.add([*asked, *answer[:-1]], position, 0, number)
                row.answers[0].extend(range(start, start + len(answer)))
                row.answers[1].extend(answer)
                row.answers[2].extend([len(row.tags)] * len(answer))
                row.tags.append(tags[number - 1])
        return True

    def rows(
        self, stream: Iterable[tuple[Tale, list[int]]], modes: list[str], *, whole: bool = False
    ) -> Iterator[Rows]:
        """Pack tales in order into rows of one or more modes at once: ``[len(modes)]`` rows, the same questions."""
        current = [_Row() for _ in modes]
        for tale, tags in stream:
            if not tale.questions or self.fill(current, modes, tale, tags, whole=whole):
                continue
            if current[0].contexts:
                yield _stack(current)
            current = [_Row() for _ in modes]
            if not self.fill(current, modes, tale, tags, whole=whole) and whole:
                raise ValueError("a tale does not fit a row with all of its questions")
        if current[0].contexts:
            yield _stack(current)


def _stack(rows: list[_Row]) -> Rows:
    tokens = np.zeros((5, len(rows), ROW), dtype=np.int16)
    answers = np.zeros((3, len(rows), ANSWERS), dtype=np.int16)
    answers[1] = IGNORED
    tags = np.full((len(rows), SLOTS), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        tokens[:, index, : len(row.columns[0])] = row.columns
        answers[:, index, : len(row.answers[0])] = row.answers
        tags[index, : len(row.tags)] = row.tags
    return Rows(tokens, answers, tags)


@dataclass(frozen=True)
class Stage:
    """One step of the base's curriculum."""

    level: TaleLevel
    passages: tuple[int, int]


STAGES: tuple[Stage, ...] = (
    Stage(TaleLevel(bare=True, pool=40, kinds="w", pronouns=0.0, facts=1), (2, 4)),
    Stage(TaleLevel(bare=True, pronouns=0.0, facts=1), (2, 8)),
    Stage(TaleLevel(pronouns=0.0, facts=1, hops=False), (2, 8)),
    Stage(TaleLevel(pronouns=0.4, facts=2, hops=False), (3, 10)),
    Stage(WHOLE, (4, 20)),
)
LAST = len(STAGES) - 1


def training_stream(rng: random.Random, first_seed: int, stage: Any) -> Iterator[tuple[Tale, list[int]]]:
    """Endless tales; ``stage.value`` is read for each. Tags are kinds, plus ``len(KINDS)`` in the current stage."""
    for seed in itertools.count(first_seed):
        current = int(stage.value)
        chance = rng.random()
        drawn = current if chance < 0.7 or current == LAST else LAST if chance < 0.8 else rng.randint(0, current)
        tale = make_tale(seed, STAGES[drawn].passages, STAGES[drawn].level)
        offset = len(KINDS) if drawn == current else 0
        yield tale, [KINDS.index(q.kind) + offset for q in tale.questions]
