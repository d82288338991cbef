"""Text of a stream: joined pieces equal the whole, characters are whole, stop strings cut exactly."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import byte_tokenizer

from kvlink_core.engine.text import TextStream
from kvlink_core.prompt import PromptLayout

LAYOUT = PromptLayout(byte_tokenizer())


def pieces(text: str, stop: tuple[str, ...] = ()) -> tuple[list[str], bool]:
    stream = TextStream(LAYOUT, stop)
    out = []
    for token in LAYOUT.plain_tokens(text):
        out.append(stream.push(token))
        if stream.stopped:
            return out, True
    out.append(stream.finish())
    return out, stream.stopped


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_pieces_join_to_the_text(text: str) -> None:
    out, stopped = pieces(text)
    assert "".join(out) == text
    assert not stopped


def test_no_piece_holds_half_a_character() -> None:
    out, _ = pieces("naïve 日本 🎉!")
    assert all("\ufffd" not in piece for piece in out)
    assert [p for p in out if p] == list("naïve 日本 🎉!")


def test_bytes_that_never_become_a_character_are_shown_at_the_end() -> None:
    stream = TextStream(LAYOUT, ())
    tokens = LAYOUT.plain_tokens("a🎉")[:-1]
    out = [stream.push(t) for t in tokens]
    assert "".join(out) == "a"
    assert set(stream.finish()) == {"\ufffd"}


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abé", max_size=20), st.lists(st.text(alphabet="abé", min_size=1, max_size=4), max_size=3))
def test_stop_strings_cut_where_they_first_appear(text: str, stop: list[str]) -> None:
    """Oracle: read the text character by character until some stop string is complete."""
    expected, found = text, False
    for end in range(1, len(text) + 1):
        ends = [end - len(s) for s in stop if text[:end].endswith(s)]
        if ends:
            expected, found = text[: min(ends)], True
            break
    out, stopped = pieces(text, tuple(stop))
    assert "".join(out) == expected
    assert stopped == found


def test_text_that_cannot_belong_to_a_stop_string_is_not_held_back() -> None:
    stream = TextStream(LAYOUT, ("STOP",))
    assert [stream.push(t) for t in LAYOUT.plain_tokens("aSTx")] == ["a", "", "", "STx"]
