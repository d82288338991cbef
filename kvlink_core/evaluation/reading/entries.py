"""JSON files entry by entry: lines of JSON, one big array, or the array under ``data`` of one big object.

Nothing but the entry at hand is in memory, whatever the size of the file. Gzip is told by its first bytes.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from kvlink_core.errors import CorpusError

#: The keys of one big object under which the entries are: SQuAD's and TriviaQA's.
NESTED = ("data", "Data")

_CHUNK = 1 << 16
_DECODER = json.JSONDecoder()

#: An error this near to the end of what was read may be because more has to be read: the longest thing that JSON does
#: not call an unterminated string is half an escaped surrogate pair.
_NEAR = 16

_UNREADABLE = "nested too deeply, or a number of too many digits"


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry, and where it is, for messages: ``file, line 3``."""

    value: Any
    where: str


@contextmanager
def opened(path: Path) -> Iterator[IO[str]]:
    """The file as text, decompressed.

    Raises:
        CorpusError: it is not there or cannot be read; raised while reading, too.
    """
    try:
        with path.open("rb") as raw:
            packed = raw.read(2) == b"\x1f\x8b"
        with (gzip.open if packed else open)(path, "rt", encoding="utf-8") as file:
            yield file
    except UnicodeDecodeError as error:
        raise CorpusError(f"{path} is not text in UTF-8 ({error.reason} in byte {error.start} of a block).") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise CorpusError(f"{path} is damaged or cut off: {error}.") from error
    except OSError as error:
        raise CorpusError(f"cannot read {path}: {error.strerror}.") from error


def entries(path: Path) -> Iterator[Entry]:
    """The entries of a JSON file.

    Raises:
        CorpusError: the file cannot be read, or is not JSON from some line on.
    """
    with opened(path) as file:
        stream = _Stream(file, path)
        first = stream.peek()
        nested = first == "{" and stream.enter(NESTED)
    if first == "":
        raise CorpusError(f"{path} is empty.")
    with opened(path) as file:
        if first == "[" or nested:
            stream = _Stream(file, path)
            if nested:
                stream.enter(NESTED)
            yield from stream.array()
        else:
            yield from _lines(file, path)


def _lines(file: IO[str], path: Path) -> Iterator[Entry]:
    for number, line in enumerate(file, 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise CorpusError(f"{where}: not JSON: {_said(error)}.") from error
            yield Entry(value, where)


def _said(error: Exception) -> str:
    return f"{error.msg} at column {error.colno}" if isinstance(error, json.JSONDecodeError) else _UNREADABLE


class _Stream:
    """JSON text, of which only a window is in memory."""

    def __init__(self, file: IO[str], path: Path) -> None:
        self._file = file
        self._path = path
        self._text = ""
        self._at = 0
        self._line = 1
        self._ended = False

    def peek(self) -> str:
        """The next character that is not white space, or ``""`` at the end."""
        while True:
            while self._at < len(self._text):
                if not self._text[self._at].isspace() and self._text[self._at] != "\ufeff":
                    return self._text[self._at]
                self._at += 1
            if not self._more():
                return ""

    def enter(self, keys: Sequence[str]) -> bool:
        """Go into an object, up to the array under one of its keys; false where there is none, or no object."""
        if not self._take("{"):
            return False
        while self.peek() == '"':
            key = self._value()
            if not self._take(":"):
                return False
            if key in keys and self.peek() == "[":
                return True
            self._value()
            if not self._take(","):
                return False
        return False

    def array(self) -> Iterator[Entry]:
        """The elements of the array that begins here."""
        self._take("[")
        while self.peek() not in ("]", ""):
            where = f"{self._path}, line {self._line_at()}"
            yield Entry(self._value(), where)
            if not self._take(",") and self.peek() not in ("]", ""):
                raise CorpusError(
                    f"{self._path}, line {self._line_at()}: not JSON: neither ',' nor ']' behind an entry."
                )
        if self.peek() == "":
            raise CorpusError(f"{self._path}, line {self._line_at()}: the file is cut off: its array does not end.")

    def _take(self, character: str) -> bool:
        if self.peek() != character:
            return False
        self._at += 1
        return True

    def _value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
            except (ValueError, RecursionError) as error:
                incomplete = isinstance(error, json.JSONDecodeError) and (
                    error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR
                )
                if incomplete and self._more():
                    continue
                line = self._line_at(error.pos if isinstance(error, json.JSONDecodeError) else None)
                said = error.msg if isinstance(error, json.JSONDecodeError) else _UNREADABLE
                raise CorpusError(f"{self._path}, line {line}: not JSON: {said}.") from error
            if end == len(self._text) and self._more():  # a number may go on
                continue
            self._at = end
            return value

    def _line_at(self, at: int | None = None) -> int:
        return self._line + self._text.count("\n", 0, self._at if at is None else at)

    def _more(self) -> bool:
        """Read on, as much again as is kept; false at the end."""
        if self._ended:
            return False
        self._line = self._line_at()
        kept = self._text[self._at :]
        chunk = self._file.read(max(_CHUNK, len(kept)))
        self._ended = not chunk
        self._text, self._at = kept + chunk, 0
        return bool(chunk)
