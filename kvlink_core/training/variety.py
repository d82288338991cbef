"""What training varies around a world so that the model is not thrown by an ordinary prompt.

Held-out worlds are asked plainly; training also sees system messages, earlier turns, titles, documents that hold
several passages, unrelated documents, questions without a question mark, questions that nothing answers, and names and
values that no list holds, so that it copies words instead of knowing them.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from kvlink_core.training import lexicon as lx
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
    if rng.random() < 0.4:
        world = rename(world, rng)
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


_NAMES = re.compile(r"\b[A-Z][a-z]+\b")
_NO_NAMES = {"She", "He", "It", "In", "The", "Where", "When", "Which", "What", "Who", "Since", "On", "Passage"}
_LETTERS = "aaabcdeeefghiijklmnooprsttuvwyzaeionrst"
_ACCENTED = "áäåçéèíñóöøúüšž"
_SPLICED = [*lx.WOMEN, *lx.MEN, *lx.FAMILIES, *lx.CITIES, *lx.COMPANIES, *lx.JOBS, *lx.INSTRUMENTS, *lx.PRODUCTS]


def _new_word(rng: random.Random) -> str:
    """A lower-case word: halves of two known ones, or random letters, a few of them accented."""
    if rng.random() < 0.5:
        first, second = rng.choice(_SPLICED).split()[-1], rng.choice(_SPLICED).split()[-1]
        word = (first[: rng.randint(1, 5)] + second[-rng.randint(2, 5) :]).lower()
    else:
        word = "".join(rng.choice(_LETTERS) for _ in range(rng.randint(2, 9)))
    if rng.random() < 0.08:
        place = rng.randrange(len(word))
        word = word[:place] + rng.choice(_ACCENTED) + word[place + 1 :]
    return word


def rename(world: World, rng: random.Random) -> World:
    """Replace one to five words of the world, names or values, by new ones, everywhere they stand."""
    names = sorted({name for text in world.passages for name in _NAMES.findall(text)} - _NO_NAMES)
    values = sorted({q.answer[:-1].split(" ")[-1] for q in world.questions})
    found = names + [value for value in values if value.isalpha() and value not in names]
    new: dict[str, str] = {}
    for old in rng.sample(found, min(len(found), rng.randint(1, 5))):
        words = [_new_word(rng) for _ in range(2 if rng.random() < 0.12 else 1)]
        new[old] = " ".join(word.capitalize() if old[0].isupper() else word for word in words)
    if not new or len({*new.values(), *names}) < len(new) + len(names):
        return world
    pattern = re.compile(r"\b(?:" + "|".join(new) + r")\b")

    def swap(text: str) -> str:
        return pattern.sub(lambda match: new[match[0]], text)

    def swap_question(q: Question) -> Question:
        return Question(q.kind, swap(q.question), swap(q.answer))

    return World(
        [swap(text) for text in world.passages],
        [swap_question(q) for q in world.questions],
        [swap(title) for title in world.titles],
        [swap_question(q) for q in world.unknown],
    )


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
