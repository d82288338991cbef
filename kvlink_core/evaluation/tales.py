"""Exact match on held-out tales, per linker, through the product's own path: encode alone, link, prefill, decode.

Every passage is a document, encoded alone once per tale; every question then runs as a request would, greedily.
"""

from __future__ import annotations

import multiprocessing as mp
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.training.family.tales import Tale, TaleQuestion, make_tale
from kvlink_core.training.worlds import TEST_SEEDS
from kvlink_core.types import Document, Message

#: Longer than any answer of the tales.
MAX_ANSWER_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Asked:
    """One held-out question: its number among all of all tales, its tale, and itself."""

    number: int
    tale: int
    question: TaleQuestion


def held_out(tales: int, each: int, passages: tuple[int, int] = (4, 20)) -> tuple[list[Tale], list[Asked]]:
    """The first ``tales`` held-out tales, and the first ``each`` questions of each."""
    made = [make_tale(seed, passages) for seed in range(TEST_SEEDS.start, TEST_SEEDS.start + tales)]
    asked, first = [], 0
    for index, tale in enumerate(made):
        asked += [Asked(first + i, index, q) for i, q in enumerate(tale.questions[:each])]
        first += len(tale.questions)
    return made, asked


def answers(
    model: LoadedModel, linkers: Sequence[str], tale: Tale, questions: Sequence[TaleQuestion]
) -> list[list[str]]:
    """Greedy answers, ``[linkers][questions]``; the tale's passages are encoded once."""
    documents = [model.layout.document_tokens(Document(str(i), p), i) for i, p in enumerate(tale.passages)]
    caches = DocumentEncoder(model).encode(documents)
    out = []
    for name in linkers:
        linker = get_linker(name)
        plain = documents
        if model.layout.wrap is not None and not linker.uses_caches:
            plain = [list(model.layout.wrap.inside(d)) for d in documents]
        of_linker = []
        for question in questions:
            prompt = model.layout.build([Message("user", question.question)], plain, links=linker.links(model.layout))
            linked = linker.link(model, prompt, caches if linker.uses_caches else [], reserve=MAX_ANSWER_TOKENS)
            generation = Generation(linked, SamplingParams(), max_tokens=MAX_ANSWER_TOKENS, stop_ids=model.stop_ids)
            of_linker.append("".join(event.text for event in generation).strip())
        out.append(of_linker)
    return out


@dataclass(frozen=True, slots=True)
class Task:
    """A model under some linkers."""

    model: Path
    linkers: tuple[str, ...]


def grade(
    tasks: Sequence[Task], *, tales: int, each: int, workers: int, seconds: float, block: int = 10
) -> dict[tuple[str, str], dict[int, str]]:
    """Answers by (model directory's parent name, linker) and question number, in parallel processes.

    ``block`` tales at a time, all tasks in turn; what is not begun after ``seconds`` is left out.
    """
    context = mp.get_context("spawn")
    jobs = [(task, first, min(first + block, tales), tales, each) for first in range(0, tales, block) for task in tasks]
    until = time.time() + seconds
    found: dict[tuple[str, str], dict[int, str]] = {}
    with context.Pool(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for name, by_linker in pool.imap_unordered(_work, [(*job, until) for job in jobs]):
            for linker, of_linker in by_linker.items():
                found.setdefault((name, linker), {}).update(of_linker)
    return found


@lru_cache(maxsize=2)
def _model(directory: Path) -> LoadedModel:
    return load_model(str(directory), dtype="float32")


@lru_cache(maxsize=1)
def _questions(tales: int, each: int) -> tuple[list[Tale], list[Asked]]:
    return held_out(tales, each)


def _work(job: tuple[Task, int, int, int, int, float]) -> tuple[str, dict[str, dict[int, str]]]:
    task, first, last, tales, each, until = job
    name = task.model.parent.name
    out: dict[str, dict[int, str]] = {}
    if time.time() > until:
        return name, out
    model = _model(task.model)
    made, asked = _questions(tales, each)
    for index in range(first, last):
        chosen = [a for a in asked if a.tale == index]
        texts = answers(model, task.linkers, made[index], [a.question for a in chosen])
        for linker, of_linker in zip(task.linkers, texts, strict=True):
            out.setdefault(linker, {}).update({a.number: t for a, t in zip(chosen, of_linker, strict=True)})
    return name, out
