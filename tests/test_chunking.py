"""Chunking: every character once, nothing over the limit, the same chunks each time."""

# ruff: noqa: RUF001  (the punctuation of other scripts is meant)

from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvlink_core.chunking import chunk_document, sentence_spans
from kvlink_core.errors import CorpusError, EmptyDocumentError


def byte_tokens(text: str) -> int:
    """A byte tokenizer with a template that costs three tokens."""
    return len(text.encode()) + 3


def word_tokens(text: str) -> int:
    return len(text.split())


def sentences(text: str) -> list[str]:
    return [text[a:b].strip() for a, b in sentence_spans(text)]


def test_a_document_within_the_limit_keeps_its_id_and_text() -> None:
    (chunk,) = chunk_document("a", "  Two words.\n", limit=2, count_tokens=word_tokens)
    assert (chunk.id, chunk.text, chunk.index) == ("a", "  Two words.\n", 0)


def test_cuts_between_sentences_and_numbers_the_chunks() -> None:
    text = "One two three. Four five. Six seven eight nine. Ten."
    chunks = chunk_document("doc", text, limit=5, count_tokens=word_tokens)
    assert [(c.id, c.text) for c in chunks] == [
        ("doc#0", "One two three. Four five."),
        ("doc#1", "Six seven eight nine. Ten."),
    ]
    assert all(text[c.start : c.end] == c.text for c in chunks)


def test_a_long_sentence_is_cut_between_words_and_its_end_is_joined_by_what_follows() -> None:
    text = "a b c d e f g. H."
    chunks = chunk_document("d", text, limit=5, count_tokens=word_tokens)
    assert [c.text for c in chunks] == ["a b c d e", "f g. H."]


def test_a_long_word_is_cut_where_the_tokens_are_full() -> None:
    chunks = chunk_document("d", "x" * 25 + " end", limit=13, count_tokens=byte_tokens)
    assert [c.text for c in chunks] == ["x" * 10, "x" * 10, "xxxxx end"]


def test_a_cut_word_keeps_letters_and_their_marks_together() -> None:
    text = "e\u0301" * 10  # e with a combining acute: 3 bytes each
    chunks = chunk_document("d", text, limit=3 + 7, count_tokens=byte_tokens)
    assert {c.text for c in chunks} == {"e\u0301" * 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Dr. Smith met J. R. Tolkien. They ate.", ["Dr. Smith met J. R. Tolkien.", "They ate."]),
        ("It cost $3.50 in all. Fine!", ["It cost $3.50 in all.", "Fine!"]),
        ('He said "Stop." Then he left.', ['He said "Stop."', "Then he left."]),
        ("What? e.g. this. No", ["What? e.g. this.", "No"]),
        ("第一句。第二句！第三", ["第一句。", "第二句！", "第三"]),
        (
            "# Title\n\nbody text\n- item one\n- item two",
            ["# Title", "body text", "- item one", "- item two"],
        ),
        ("wrapped at\nthe margin. Next", ["wrapped at\nthe margin.", "Next"]),
    ],
)
def test_where_sentences_end(text: str, expected: list[str]) -> None:
    assert sentences(text) == expected


@pytest.mark.parametrize("text", ["", " \n\t"])
def test_empty_text_is_refused(text: str) -> None:
    with pytest.raises(EmptyDocumentError, match="'d' has no text"):
        chunk_document("d", text, limit=5, count_tokens=word_tokens)


def test_a_limit_without_room_is_refused_with_the_remedy() -> None:
    with pytest.raises(CorpusError, match="Shorten the title or raise the chunk limit"):
        chunk_document("d", "some text", limit=3, count_tokens=byte_tokens)


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.sampled_from("ab é\u0301.!?\n#-。\u3000日😀"), min_size=1, max_size=300).filter(
        lambda t: t.strip() != ""
    ),
    st.integers(min_value=7, max_value=60),
)
def test_every_character_once_and_never_over_the_limit(text: str, limit: int) -> None:
    chunks = chunk_document("d", text, limit=limit, count_tokens=byte_tokens)
    assert chunks == chunk_document("d", text, limit=limit, count_tokens=byte_tokens)
    assert all(byte_tokens(c.text) <= limit for c in chunks)
    assert "".join("".join(c.text.split()) for c in chunks) == "".join(text.split())
    assert all(a.end <= b.start for a, b in pairwise(chunks))
    if len(chunks) > 1:
        assert [c.id for c in chunks] == [f"d#{i}" for i in range(len(chunks))]


def test_a_long_text_is_not_counted_again_and_again() -> None:
    counted = 0

    def count(text: str) -> int:
        nonlocal counted
        counted += len(text.split())
        return len(text.split())

    text = " ".join(f"Sentence number {i} is here." for i in range(20_000))  # 100,000 words
    chunks = chunk_document("d", text, limit=500, count_tokens=count)
    assert len(chunks) == 200
    assert counted < 20 * 100_000
