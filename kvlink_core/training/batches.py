"""Worlds as token batches: several prompts to a row, each with many questions that do not see each other.

A row holds prompts one after the other; a prompt is its context (documents, link tokens) followed by questions with
their answers. Every question continues the context's positions, as if it were the only one. ``document`` and
``question`` numbers say what may attend to what (see ``llama.dense_mask``).
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import queue
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kvlink_core.training import tokenizer as tk
from kvlink_core.training.curriculum import STAGES, draw_passages, draw_stage
from kvlink_core.training.variety import Asked, rename, vary
from kvlink_core.training.worlds import TRAIN_SEEDS, World, make_world

#: modes of the model: name and number of link tokens; -1 is ordinary causal attention without links
MODES: tuple[tuple[str, int], ...] = (("full", -1), ("link5", 5), ("link1", 1), ("link0", 0))
MODE_SHARES = (0.35, 0.40, 0.125, 0.125)
KINDS = ("fact", "pronoun", "two-hop", "unknown")

ROW = 1024  # tokens a row
ANSWERS = 400  # most answer tokens a row
SLOTS = 64  # most questions a row
IGNORED = -100


@dataclass
class Rows:
    """``tokens``: int16 ``[5, rows, ROW]`` = ids, positions, context, document, question numbers.

    ``answers``: int16 ``[3, rows, ANSWERS]`` = place of the predicting token, label, slot of the question in its row.
    ``tags``: int16 ``[rows, SLOTS]``, what a question is (``make_tag``), -1 for an unused slot.
    """

    tokens: NDArray[np.int16]
    answers: NDArray[np.int16]
    tags: NDArray[np.int16]


def make_tag(mode: int, kind: int, group: int) -> int:
    """One small number for a question's mode, kind and a group of the caller's choice (0 to 15)."""
    return (group * len(MODES) + mode) * len(KINDS) + kind


class _Row:
    def __init__(self) -> None:
        self.lists: tuple[list[int], ...] = ([], [], [], [], [])
        self.answers: tuple[list[int], ...] = ([], [], [])
        self.tags: list[int] = []
        self.contexts = 0

    def room(self) -> int:
        return ROW - len(self.lists[0])

    def add(self, ids: list[int], first_position: int, document: int, question: int) -> None:
        n = len(ids)
        lists = self.lists
        lists[0].extend(ids)
        lists[1].extend(range(first_position, first_position + n))
        lists[2].extend([self.contexts] * n)
        lists[3].extend([document] * n)
        lists[4].extend([question] * n)


class Packer:
    """Turns worlds into rows. ``encoder`` gives token ids; the layout is the one in ``embedded/kvlink.json``."""

    def __init__(self, encoder: tk.FastEncoder, whole: bool = False) -> None:
        self.encoder, self.whole = encoder, whole
        self.bos, self.end = encoder.id(tk.BOS), encoder.id(tk.END)
        self.user, self.assistant, self.system = encoder.id(tk.USER), encoder.id(tk.ASSISTANT), encoder.id(tk.SYSTEM)
        self.mem_start, self.mem_end = encoder.id(tk.MEM_START), encoder.id(tk.MEM_END)
        self.links = [encoder.id(link) for link in tk.LINKS]

    def context(self, asked: Asked, mode: int) -> list[tuple[list[int], int]]:
        """Segments ``(ids, document number)`` from the start of the prompt to mem_end."""
        k = MODES[mode][1]
        prefix = [self.bos]
        roles = {"system": self.system, "user": self.user, "assistant": self.assistant}
        for role, text in asked.turns:
            prefix += [roles[role], *self.encoder.encode(text), self.end]
        segments = [([*prefix, self.user, self.mem_start], 0)]
        for number, document in enumerate(asked.documents, start=1):
            segments.append((self.encoder.encode(document), 0 if k < 0 else number))
            if k > 0:
                segments.append((self.links[:k], 0))
        segments.append(([self.mem_end], 0))
        return segments

    def fill(self, row: _Row, asked: Asked, mode: int, group: int) -> bool:
        """Add a prompt with as many questions as fit; false, row unchanged, if not even one does.

        With ``whole``, all of its questions must fit.
        """
        segments = self.context(asked, mode)
        turns = [
            ([*self.encoder.encode(q.question), self.end, self.assistant], self.encoder.encode(q.answer), q.kind)
            for q in asked.questions
        ]
        length = sum(len(ids) for ids, _ in segments)
        wanted = turns if self.whole else turns[:1]
        if (
            length + sum(len(question) + len(answer) for question, answer, _ in wanted) > row.room()
            or len(row.tags) + len(wanted) > SLOTS
            or len(row.answers[0]) + sum(len(answer) + 1 for _, answer, _ in wanted) > ANSWERS
        ):
            return False
        row.contexts += 1
        position = 0
        for ids, document in segments:
            row.add(ids, position, document, 0)
            position += len(ids)
        for number, (question, answer, kind) in enumerate(turns, start=1):
            full = len(answer) + 1 + len(row.answers[0]) > ANSWERS or len(row.tags) >= SLOTS
            if full or len(question) + len(answer) > row.room():
                break
            start = len(row.lists[0]) + len(question) - 1
            row.add(question + answer, position, 0, number)
            row.answers[0].extend(range(start, start + len(answer) + 1))
            row.answers[1].extend(answer)
            row.answers[1].append(self.end)
            row.answers[2].extend([len(row.tags)] * (len(answer) + 1))
            row.tags.append(make_tag(mode, KINDS.index(kind), group))
        return True

    def rows(self, stream: Iterable[tuple[Asked, int, int]]) -> Iterator[_Row]:
        """Pack ``(prompt, mode, group)`` in order; one that does not fit starts the next row.

        A prompt too long for an empty row is left out, or with ``whole`` refused with ``ValueError``.
        """
        row = _Row()
        for asked, mode, group in stream:
            if self.fill(row, asked, mode, group):
                continue
            if row.contexts:
                yield row
            row = _Row()
            if not self.fill(row, asked, mode, group) and self.whole:
                raise ValueError(f"a prompt of {len(asked.documents)} documents does not fit a row of {ROW} tokens")
        if row.contexts:
            yield row


def stack(rows: list[_Row]) -> Rows:
    """Pad rows to the fixed shapes. Padding is context 0, which only sees itself."""
    tokens = np.zeros((5, len(rows), ROW), dtype=np.int16)
    answers = np.zeros((3, len(rows), ANSWERS), dtype=np.int16)
    answers[1] = IGNORED
    tags = np.full((len(rows), SLOTS), -1, dtype=np.int16)
    for index, row in enumerate(rows):
        tokens[:, index, : len(row.lists[0])] = row.lists
        answers[:, index, : len(row.answers[0])] = row.answers
        tags[index, : len(row.tags)] = row.tags
    return Rows(tokens, answers, tags)


def training_stream(rng: random.Random, first_seed: int, stage: Any) -> Iterator[tuple[Asked, int, int]]:
    """Endless prompts from ``first_seed`` on; ``stage.value`` is read for each. Group 1 marks the current stage."""
    for seed in itertools.count(first_seed):
        current = int(stage.value)
        drawn = draw_stage(rng, current)
        mode = rng.choices(range(len(MODES)), MODE_SHARES)[0]
        world = make_world(seed, draw_passages(rng, drawn), STAGES[drawn].level)
        yield vary(world, rng), mode, int(drawn == current)


def _work(tokenizer_file: str, out: Any, stage: Any, worker: int, run: int, rows_each: int) -> None:
    rng = random.Random(f"worker {worker} of run {run}")
    packer = Packer(tk.FastEncoder(Path(tokenizer_file)))
    # 2^28 worlds for each worker of each run, all inside the training range.
    first = TRAIN_SEEDS.start + ((run * 4096 + worker) << 28)
    rows = packer.rows(training_stream(rng, first, stage))
    while True:
        made = stack(list(itertools.islice(rows, rows_each)))
        out.put((made.tokens, made.answers, made.tags))


class Generator:
    """Worker processes that make training rows. Use as a context manager; ``set_stage`` reaches all workers."""

    def __init__(self, tokenizer_file: Path, workers: int, run: int, rows_each: int = 16) -> None:
        context = mp.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=8 * workers)
        self._stage: Any = context.Value("i", 0)
        arguments = (str(tokenizer_file), self._queue, self._stage)
        self._processes = [
            context.Process(target=_work, args=(*arguments, worker, run, rows_each), daemon=True)
            for worker in range(workers)
        ]

    def __enter__(self) -> Generator:
        for process in self._processes:
            process.start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._queue.cancel_join_thread()

    def set_stage(self, stage: int) -> None:
        """Worlds made from now on belong to this stage; chunks already waiting stay as they are."""
        self._stage.value = stage

    def take(self, timeout: float = 60.0) -> Rows:
        """The next chunk of rows; raises ``RuntimeError`` if the workers stopped."""
        try:
            return Rows(*self._queue.get(timeout=timeout))
        except queue.Empty:
            raise RuntimeError("the world generators made nothing for a minute; see their output above") from None


def plain(world: World, most: int, unknown: int = 0) -> Asked:
    """The world as it is, with its first ``most`` questions and ``unknown`` of those that it does not answer."""
    documents = [f"Passage: {text}\n" for text in world.passages]
    return Asked([], documents, world.questions[:most] + world.unknown[:unknown])


def evaluation_rows(
    encoder: tk.FastEncoder, seeds: Iterable[int], mode: int, most: int = 12, new_words: bool = False
) -> Rows:
    """Rows of held-out worlds of 2 to 12 passages for one mode: the same questions in every mode.

    The group is the number of passages. ``new_words`` replaces one to five names or values of each world by words that
    no list holds.
    """
    rng = random.Random(0)
    worlds = (rename(world, rng) if new_words else world for world in map(make_world, seeds))
    stream = ((plain(world, most, unknown=1), mode, len(world.passages)) for world in worlds)
    return stack(list(Packer(encoder, whole=True).rows(stream)))
