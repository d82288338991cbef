"""Readers: every format in the shape that its authors publish; bad rows named by line."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlink_core.errors import CorpusError
from kvlink_core.evaluation.examples import Example, Shape
from kvlink_core.evaluation.reading import open_dataset

Save = Callable[..., Path]


@pytest.fixture
def save(tmp_path: Path) -> Save:
    """Writes JSON: a list of rows as lines, anything else as one value."""

    def write(value: Any, name: str = "data.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = "".join(json.dumps(row) + "\n" for row in value) if name.endswith(".jsonl") else json.dumps(value)
        path.write_text(text, "utf-8")
        return path

    return write


def read(path: Path, **options: Any) -> list[Example]:
    return list(open_dataset(str(path), **options).examples)


def texts(example: Example) -> list[tuple[str | None, str]]:
    return [(document.title, document.text) for document in example.documents]


PASSAGES = [{"id": "w1", "title": "T", "text": "one", "isgold": False}, {"title": "U", "text": "two", "isgold": True}]


def test_lost_in_the_middle(save: Save) -> None:
    path = save([{"question": "q?", "answers": ["a", "b"], "ctxs": PASSAGES, "nq_annotated_gold": {"title": "U"}}])
    (found,) = read(path)
    assert texts(found) == [("T", "one"), ("U", "two")]
    assert (found.answers, found.gold, found.kind, found.task) == (("a", "b"), (1,), "gold at 1", "qa")


def test_retrieved_passages_as_one_array(save: Save) -> None:
    """As DPR, FiD and Contriever write them, TriviaQA among others; no gold."""
    rows = [
        {"question": f"q{i}", "answers": ["a"], "target": "a", "ctxs": [{"title": "T", "text": "x"}]} for i in (1, 2)
    ]
    found = read(save(rows, "data.json"))
    assert [e.question for e in found] == ["q1", "q2"]
    assert found[0].gold == ()


def test_own_format(save: Save) -> None:
    row = {"id": "x", "question": "q", "answers": ["a"], "documents": [{"title": "", "text": "t"}], "gold": [0]}
    (found,) = read(save([row]))
    assert (found.id, texts(found), found.gold) == ("x", [(None, "t")], (0,))


HOTPOT = {
    "_id": "h1", "question": "q", "answer": "yes", "type": "bridge", "level": "hard",
    "supporting_facts": [["B", 0], ["B", 1]],
    "context": [["A", ["First. ", " Second."]], ["B", ["Third."]]],
}  # fmt: skip


def test_hotpotqa_and_2wikimultihopqa(save: Save) -> None:
    (found,) = read(save([{**HOTPOT, "evidences": [["A", "is", "B"]]}], "dev.json"))
    assert texts(found) == [("A", "First. Second."), ("B", "Third.")]
    assert (found.id, found.answers, found.gold, found.kind) == ("h1", ("yes",), (1,), "bridge")


def test_hotpotqa_in_columns_is_the_same(save: Save) -> None:
    row = {**HOTPOT, "id": "h1"}
    del row["_id"]
    row["context"] = {"title": ["A", "B"], "sentences": [["First. ", " Second."], ["Third."]]}
    row["supporting_facts"] = {"title": ["B", "B"], "sent_id": [0, 1]}
    assert read(save([row])) == read(save([HOTPOT], "dev.json"))


def test_musique(save: Save) -> None:
    paragraphs = [
        {"idx": 0, "title": "A", "paragraph_text": "one", "is_supporting": False},
        {"idx": 1, "title": "B", "paragraph_text": "two", "is_supporting": True},
    ]
    row = {"id": "3hop1__9_8_7", "paragraphs": paragraphs, "question": "q", "question_decomposition": []}
    row |= {"answer": "a", "answer_aliases": ["b", "a"], "answerable": True}
    path = save([row, {**row, "id": "2hop__1", "answerable": False}])
    found = open_dataset(str(path))
    (example,) = found.examples
    assert (example.answers, example.gold, example.kind) == (("a", "b"), (1,), "3hop1")
    assert found.left_out == {"unanswerable": 1}


def test_squad_nesting(save: Save) -> None:
    def qa(name: str, *answers: str) -> dict[str, Any]:
        return {"id": name, "question": f"{name}?", "answers": [{"text": a, "answer_start": 0} for a in answers]}

    paragraphs = [{"context": "c1", "qas": [qa("1", "a", "a", "b"), qa("2")]}, {"context": "c2", "qas": [qa("3", "d")]}]
    data = {"version": "1.1", "data": [{"title": "Oil_crisis", "paragraphs": paragraphs}]}
    found = open_dataset(str(save(data, "dev.json")))
    assert [(e.id, texts(e), e.answers) for e in found.examples] == [
        ("1", [("Oil crisis", "c1")], ("a", "b")),
        ("3", [("Oil crisis", "c2")], ("d",)),
    ]
    assert found.left_out == {"unanswerable": 1}


TRIVIA = {
    "Question": "q", "QuestionId": "tc_1",
    "Answer": {"Value": "Sunset", "Aliases": ["Sunset", "West"], "NormalizedValue": "sunset"},
    "EntityPages": [{"DocSource": "TagMe", "Filename": "P.txt", "Title": "P"}],
    "SearchResults": [{"Filename": "1/2.txt", "Title": "S", "Description": "short", "Rank": 0}],
}  # fmt: skip


def test_triviaqa_reads_its_evidence(save: Save, tmp_path: Path) -> None:
    path = save({"Data": [TRIVIA], "Domain": "Web", "Version": 1.0}, "triviaqa/qa/web-dev.json")
    for name, text in (("wikipedia/P.txt", "page"), ("web/1/2.txt", "site")):
        file = tmp_path / "triviaqa/evidence" / name
        file.parent.mkdir(parents=True)
        file.write_text(text)
    (found,) = read(path)
    assert (found.id, texts(found), found.answers) == ("tc_1", [("P", "page"), ("S", "site")], ("Sunset", "West"))


def test_triviaqa_without_evidence(save: Save) -> None:
    descriptions = {**TRIVIA, "EntityPages": []}
    (found,) = read(save({"Data": [descriptions]}, "unfiltered.json"))
    assert texts(found) == [("S", "short")]
    with pytest.raises(CorpusError, match=r"line 1, EntityPages\[0\].*--evidence"):
        read(save({"Data": [TRIVIA]}, "web.json"))


def test_triviaqa_cannot_read_outside_its_evidence(save: Save, tmp_path: Path) -> None:
    (tmp_path / "evidence").mkdir()
    row = {**TRIVIA, "EntityPages": [{"Filename": "../../secret", "Title": "x"}]}
    with pytest.raises(CorpusError, match="'Filename' must be a file below"):
        read(save({"Data": [row]}, "qa/web.json"))


def test_triviaqa_in_columns(save: Save) -> None:
    row = {
        "question": "q", "question_id": "tc_2", "answer": {"value": "v", "aliases": ["w"]},
        "entity_pages": {"title": ["P"], "wiki_context": ["page"], "filename": ["f"]},
        "search_results": {"title": ["S"], "search_context": [" "], "rank": [0]},
    }  # fmt: skip
    (found,) = read(save([row]))
    assert (texts(found), found.answers) == ([("P", "page")], ("v", "w"))


@pytest.mark.parametrize("mark", ["|||||", " story_separator_special_tag "])
def test_multinews(save: Save, mark: str) -> None:
    row = {"document": f"one NEWLINE_CHAR more {mark}two{mark} ", "summary": "\u2013 Both of them."}
    (found,) = read(save([row]))
    assert texts(found) == [(None, "one \n more"), (None, "two")]
    assert (found.answers, found.task) == (("Both of them.",), "summary")


def test_multinews_as_two_files(tmp_path: Path) -> None:
    (tmp_path / "test.src.cleaned").write_text("a ||||| b\nc\n")
    (tmp_path / "test.tgt").write_text("first\nsecond\n")
    found = open_dataset(str(tmp_path / "test.src.cleaned"))
    assert [(texts(e), e.answers) for e in found.examples] == [
        ([(None, "a"), (None, "b")], ("first",)),
        ([(None, "c")], ("second",)),
    ]
    (tmp_path / "test.tgt").write_text("first\n")
    with pytest.raises(CorpusError, match=r"test\.src\.cleaned, line 2: test\.tgt has another number of lines"):
        open_dataset(str(tmp_path / "test.src.cleaned"))


def test_samsum(save: Save) -> None:
    rows = [
        {"id": "13", "summary": "They meet.", "dialogue": "A: hi\r\nB: hi"},
        {"id": "14", "summary": "s", "dialogue": ""},
    ]
    found = open_dataset(str(save(rows, "test.json")))
    (example,) = found.examples
    assert (texts(example), example.answers, example.task) == ([(None, "A: hi\nB: hi")], ("They meet.",), "summary")
    assert found.left_out == {"without documents": 1}


def test_documents_by_id_as_the_sample_has_them(save: Save) -> None:
    corpus = save([{"id": "d1", "text": "one"}, {"id": "d2", "title": "T", "text": "two"}], "corpus.jsonl")
    rows = [{"question": "q", "answer": "a", "kind": "fact", "documents": ["d2", "d1"]}]
    (found,) = read(save(rows, "questions.jsonl"))
    assert (texts(found), found.kind, found.answers) == ([("T", "two"), (None, "one")], "fact", ("a",))
    corpus.unlink()
    with pytest.raises(CorpusError, match=r"questions\.jsonl, line 1: documents must be objects.*corpus\.jsonl"):
        read(save(rows, "questions.jsonl"))


def test_plain_text_is_documents_and_what_follows(tmp_path: Path) -> None:
    path = tmp_path / "book.txt"
    path.write_text(" ".join(f"w{i}" for i in range(17)))
    found = read(path, shape=Shape(documents=2, text_words=3))
    assert [[d.text for d in e.documents] for e in found] == [["w0 w1 w2", "w3 w4 w5"], ["w9 w10 w11", "w12 w13 w14"]]
    assert [e.continuation for e in found] == ["w6 w7 w8", "w15 w16"]
    assert {e.task for e in found} == {"text"}


@pytest.mark.parametrize("name", ["worlds", "tales"])
def test_generated_questions(name: str) -> None:
    found = open_dataset(name, limit=7)
    assert found.name == name
    assert len({e.id for e in found.examples}) == 7
    assert all(e.answers and e.kind for e in found.examples)


def test_gzip_is_told_by_its_content(save: Save) -> None:
    plain = save([HOTPOT], "dev.json")
    packed = plain.with_name("renamed.json")
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == read(plain)


def test_names(save: Save) -> None:
    path = save([{"question": "q", "documents": [{"text": "t"}]}], "my.set.jsonl")
    assert open_dataset(str(path)).name == "my.set"
    assert open_dataset(f"other={path}").name == "other"


def test_the_same_question_twice_is_told_apart(save: Save) -> None:
    row = {"id": "x", "question": "q", "documents": [{"text": "t"}]}
    assert [e.id for e in read(save([row, row, row]))] == ["x", "x~1", "x~2"]


def test_nothing_is_read_beyond_the_limit(save: Save) -> None:
    path = save([{"question": "q", "documents": [{"text": "t"}]}] * 2)
    with path.open("a") as file:
        file.write("not JSON\n")
    assert len(read(path, limit=2)) == 2
    with pytest.raises(CorpusError, match=r"data\.jsonl, line 3: not JSON: .*column 1"):
        read(path, limit=3)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": 3, "documents": [{"text": "t"}]}, "line 2: field 'question' must be text; it is 3"),
        ({"question": " ", "documents": [{"text": "t"}]}, "'question' must be text that is not blank"),
        ({"question": "q", "documents": [{"txt": "t"}]}, r"line 2, documents\[0\]: field 'text' .* missing"),
        ({"question": "q", "documents": "t"}, "'documents' must be a list"),
        ({"question": "q", "documents": [3]}, r"documents\[0\]: a JSON object was expected, not 3"),
        (
            {"question": "q", "documents": [{"text": "t"}], "gold": [1]},
            "'gold' must be places of documents, from 0 to 0",
        ),
        ({"question": "q", "documents": [{"text": "t"}], "answers": [1]}, "'answers' must be a list of texts"),
        ({"question": "q\ud800", "documents": [{"text": "t"}]}, "half of a surrogate pair"),
        ({"question": "q", "context": [["A"]]}, "'context' must be a list of pairs"),
        ({"question": "q", "context": [["A", "text"]]}, "'context' must be a list of titles with"),
        ({"q": 1}, r"no known format has these fields \(q\).*MuSiQue"),
        ([1], "a JSON object was expected"),
    ],
)
def test_bad_rows_are_named_by_line_and_field(save: Save, row: Any, message: str) -> None:
    path = save([{"question": "q", "documents": [{"text": "t"}]}, row])
    with pytest.raises(CorpusError, match=message):
        read(path)


def test_files_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="No such file"):
        open_dataset(str(tmp_path / "none.jsonl"))
    with pytest.raises(CorpusError, match="is a folder"):
        open_dataset(str(tmp_path))
