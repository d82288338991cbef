"""Two questions about strings that several layers ask. Imports nothing, so that light code can use it."""

from __future__ import annotations


def is_unicode(text: str) -> bool:
    """Whether ``text`` can be written as UTF-8; JSON and command lines can bring half of a surrogate pair."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What a library's exception says, as part of one line; its class where it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)
