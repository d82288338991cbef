"""Rows for training: streamed through a curriculum for the base, from a shared pool of chunks for the fine-tunes.

A pool is a folder of chunks. Chunk *i* holds the rows of the same tales in every mode, so that all fine-tunes of one
seed see the same tales in the same order; the order differs between seeds by where in the pool they begin.
"""

from __future__ import annotations

import itertools
import multiprocessing as mp
import os
import queue
import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kvlink_core.training.family.rows import STAGES, Rows, TalePacker, training_stream
from kvlink_core.training.family.tales import KINDS, make_tale
from kvlink_core.training.worlds import TRAIN_SEEDS

CHUNK = 512  # rows
#: tales of one chunk: seeds of its own, far more than its rows hold
CHUNK_SEEDS = 1 << 14
#: what a pool holds: file name, modes packed together, and whether link tokens are the family's own rows
SETS: tuple[tuple[str, tuple[str, ...], bool], ...] = (
    ("full", ("full",), False),
    ("k0", ("k0",), False),
    ("k1", ("k1",), False),
    ("k5", ("k5",), False),
    ("link-only", ("k5",), True),
    ("wrap", ("full", "wrap"), False),
)


def to_device(rows: Rows, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """``tokens [5, B, S]``, ``answers [3, B, A]`` and ``tags [B, SLOTS]`` as int64 on ``device``."""
    tokens, answers, tags = (torch.from_numpy(a).to(device).long() for a in (rows.tokens, rows.answers, rows.tags))
    return tokens, answers, tags


def _stream(tokenizer_file: str, out: Any, stage: Any, worker: int, run: int, rows_each: int) -> None:
    torch.set_num_threads(1)
    rng = random.Random(f"family worker {worker} of run {run}")
    packer = TalePacker(Path(tokenizer_file))
    first = TRAIN_SEEDS.start + ((run * 4096 + worker) << 28)
    rows = packer.rows(training_stream(rng, first, stage), ["full"])
    while True:
        made = Rows.joined(list(itertools.islice(rows, rows_each)))
        out.put((made.tokens, made.answers, made.tags))


class CurriculumFeed:
    """Worker processes that make the base's rows, and a thread that brings ``chunks`` of them to ``device`` at a time.

    Use as a context manager.
    """

    def __init__(
        self, tokenizer_file: Path, workers: int, run: int, rows_each: int, chunks: int, device: torch.device
    ) -> None:
        self._chunks, self._device = chunks, device
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=4)
        context = mp.get_context("spawn")
        self._queue: Any = context.Queue(maxsize=6 * workers)
        self._stage: Any = context.Value("i", 0)
        arguments = (str(tokenizer_file), self._queue, self._stage)
        self._processes = [
            context.Process(target=_stream, args=(*arguments, w, run, rows_each), daemon=True) for w in range(workers)
        ]

    def __enter__(self) -> CurriculumFeed:
        for process in self._processes:
            process.start()
        threading.Thread(target=self._collect, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.terminate()
        self._queue.cancel_join_thread()

    def set_stage(self, stage: int) -> None:
        """Tales made from now on belong to this stage."""
        self._stage.value = stage

    def _collect(self) -> None:
        try:
            while True:
                parts = [Rows(*self._queue.get(timeout=90)) for _ in range(self._chunks)]
                self._ready.put(to_device(Rows.joined(parts), self._device))
        except Exception as error:  # handed to the training loop, which raises it
            self._ready.put(error)

    def take(self) -> tuple[Tensor, Tensor, Tensor]:
        """The next batch. Raises ``RuntimeError`` if the workers stopped."""
        batch = self._ready.get()
        if isinstance(batch, Exception):
            raise RuntimeError("the workers made no rows for 90 seconds; see their output above") from batch
        tokens, answers, tags = batch
        return tokens, answers, tags


def chunk_rows(packer: TalePacker, modes: tuple[str, ...], chunk: int, rows: int) -> Rows:
    """Rows of chunk ``chunk``: ``[len(modes) * rows]``, those of one mode after those of the other."""
    first = TRAIN_SEEDS.start + (1 << 48) + chunk * CHUNK_SEEDS
    tales = ((tale, [KINDS.index(q.kind) for q in tale.questions]) for tale in _tales(first))
    parts = list(itertools.islice(packer.rows(tales, list(modes)), rows))
    by_mode = [
        Rows(p.tokens[:, m : m + 1], p.answers[:, m : m + 1], p.tags[m : m + 1])
        for m in range(len(modes))
        for p in parts
    ]
    return Rows.joined(by_mode)


def _tales(first: int) -> Iterator[Any]:
    last = STAGES[-1]
    for seed in itertools.count(first):
        yield make_tale(seed, last.passages, last.level)


def make_pool(tokenizer_file: Path, folder: Path, chunks: int, workers: int, sets: tuple[str, ...]) -> None:
    """Write ``chunks`` chunks of the named sets; a third of the way apart ones first, so that three seeds can start."""
    folder.mkdir(parents=True, exist_ok=True)
    third = -(-chunks // 3)
    order = [c for i in range(third) for c in (i, i + third, i + 2 * third) if c < chunks]
    context = mp.get_context("spawn")
    jobs = [(chunk, name) for chunk in order for name in sets]
    with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        pool.starmap(_write_chunk, [(str(tokenizer_file), str(folder), *job) for job in jobs], chunksize=1)


def _write_chunk(tokenizer_file: str, folder: str, chunk: int, name: str) -> None:
    modes, own = next((modes, own) for n, modes, own in SETS if n == name)
    path = Path(folder) / f"{name}-{chunk}.npz"
    if path.exists():  # chunks depend on nothing but their number
        return
    rows = chunk_rows(TalePacker(Path(tokenizer_file), own_links=own), modes, chunk, CHUNK)
    part = f"{path}.{os.getpid()}.part"
    with open(part, "wb") as file:
        np.savez(file, tokens=rows.tokens, answers=rows.answers, tags=rows.tags)
    os.replace(part, path)


class PoolFeed:
    """Batches from a pool, for one seed: waits for chunks that are not written yet, starts over after the last."""

    def __init__(self, folder: Path, name: str, chunks: int, seed: int, device: torch.device) -> None:
        self._folder, self._name, self._chunks, self._device = folder, name, chunks, device
        self._next = (seed % 3) * -(-chunks // 3)
        self._random = torch.Generator().manual_seed(seed)
        self._rows: tuple[Tensor, Tensor, Tensor] | None = None
        self._order = torch.empty(0, dtype=torch.int64)
        self._modes = len(next(modes for n, modes, _ in SETS if n == name))

    def _load(self) -> None:
        path = self._folder / f"{self._name}-{self._next % self._chunks}.npz"
        self._next += 1
        patience = time.monotonic() + 120
        while not path.exists():
            if time.monotonic() > patience:
                raise RuntimeError(f"{path} was not written within two minutes")
            time.sleep(0.1)
        with np.load(path) as file:
            self._rows = to_device(Rows(file["tokens"], file["answers"], file["tags"]), self._device)
        self._order = torch.randperm(self._rows[2].shape[0] // self._modes, generator=self._random)

    def take(self, rows: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """``rows`` rows in each mode of the set: the same questions in the same slots."""
        if self._order.shape[0] < rows:
            self._load()
        assert self._rows is not None
        chosen, self._order = self._order[:rows].to(self._device), self._order[rows:]
        tokens, answers, tags = self._rows
        half = tags.shape[0] // self._modes
        return [
            (tokens[:, chosen + m * half], answers[:, chosen + m * half], tags[chosen + m * half])
            for m in range(self._modes)
        ]
