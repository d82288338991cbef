"""Exact match of a model on held-out generated worlds, per linker and kind of question, through the product's own path.

Every passage is a document, encoded alone once per world; every question then runs link, prefill and greedy decode
as a request would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.training.worlds import TEST_SEEDS, Question, World, make_world
from kvlink_core.types import Document, Message

#: Longer than any answer of the worlds.
MAX_ANSWER_TOKENS = 48


@dataclass(frozen=True, slots=True)
class Condition:
    """A column of the table: a linker, and for ``link-tokens`` how many of the model's link tokens are used."""

    linker: str
    k: int | None = None

    @property
    def name(self) -> str:
        """As shown."""
        return self.linker if self.k is None else f"{self.linker} k={self.k}"


@dataclass(frozen=True, slots=True)
class Graded:
    """One question, answered under one condition."""

    condition: str
    kind: str
    passages: int
    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        """Whether the whole answer equals the expected sentence."""
        return self.answer.strip() == self.expected


def held_out(questions: int, *, first_seed: int = TEST_SEEDS.start) -> Iterator[tuple[World, list[Question]]]:
    """Worlds of the test range, as many as hold ``questions`` questions (the last one cut short)."""
    left, seed = questions, first_seed
    while left > 0:
        world = make_world(seed)
        yield world, world.questions[:left]
        left -= len(world.questions)
        seed += 1


def evaluate(
    model: LoadedModel,
    conditions: Sequence[Condition],
    questions: int,
    *,
    progress: Callable[[int], None] = lambda done: None,
) -> list[Graded]:
    """Answer ``questions`` held-out questions under every condition, greedily.

    Args:
        model: usually the embedded one.
        conditions: what to compare; all see the same worlds.
        questions: how many.
        progress: called with the number of questions done under all conditions.
    """
    encoder = DocumentEncoder(model)
    results: list[Graded] = []
    done = 0
    for world, asked in held_out(questions):
        documents = [model.layout.document_tokens(Document(str(i), p), i) for i, p in enumerate(world.passages)]
        caches = encoder.encode(documents)
        for question in asked:
            for condition in conditions:
                linker = get_linker(condition.linker)
                links = linker.links(model.layout)
                if links is not None and condition.k is not None:
                    links = links.first(condition.k)
                prompt = model.layout.build([Message("user", question.question)], documents, links=links)
                linked = linker.link(model, prompt, caches if linker.uses_caches else [], reserve=MAX_ANSWER_TOKENS)
                generation = Generation(linked, SamplingParams(), max_tokens=MAX_ANSWER_TOKENS, stop_ids=model.stop_ids)
                answer = "".join(event.text for event in generation)
                results.append(
                    Graded(
                        condition.name,
                        question.kind,
                        len(documents),
                        question.question,
                        question.answer,
                        answer,
                    )
                )
            done += 1
            progress(done)
    return results


def accuracy(results: Sequence[Graded], **where: object) -> tuple[int, int]:
    """(right, asked) among the results whose attributes equal ``where``."""
    chosen = [r for r in results if all(getattr(r, name) == value for name, value in where.items())]
    return sum(r.right for r in chosen), len(chosen)
