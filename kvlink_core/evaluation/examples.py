"""What is asked: one question over some documents, whichever file it came from; and how examples are cut to shape."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from kvlink_core.errors import ConfigError
from kvlink_core.types import Document

#: ``qa`` has short answers, ``summary`` reference summaries, ``text`` a continuation to be followed and no answer.
Task = Literal["qa", "summary", "text"]

_WORD = re.compile(r"\S+\s*")


@dataclass(frozen=True, slots=True)
class Example:
    """One question.

    Attributes:
        id: unique in its dataset.
        question: as it stands in the data; the prompt's template is put around it later.
        documents: in the order of the prompt; none has a blank text.
        answers: any of which is right, or reference summaries; may be none.
        gold: places of the documents that the answer is in, ascending, where the data says so.
        kind: what rows can be grouped by: the data's own type of question, hops, or the place of the gold document.
        task: decides which metrics are computed.
        continuation: text to be followed, teacher-forced, instead of the model's own answer.
    """

    id: str
    question: str
    documents: tuple[Document, ...]
    answers: tuple[str, ...] = ()
    gold: tuple[int, ...] = ()
    kind: str = ""
    task: Task = "qa"
    continuation: str | None = None


@dataclass(frozen=True, slots=True)
class Dataset:
    """Examples of one source.

    Attributes:
        name: by which results are told apart.
        examples: in the order of the file.
        left_out: how many were not taken, by reason.
        generated: whether they come from no file.
    """

    name: str
    examples: tuple[Example, ...] = field(repr=False)
    left_out: Counter[str] = field(default_factory=Counter)
    generated: bool = False


@dataclass(frozen=True, slots=True)
class Shape:
    """What is made of examples before they are asked.

    Attributes:
        gold_at: move the gold document there, the others keeping their order; examples without exactly one gold
            document, or without that place, are left out.
        documents: at most so many; of those beyond, the last that are not gold go first.
        document_words: cut longer documents into several of at most so many words.
        text_words: words of each document, and of the continuation, that plain text is cut into.

    Raises:
        ConfigError: a number that cannot be.
    """

    gold_at: int | None = None
    documents: int | None = None
    document_words: int | None = None
    text_words: int = 100

    def __post_init__(self) -> None:
        for name, least in (("gold_at", 0), ("documents", 1), ("document_words", 1), ("text_words", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"{name.replace('_', '-')} is {least} or more, not {value}.", param=name)

    def apply(self, example: Example) -> Example | str:
        """The example in this shape, or why it is left out."""
        if self.document_words is not None:
            example = _cut(example, self.document_words)
        if self.documents is not None:
            example = _kept(example, _most_wanted(example, self.documents))
        if not example.documents:
            return "without documents"
        if self.gold_at is not None:
            return _moved(example, self.gold_at)
        return example


def words(text: str, most: int) -> list[str]:
    """The text in pieces of at most ``most`` words; joined, they are the text (white space at its start goes)."""
    found = _WORD.findall(text)
    return ["".join(found[at : at + most]) for at in range(0, len(found), most)]


def _cut(example: Example, most: int) -> Example:
    """Longer documents in pieces; a piece of a gold document is gold."""
    documents: list[Document] = []
    gold: list[int] = []
    for place, document in enumerate(example.documents):
        pieces = words(document.text, most)
        if place in example.gold:
            gold += range(len(documents), len(documents) + len(pieces))
        if len(pieces) == 1:
            documents.append(document)
        else:
            documents += [
                replace(document, id=f"{document.id}#{i}", text=piece.strip()) for i, piece in enumerate(pieces)
            ]
    return replace(example, documents=tuple(documents), gold=tuple(gold))


def _most_wanted(example: Example, most: int) -> list[int]:
    """The places to keep, ascending."""
    order = sorted(range(len(example.documents)), key=lambda place: (place not in example.gold, place))
    return sorted(order[:most])


def _kept(example: Example, places: Iterable[int]) -> Example:
    places = list(places)
    gold = tuple(new for new, old in enumerate(places) if old in example.gold)
    return replace(example, documents=tuple(example.documents[p] for p in places), gold=gold)


def _moved(example: Example, to: int) -> Example | str:
    if len(example.gold) != 1:
        return "without exactly one gold document to move"
    if to >= len(example.documents):
        return f"with fewer than {to + 1} documents"
    places = [p for p in range(len(example.documents)) if p != example.gold[0]]
    places.insert(to, example.gold[0])
    return replace(_kept(example, places), kind=gold_kind((to,)))


def gold_kind(gold: tuple[int, ...]) -> str:
    """The kind of a question that is told apart by nothing but where its one gold document stands."""
    return f"gold at {gold[0]}" if len(gold) == 1 else ""
