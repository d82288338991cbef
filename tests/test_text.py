"""Strings from outside: surrogates, and exceptions that say nothing."""

from __future__ import annotations

import pytest

from kvlink_core.text import first_line, is_unicode


@pytest.mark.parametrize(("text", "expected"), [("", True), ("naïve 🎉", True), ("x\ud800", False), ("\udfff", False)])
def test_is_unicode(text: str, expected: bool) -> None:
    assert is_unicode(text) is expected


@pytest.mark.parametrize(
    ("error", "expected"), [(OSError("one\ntwo"), "one"), (KeyError(), "KeyError"), (ValueError("x"), "x")]
)
def test_first_line(error: Exception, expected: str) -> None:
    assert first_line(error) == expected
