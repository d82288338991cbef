"""From one file of the corpus to its rows. Plain Python: no Ray, memory for one batch of rows.

What is wrong with a *file* (it is not what its ending says, cannot be opened, has no such column) raises
``CorpusError``. What is wrong with a *row* (no text, not an object, an id that is none) is a ``BadRow`` in its
place; reading goes on.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from kvlink_core.errors import CorpusError
from kvlink_core.text import is_unicode
from pipeline.sources import SourceFile, open_file

_MAGIC = {b"PAR1": "Parquet", b"\x1f\x8b": "gzip", b"PK\x03\x04": "a zip archive", b"%PDF": "PDF"}


@dataclass(frozen=True, slots=True)
class Columns:
    """Which columns hold what. ``None`` means ``id`` and ``title``, where there are such."""

    text: str = "text"
    id: str | None = None
    title: str | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A document as the corpus has it. ``place`` is ``url:line`` (or row, from 1), for people."""

    place: str
    id: str
    text: str
    title: str | None


@dataclass(frozen=True, slots=True)
class BadRow:
    """A row that is no document. ``code`` is short and stable, ``reason`` is for people."""

    place: str
    id: str | None
    code: str
    reason: str


def read_file(file: SourceFile, columns: Columns, options: Mapping[str, Any] | None = None) -> Iterator[Row | BadRow]:
    """The rows of a file, in order.

    A row without an id is called ``{file.name}:{line or row number}``; the one document of a ``.txt`` or
    ``.md`` is called ``file.name``.

    Raises:
        CorpusError: the file cannot be read as what its ending says.
    """
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    with ExitStack() as stack:
        try:
            stream = stack.enter_context(open_file(file, options))
        except Exception as error:  # each file system has errors of its own
            raise CorpusError(f"{file.url}: cannot be opened: {error}") from error
        yield from _guarded(file, readers[file.kind](file, stream, columns))


def _guarded(file: SourceFile, rows: Iterator[Row | BadRow]) -> Iterator[Row | BadRow]:
    try:
        yield from rows
    except (gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise CorpusError(f"{file.url}: damaged gzip file, or not gzip at all: {error}") from error
    except OSError as error:
        raise CorpusError(f"{file.url}: cannot be read: {error}") from error


def _read_jsonl(file: SourceFile, stream: Any, columns: Columns) -> Iterator[Row | BadRow]:
    begun = False
    for number, raw in enumerate(stream, start=1):
        line = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
        if not line.strip():
            continue
        place = f"{file.url}:{number}"
        problem, value = "", None
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError:
            problem = "not UTF-8"
        except (ValueError, RecursionError) as error:
            problem = f"not JSON: {error}"
        else:
            if not isinstance(value, dict):
                problem = "not a JSON object"
        if problem and not begun:
            # Nothing good came before it, so it is the file, not a line of it, that is something else.
            what = _other_format(line) or ("one JSON array, not a line for each object" if line[:1] == b"[" else "")
            found = f"it looks like {what}" if what else f"line {number} is {problem}"
            raise CorpusError(f"{file.url} is not JSON Lines: {found}.")
        begun = True
        if isinstance(value, dict):
            yield _row(file, place, number, value, columns)
        else:
            yield BadRow(place, None, "invalid_row", f"the line is {problem}")


def _read_parquet(file: SourceFile, stream: Any, columns: Columns) -> Iterator[Row | BadRow]:
    try:
        parquet = pq.ParquetFile(stream)
        schema = parquet.schema_arrow
        wanted = []
        for name, column, needed in (
            ("text", columns.text, True),
            ("id", columns.id or "id", columns.id is not None),
            ("title", columns.title or "title", columns.title is not None),
        ):
            if column in schema.names:
                _check_type(file, name, column, schema.field(column).type)
                wanted.append(column)
            elif needed:
                raise CorpusError(
                    f"{file.url} has no column {column!r} (it has: {', '.join(schema.names)}); "
                    f"say which one is the {name} with --{name}-column."
                )
        number = 0
        for batch in parquet.iter_batches(batch_size=512, columns=wanted):
            for value in batch.to_pylist():
                number += 1
                yield _row(file, f"{file.url}:{number}", number, value, columns)
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise CorpusError(f"{file.url} is not Parquet, or is damaged: {error}") from error


def _check_type(file: SourceFile, name: str, column: str, kind: Any) -> None:
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    fits = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not fits and not (name == "id" and pa.types.is_integer(kind)):
        raise CorpusError(f"{file.url}: column {column!r} holds {kind}, and the {name} must be a string.")


def _read_text(file: SourceFile, stream: Any, columns: Columns) -> Iterator[Row | BadRow]:
    raw = stream.read()
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = _other_format(raw) or f"byte {error.start} is not UTF-8"
        raise CorpusError(f"{file.url} is not text: {what}.") from error
    if "\0" in text:
        raise CorpusError(f"{file.url} is not text: {_other_format(raw) or 'it has NUL bytes'}.")
    if not text.strip():
        yield BadRow(file.url, file.name, "empty_document", "the file is empty")
    else:
        yield Row(file.url, file.name, text, None)


def _other_format(head: bytes) -> str | None:
    return next((what for magic, what in _MAGIC.items() if head.startswith(magic)), None)


def _row(file: SourceFile, place: str, number: int, value: Mapping[str, Any], columns: Columns) -> Row | BadRow:
    """Check one row. Never raises."""
    document_id = value.get(columns.id or "id")
    if document_id is None and columns.id is None:
        document_id = f"{file.name}:{number}"
    if isinstance(document_id, int) and not isinstance(document_id, bool):
        document_id = str(document_id)
    if not isinstance(document_id, str) or not document_id.strip() or not is_unicode(document_id):
        shown = "no" if document_id is None else "an empty" if document_id == "" else "an unusable"
        reason = f"{shown} id in {columns.id or 'id'!r}: a string or integer is needed"
        return BadRow(place, None, "invalid_id", reason)

    def bad(code: str, reason: str) -> BadRow:
        return BadRow(place, document_id, code, reason)

    text = value.get(columns.text)
    if text is None:
        has = "" if columns.text in value else f" (it has: {', '.join(sorted(value)[:8])})"
        return bad("no_text", f"no text in {columns.text!r}{has}")
    if not isinstance(text, str):
        return bad("no_text", f"{columns.text!r} holds {type(text).__name__}, not a string")
    if not text.strip():
        return bad("empty_document", "the text is empty")
    title = value.get(columns.title or "title")
    if title is not None and not isinstance(title, str):
        return bad("invalid_title", f"{columns.title or 'title'!r} holds {type(title).__name__}, not a string")
    if not is_unicode(text) or not is_unicode(title or ""):
        return bad("invalid_text", "the text has half of a surrogate pair, so it is not valid Unicode")
    return Row(place, document_id, text, title.strip() or None if title else None)
