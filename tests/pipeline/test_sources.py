"""Which files a corpus is."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from kvlink_core.errors import ConfigError, CorpusError
from pipeline.sources import find_files


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    for name in ("b.jsonl", "a.TXT", "sub/c.parquet", "sub/d.jsonl.gz", "e.pdf", ".hidden.txt", "_SUCCESS", "f.md"):
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("x")
    return tmp_path / "corpus"


def test_a_folder_gives_its_readable_files_in_order_and_names_the_others(corpus: Path) -> None:
    found = find_files([str(corpus)])
    assert [(f.name, f.kind, f.compressed) for f in found.files] == [
        ("a.TXT", "text", False),
        ("b.jsonl", "jsonl", False),
        ("f.md", "text", False),
        ("sub/c.parquet", "parquet", False),
        ("sub/d.jsonl.gz", "jsonl", True),
    ]
    assert [Path(p).name for p in found.ignored] == ["e.pdf"]


def test_names_are_relative_to_what_was_asked_for(corpus: Path) -> None:
    assert [f.name for f in find_files([str(corpus / "sub" / "*.parquet")]).files] == ["c.parquet"]
    assert [f.name for f in find_files([f"{corpus}/**/*.parquet"]).files] == ["sub/c.parquet"]
    assert [f.name for f in find_files([str(corpus / "sub" / "c.parquet")]).files] == ["c.parquet"]


def test_slashes_too_many_change_nothing(corpus: Path) -> None:
    for source in (f"{corpus}//*.md", f"{corpus}//", f"file://{corpus}//*.md"):
        assert "f.md" in [f.name for f in find_files([source]).files]
    assert [f.name for f in find_files([f"{corpus}//sub/*.parquet"]).files] == ["c.parquet"]


def test_a_file_found_twice_is_taken_once(corpus: Path) -> None:
    assert len(find_files([str(corpus / "b.jsonl"), f"{corpus}/*.jsonl", str(corpus)]).files) == 5


def test_an_empty_part_of_a_name_is_not_hidden() -> None:
    fsspec.filesystem("memory").pipe({"/odd//x/one.txt": b"t", "/odd//x/.two.txt": b"t"})
    assert [f.name for f in find_files(["memory://odd"]).files] == ["/x/one.txt"]


def test_any_fsspec_url() -> None:
    memory = fsspec.filesystem("memory")
    memory.pipe({"/bucket/x/one.jsonl": b"{}", "/bucket/x/two.txt": b"t"})
    found = find_files(["memory://bucket/x"])
    assert [(f.url, f.name) for f in found.files] == [
        ("memory:///bucket/x/one.jsonl", "one.jsonl"),
        ("memory:///bucket/x/two.txt", "two.txt"),
    ]


@pytest.mark.parametrize(
    ("source", "error", "says"),
    [
        ("{}/absent", CorpusError, "no corpus at"),
        ("{}/absent*.jsonl", CorpusError, "no corpus at"),
        ("{}/e.pdf", CorpusError, "unknown ending; readable are .jsonl"),
        ("{}/*.pdf", CorpusError, "none of its 1 files ends in"),
        ("nonsense://x/y", ConfigError, "nonsense"),
    ],
)
def test_what_cannot_be_found_is_said(corpus: Path, source: str, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        find_files([source.format(corpus)])
