"""The plan: what is skipped, named, computed or refused, against a catalog in memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from kvlink_core.errors import CorpusError, DuplicateDocumentError
from pipeline.plan import Plan, Planner
from pipeline.summary import Summary


@dataclass(frozen=True)
class FakeRow:
    document_id: str
    token_digest: str
    codec: str = "raw"


@dataclass
class FakeCatalog:
    rows: list[FakeRow] = field(default_factory=list)

    def lookup(self, ids: Sequence[str]) -> dict[str, FakeRow]:
        return {r.document_id: r for r in self.rows if r.document_id in ids}

    def lookup_tokens(self, digests: Sequence[str]) -> dict[str, FakeRow]:
        return {r.token_digest: r for r in self.rows if r.token_digest in digests}

    def alias(self, document_id: str, row: FakeRow) -> FakeRow:
        return replace(row, document_id=document_id)


def scanned(document_id: str, text: str, *, place: str = "", part: int = 0, chunk_id: str = "") -> dict[str, Any]:
    return {
        "outcome": "ok",
        "place": place or f"f:{document_id}",
        "document_id": document_id,
        "chunk_id": chunk_id or document_id,
        "part": part,
        "titled": False,
        "text_digest": text.encode(),
        "token_digest": f"d-{text}",
        "tokens": len(text),
        "ticket": f"{place}{document_id}{part}".encode(),
        "code": None,
        "reason": None,
    }


def bad(place: str, code: str, *, outcome: str = "bad-row") -> dict[str, Any]:
    empty = dict.fromkeys(scanned("", ""))
    return empty | {"outcome": outcome, "place": place, "part": 0, "code": code, "reason": f"{place}: {code}"}


def plan(
    rows: list[dict[str, Any]], catalog: FakeCatalog | None = None, *, replace: bool = False, **check: Any
) -> tuple[Plan, Summary]:
    summary = Summary()
    planner = Planner(summary)
    planner.add(rows)
    planner.check(**({"bad_files": "fail", "title_column": None} | check))
    return planner.plan(catalog or FakeCatalog(), codec="raw", replace=replace), summary


def test_new_texts_are_computed_once_and_the_same_text_follows() -> None:
    result, summary = plan([scanned("a", "xx"), scanned("b", "xx"), scanned("c", "y"), scanned("d", "xx")])
    assert {k: p.id for k, p in result.encode.items()} == {"d-xx": "a", "d-y": "c"}
    assert result.followers == {"d-xx": ["b", "d"]}
    assert (summary.documents, summary.chunks, summary.tokens, result.tokens) == (4, 4, 7, 3)


def test_what_the_catalog_has_is_skipped_named_or_replaced() -> None:
    catalog = FakeCatalog([FakeRow("a", "d-x"), FakeRow("b", "d-old"), FakeRow("e", "d-z", codec="other")])
    result, summary = plan([scanned("a", "x"), scanned("b", "new"), scanned("c", "x"), scanned("f", "q")], catalog)
    assert summary.already_there == 1
    assert summary.replaced == 1
    assert result.aliases == [FakeRow("c", "d-x")]
    assert set(result.encode) == {"d-new", "d-q"}


def test_another_codec_is_not_there() -> None:
    result, summary = plan([scanned("a", "x")], FakeCatalog([FakeRow("a", "d-other", codec="other")]))
    assert set(result.encode) == {"d-x"}
    assert summary.already_there == 0


def test_to_replace_is_to_rely_on_nothing_that_is_there() -> None:
    catalog = FakeCatalog([FakeRow("a", "d-x"), FakeRow("b", "d-old")])
    rows = [scanned("a", "x"), scanned("b", "new"), scanned("c", "x"), scanned("d", "old")]
    result, summary = plan(rows, catalog, replace=True)
    assert set(result.encode) == {"d-x", "d-new", "d-old"}
    assert (result.followers, result.aliases) == ({"d-x": ["c"]}, [])
    assert (summary.already_there, summary.replaced) == (0, 2)


def chunked(document_id: str, count: int) -> list[dict[str, Any]]:
    return [
        scanned(document_id, f"{document_id}{i}", place=document_id, part=i, chunk_id=f"{document_id}#{i}")
        for i in range(count)
    ]


@pytest.mark.parametrize(
    ("rows", "there", "stale"),
    [
        (chunked("a", 2), ["a", "b"], ["a"]),  # has grown into chunks
        ([scanned("a", "x")], ["a#0", "a#1", "a"], ["a#0", "a#1"]),  # fits in one again
        (chunked("a", 2), [f"a#{i}" for i in range(12)], [f"a#{i}" for i in range(2, 12)]),  # has shrunk
        (chunked("a", 2), ["a#0", "a#3"], ["a#3"]),  # a chunk of it had failed
        (chunked("a", 2), ["a#0", "a#1", "aa", "ab#2"], []),
        ([scanned("a", "x"), scanned("a#0", "y"), scanned("a#1", "z")], ["a#0", "a#1", "a#2"], ["a#2"]),
    ],
)
@pytest.mark.parametrize("replace", [False, True])
def test_what_still_answers_with_a_former_text_is_named(
    rows: list[dict[str, Any]], there: list[str], stale: list[str], replace: bool
) -> None:
    _, summary = plan(rows, FakeCatalog([FakeRow(i, f"d-old-{i}") for i in there]), replace=replace)
    assert sorted(summary.stale) == sorted(stale)


def test_the_same_document_again_is_counted_not_computed() -> None:
    result, summary = plan([scanned("a", "x", place="f:1"), scanned("a", "x", place="g:9")])
    assert (summary.documents, summary.repeated, summary.chunks) == (2, 1, 1)
    assert not result.followers


def test_one_id_with_two_texts_is_refused_naming_both_places() -> None:
    rows = [scanned("a", "x", place="f:1"), scanned("a", "y", place="g:9"), scanned("b", "x")]
    with pytest.raises(DuplicateDocumentError, match=r"'a' has two different texts, at f:1 and g:9.*Nothing"):
        plan(rows)


def test_a_document_named_like_a_chunk_is_refused() -> None:
    rows = [
        scanned("a", "x", chunk_id="a#0"),
        scanned("a", "y", part=1, chunk_id="a#1"),
        scanned("a#1", "y"),
    ]
    with pytest.raises(DuplicateDocumentError, match="'a' and 'a#1' both come to the chunk id 'a#1'"):
        plan(rows)


def test_bad_rows_are_reported_and_the_rest_is_done() -> None:
    result, summary = plan([bad("f:2", "no_text"), scanned("a", "x"), bad("f:1", "empty_document")])
    assert [(f.place, f.code) for f in summary.failed] == [("f:1", "empty_document"), ("f:2", "no_text")]
    assert (summary.documents, len(result.encode)) == (3, 1)


def test_bad_files_fail_the_job_unless_skipped() -> None:
    rows = [bad("g", "invalid_corpus", outcome="bad-file"), bad("f", "c", outcome="bad-file"), scanned("a", "x")]
    with pytest.raises(CorpusError, match=r"^f: c \(1 more such file.\) Nothing was computed"):
        plan(rows)
    _, summary = plan(rows, bad_files="skip")
    assert [f.place for f in summary.files_skipped] == ["f", "g"]
    assert summary.documents == 1


@pytest.mark.parametrize(
    ("rows", "check", "says"),
    [
        ([], {}, "has no documents"),
        ([bad("f:1", "no_text")], {}, "none of the 1 documents can be used; the first, f:1: "),
        ([scanned("a", "x")], {"title_column": "head"}, "no document has a title in 'head'"),
    ],
)
def test_a_corpus_that_cannot_be_meant_is_refused(rows: list[dict[str, Any]], check: dict[str, str], says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        plan(rows, **check)
