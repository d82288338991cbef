"""Examples in another shape: gold moved, documents cut and left out."""

from __future__ import annotations

import pytest

from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.examples import Example, Shape, words
from kvlink_core.types import Document


def example(*texts: str, gold: tuple[int, ...] = ()) -> Example:
    return Example("x", "q", tuple(Document(str(i), text) for i, text in enumerate(texts)), ("a",), gold)


def shaped(shape: Shape, given: Example) -> tuple[list[str], tuple[int, ...]]:
    found = shape.apply(given)
    assert isinstance(found, Example)
    return [document.text for document in found.documents], found.gold


@pytest.mark.parametrize("place", range(4))
def test_the_gold_document_moves_and_the_others_keep_their_order(place: int) -> None:
    documents, gold = shaped(Shape(gold_at=place), example("a", "b", "GOLD", "c", gold=(2,)))
    assert documents.index("GOLD") == place
    assert [d for d in documents if d != "GOLD"] == ["a", "b", "c"]
    assert gold == (place,)


def test_what_cannot_move_is_left_out_with_a_reason() -> None:
    assert Shape(gold_at=0).apply(example("a", "b", gold=(0, 1))) == "without exactly one gold document to move"
    assert Shape(gold_at=2).apply(example("a", "b", gold=(0,))) == "with fewer than 3 documents"
    assert Shape().apply(example()) == "without documents"


def test_gold_documents_are_the_last_to_go() -> None:
    given = example("a", "b", "c", "d", gold=(1, 3))
    assert shaped(Shape(documents=3), given) == (["a", "b", "d"], (1, 2))
    assert shaped(Shape(documents=2), given) == (["b", "d"], (0, 1))
    assert shaped(Shape(documents=1), given) == (["b"], (0,))
    assert shaped(Shape(documents=9), given) == (["a", "b", "c", "d"], (1, 3))


def test_long_documents_are_cut_and_pieces_of_gold_are_gold() -> None:
    assert shaped(Shape(document_words=2), example("a b c", "d", "e  f\ng", gold=(2,))) == (
        ["a b", "c", "d", "e  f", "g"],
        (3, 4),
    )


def test_pieces_joined_are_the_text() -> None:
    text = "one  two\nthree four\tfive "
    assert "".join(words(text, 2)) == text
    assert [len(piece.split()) for piece in words(text, 2)] == [2, 2, 1]


@pytest.mark.parametrize("field", ["documents", "document_words", "text_words"])
def test_impossible_numbers_are_refused(field: str) -> None:
    with pytest.raises(ConfigError, match="1 or more, not 0"):
        Shape(**{field: 0})
