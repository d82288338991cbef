"""Rows of files: good ones, bad ones in their places, and files that are not what their ending says."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvlink_core.errors import CorpusError
from pipeline.reading import BadRow, Columns, Row, read_file
from pipeline.sources import find_files


def read(path: Path, columns: Columns | None = None) -> list[Row | BadRow]:
    (file,) = find_files([str(path)]).files
    return list(read_file(file, columns or Columns()))


def jsonl(tmp_path: Path, *values: Any, name: str = "c.jsonl") -> Path:
    path = tmp_path / name
    path.write_text("".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values), encoding="utf-8")
    return path


def test_jsonl_with_and_without_ids_and_titles(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"id": "a", "text": "One."}, "", {"id": 7, "text": "Two.", "title": " T "}, {"text": "3"})
    assert [(r.id, r.text, r.title) for r in read(path) if isinstance(r, Row)] == [
        ("a", "One.", None),
        ("7", "Two.", "T"),
        ("c.jsonl:4", "3", None),
    ]
    assert [r.place.rsplit("/", 1)[1] for r in read(path)] == ["c.jsonl:1", "c.jsonl:3", "c.jsonl:4"]


def test_gzip_bom_and_chosen_columns(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"key": "k", "body": "B", "head": "H"}\n'))
    assert read(path, Columns(text="body", id="key", title="head")) == [Row(f"file://{path}:1", "k", "B", "H")]


def test_text_files_are_one_document_named_after_the_file(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xef\xbb\xbf# Head\n\nBody \xc3\xa9\n")
    assert read(tmp_path / "a.md") == [Row(f"file://{tmp_path}/a.md", "a.md", "# Head\n\nBody é\n", None)]
    (tmp_path / "b.txt").write_text(" \n")
    (bad,) = read(tmp_path / "b.txt")
    assert isinstance(bad, BadRow)
    assert (bad.id, bad.code) == ("b.txt", "empty_document")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_of_any_string_type(tmp_path: Path, kind: pa.DataType) -> None:
    texts = pa.array(["One.", None, "Three."], pa.string()).cast(kind)
    pq.write_table(pa.table({"text": texts, "id": [1, 2, 3]}), tmp_path / "c.parquet")
    one, two, three = read(tmp_path / "c.parquet")
    assert (one.id, three.id) == ("1", "3")
    assert isinstance(two, BadRow)
    assert (two.id, two.code, two.place[-2:]) == ("2", "no_text", ":2")


@pytest.mark.parametrize(
    ("value", "code", "says"),
    [
        ({"id": "x"}, "no_text", r"no text in 'text' \(it has: id\)"),
        ({"id": "x", "text": None}, "no_text", "no text in 'text'"),
        ({"id": "x", "text": 5}, "no_text", "holds int"),
        ({"id": "x", "text": " \n"}, "empty_document", "empty"),
        ({"id": "x", "text": "a\ud800b"}, "invalid_text", "surrogate"),
        ({"id": "x", "text": "t", "title": 5}, "invalid_title", "holds int"),
        ({"id": "", "text": "t"}, "invalid_id", "an empty id"),
        ({"id": True, "text": "t"}, "invalid_id", "an unusable id"),
        ({"id": "\ud800", "text": "t"}, "invalid_id", "an unusable id"),
        ("[1, 2]", "invalid_row", "not a JSON object"),
        ('{"text": "cut o', "invalid_row", "not JSON"),
        ("[" * 100_000, "invalid_row", "not JSON"),
    ],
)
def test_a_bad_row_is_named_and_reading_goes_on(tmp_path: Path, value: Any, code: str, says: str) -> None:
    path = jsonl(tmp_path, {"id": "a", "text": "A."}, value, {"id": "b", "text": "B."})
    before, bad, after = read(path)
    assert (before.id, after.id) == ("a", "b")
    assert isinstance(bad, BadRow)
    assert bad.code == code
    assert re.search(says, bad.reason)
    assert bad.place.endswith("c.jsonl:2")


def test_a_line_that_is_not_utf8_is_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "c.jsonl"
    path.write_bytes(b'{"text": "fine"}\n{"text": "\xff"}\n')
    assert isinstance(read(path)[1], BadRow)


def test_an_id_column_asked_for_by_name_must_be_there(tmp_path: Path) -> None:
    path = jsonl(tmp_path, {"id": "a", "text": "A."})
    (bad,) = read(path, Columns(id="key"))
    assert isinstance(bad, BadRow)
    assert bad.reason == "no id in 'key': a string or integer is needed"


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("c.jsonl", b"PAR1 and more", "not JSON Lines: it looks like Parquet"),
        ("c.jsonl", gzip.compress(b'{"text": "t"}'), "not JSON Lines: it looks like gzip"),
        ("c.jsonl", b'[{"text": "t"}]', "one JSON array"),
        ("c.jsonl", b"id,text\n1,hello\n", "line 1 is not JSON"),
        ("c.jsonl", b"\xff\xfe{\x00", "line 1 is not UTF-8"),
        ("c.jsonl.gz", b'{"text": "t"}\n', "not gzip at all"),
        ("c.jsonl.gz", gzip.compress(b'{"text": "t"}\n' * 999)[:-20], "damaged gzip"),
        ("c.parquet", b'{"text": "t"}', "is not Parquet"),
        ("c.parquet", b"", "is not Parquet"),
        ("c.txt", b"%PDF-1.7\n\xff\xff", "is not text: PDF"),
        ("c.txt", b"\x00\x01\x02", "it has NUL bytes"),
        ("c.md", b"caf\xe9", "byte 3 is not UTF-8"),
    ],
)
def test_a_file_that_is_not_what_its_ending_says(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=says) as raised:
        read(tmp_path / name)
    assert name in str(raised.value)


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (Columns(text="body"), r"no column 'body' \(it has: text, n, id\).*--text-column"),
        (Columns(id="key"), "no column 'key'.*--id-column"),
        (Columns(title="head"), "no column 'head'.*--title-column"),
        (Columns(text="n"), "column 'n' holds double"),
    ],
)
def test_parquet_without_such_a_column(tmp_path: Path, columns: Columns, says: str) -> None:
    pq.write_table(pa.table({"text": ["t"], "n": [1.5], "id": ["a"]}), tmp_path / "c.parquet")
    with pytest.raises(CorpusError, match=says):
        read(tmp_path / "c.parquet", columns)
