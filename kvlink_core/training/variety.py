"""What training varies around a world so that the model is not thrown by an ordinary prompt.

Held-out worlds are asked plainly; training also sees system messages, earlier turns, titles, documents that hold
several passages, unrelated documents, questions without a question mark, and questions that nothing answers.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from kvlink_core.training.lexicon import ORDINARY_ENGLISH
from kvlink_core.training.worlds import Question, World

SYSTEM_TEXTS = (
    "Answer the question from the passages.",
    "You are a helpful assistant.",
    "Use only the documents to answer.",
    "Give a short and correct answer.",
    "Answer in one sentence.",
)


@dataclass(frozen=True)
class Asked:
    """A prompt to encode: earlier ``(role, text)`` turns, document strings, and questions that follow them."""

    turns: list[tuple[str, str]]
    documents: list[str]
    questions: list[Question]


def vary(world: World, rng: random.Random) -> Asked:
    """The world with random changes that keep every answer right."""
    turns: list[tuple[str, str]] = []
    questions = list(world.questions)
    if rng.random() < 0.06:
        turns.append(("system", rng.choice(SYSTEM_TEXTS)))
    if len(questions) > 3 and rng.random() < 0.05:
        before = questions.pop()
        turns += [("user", before.question), ("assistant", before.answer)]
    # About one question in twelve has no answer in the passages.
    for question in world.unknown:
        if rng.random() < 0.65:
            questions.insert(int(rng.random() * (len(questions) + 1)), question)
    if rng.random() < 0.15:
        questions = [Question(q.kind, _careless(q.question, rng), q.answer) for q in questions]
    return Asked(turns, _documents(world, rng), questions)


def _documents(world: World, rng: random.Random) -> list[str]:
    chance = rng.random()
    if chance < 0.08:
        texts = [f"{title}. {text}" for title, text in zip(world.titles, world.passages, strict=True)]
    elif chance < 0.22:
        # Neighbours become one document: longer ones, and ones that speak of several subjects.
        texts = [world.passages[0]]
        for text in world.passages[1:]:
            if rng.random() < 0.5:
                texts[-1] += " " + text
            else:
                texts.append(text)
    else:
        texts = list(world.passages)
    if rng.random() < 0.05:
        # Unrelated text stands before or after the world, never between a name and its pronoun.
        texts.insert(0 if rng.random() < 0.5 else len(texts), rng.choice(ORDINARY_ENGLISH))
    return [f"Passage: {text}\n" for text in texts]


def _careless(question: str, rng: random.Random) -> str:
    chance = rng.random()
    if chance < 0.4:
        return question.rstrip("?")
    return question[0].lower() + question[1:] if chance < 0.8 else question
