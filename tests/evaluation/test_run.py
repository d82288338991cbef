"""The grid: what rows hold, what going on after an end gives, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError
from kvlink_core.evaluation import asking, encodings
from kvlink_core.evaluation.records import Row, RunDirectory, read_config, read_rows
from kvlink_core.models import load_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.types import Document, Message

Evaluate = Callable[..., Path]

CLOCKED = ("ttft_s", "decode_s")


def without_clocks(rows: list[Row]) -> list[dict[str, Any]]:
    return [row.model_dump(exclude=set(CLOCKED)) for row in rows]


class Killed(BaseException):
    """As a signal comes: between two statements, and no handler of ours catches it."""


def test_every_question_under_every_cell(evaluate: Evaluate, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Answers are those of a session with the same linker; raw caches change nothing."""
    rows = read_rows(evaluate(tmp_path / "run"))
    assert len(rows) == 5 * 7
    first = [row for row in rows if row.id == "q2"]
    assert [(row.linker, row.codec) for row in first] == [
        ("full", ""),
        *[(linker, codec) for linker in ("reposition", "link-tokens", "epic:k=2") for codec in ("raw", "int8")],
    ]
    session = Session(load_model(str(tiny_model_dir)))
    documents = [Document("", t) for t in ("it rains", "no news today", "blue skies over here", "the cat sat")]
    for row in first:
        if row.codec in ("", "raw"):
            request = AnswerRequest([Message("user", "what 2?")], documents, row.linker, SamplingParams(max_tokens=6))
            answer = session.start(request)
            assert row.answer == answer.text()
            assert (row.prompt_tokens, row.scores.keys()) == (answer.usage.prompt_tokens, {"em", "f1", "exact"})
        assert (row.kl is None) == (row.linker == "full")
        assert row.ttft_s is not None
        assert row.ttft_s > 0
        assert row.kind == "even"
    raw, int8 = (next(r for r in first if (r.linker, r.codec) == ("epic:k=2", codec)) for codec in ("raw", "int8"))
    assert raw.kl is not None
    assert int8.kl is not None
    assert 0 < raw.kl != int8.kl
    assert 0 < int8.stored_bytes < raw.stored_bytes == 8 * 4 * 2 * 3 * 2 * raw.document_tokens


def test_what_is_full_prefill_is_as_close_as_can_be(evaluate: Evaluate, tmp_path: Path) -> None:
    """The identities of docs/linkers.md: EPIC that computes whole documents, CacheBlend that computes all."""
    linkers = ("epic:k=99", "cacheblend:ratio=1")
    rows = read_rows(evaluate(tmp_path / "run", linkers=linkers, codecs=["raw"]))
    full = {row.id: row for row in rows if row.linker == "full"}
    for row in rows:
        if row.linker != "full":
            assert row.kl is not None
            assert row.kl < 1e-8
            assert row.top1 == 1
            assert (row.answer, row.tokens) == (full[row.id].answer, full[row.id].tokens)
            assert row.nll == pytest.approx(full[row.id].nll, abs=1e-4)


@pytest.mark.parametrize("torn", [b"", b'{"model":"ti', b'{"model":"tiny","linker":"full"}\n'])
def test_a_killed_run_goes_on_and_equals_one_that_was_not(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, torn: bytes
) -> None:
    """Killed after two questions, in the middle of a line or of a question perhaps; with little memory, too."""
    whole = read_rows(evaluate(tmp_path / "whole"))

    def kill(done: int) -> None:
        if done == 2:
            raise Killed

    out = tmp_path / "killed"
    with pytest.raises(Killed):
        evaluate(out, after=kill)
    assert len(read_rows(out)) == 2 * 7
    if torn.endswith(b"\n"):  # the first row of a question that was being written
        torn = (out / "answers.jsonl").read_bytes().splitlines(keepends=True)[0].replace(b'"q0"', b'"q2"')
    with (out / "answers.jsonl").open("ab") as file:
        file.write(torn)
    assert len(read_rows(out)) == 2 * 7
    asked: list[str] = []
    rows_of = asking.Asking.rows
    monkeypatch.setattr(asking.Asking, "rows", lambda self, q: (asked.append(q.example.id), rows_of(self, q))[1])
    evaluate(out)
    assert asked == ["q2", "q3", "q4"]
    assert without_clocks(read_rows(out)) == without_clocks(whole)
    evaluate(out)
    assert asked == ["q2", "q3", "q4"]  # nothing is left to ask


def test_each_distinct_document_is_encoded_once_and_beside_others(
    evaluate: Evaluate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Documents of all questions and cells, in one forward pass here, since they are few."""
    calls: list[list[tuple[int, ...]]] = []
    encode = encodings.DocumentEncoder.encode
    monkeypatch.setattr(
        encodings.DocumentEncoder,
        "encode",
        lambda self, documents: (calls.append([tuple(d) for d in documents]), encode(self, documents))[1],
    )
    evaluate(tmp_path / "run")
    (batch,) = calls
    assert len(batch) == len(set(batch)) == 5


def test_memory_that_is_too_small_changes_nothing(tiny_model_dir: Path) -> None:
    """What had to be given up is encoded again, with the same documents beside it."""
    model = load_model(str(tiny_model_dir))
    documents = [bytes([65 + i, 0, 0, 0] * (3 + i)) for i in range(6)]
    large, small = (encodings.Encodings(model, most_bytes=size, max_batch_tokens=16) for size in (2**30, 1))
    for each in (large, small):
        each.plan(documents[:4])
        each.plan(documents[2:])
    for pair in ([0, 5], [5, 0], [1, 2], [0, 4], [3, 3]):
        for one, other in zip(*(e.caches([documents[i] for i in pair]) for e in (large, small)), strict=True):
            assert torch.equal(one.keys, other.keys)
            assert torch.equal(one.values, other.values)
    assert large.encoded == 6 < small.encoded


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_tokens": 7}, "max_tokens was 6 and is now 7"),
        ({"linkers": ["reposition"]}, "linkers was reposition, link-tokens, epic:k=2 and is now reposition"),
        ({"codecs": ["raw"]}, "codecs was raw, int8 and is now raw"),
        ({"template": "Q: {question}"}, r"template was '\{question\}' and is now 'Q: "),
        ({"system": "S"}, r"system\.small was '' and is now 'S'"),
        ({"follow": "reference"}, "follow was 'full' and is now 'reference'"),
    ],
)
def test_a_changed_run_is_refused_by_name(
    evaluate: Evaluate, tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    evaluate(tmp_path / "run")
    before = (tmp_path / "run/answers.jsonl").read_bytes()
    with pytest.raises(ConfigError, match=f"holds another run: {message}.*--out"):
        evaluate(tmp_path / "run", **changed)
    assert (tmp_path / "run/answers.jsonl").read_bytes() == before


def test_changed_data_and_models_are_refused_by_name(
    evaluate: Evaluate, tmp_path: Path, questions: Path, tiny_model_dir: Path
) -> None:
    evaluate(tmp_path / "run")
    text = questions.read_text()
    questions.write_text(text.replace("dog", "fox"))
    with pytest.raises(ConfigError, match=r"data\[0\]\.digest was"):
        evaluate(tmp_path / "run")
    questions.write_text("\n".join(text.splitlines()[:3]))
    with pytest.raises(ConfigError, match=r"data\[0\]\.questions was 5 and is now 3"):
        evaluate(tmp_path / "run")
    assert read_config(tmp_path / "run").models[0].source == str(tiny_model_dir)


def test_two_runs_do_not_write_into_one_folder(evaluate: Evaluate, tmp_path: Path) -> None:
    config = read_config(evaluate(tmp_path / "run"))
    with RunDirectory(tmp_path / "run", config), pytest.raises(ConfigError, match="another run is writing"):
        evaluate(tmp_path / "run")
    evaluate(tmp_path / "run")  # free again


def test_damage_in_the_middle_is_named_by_line(evaluate: Evaluate, tmp_path: Path) -> None:
    file = evaluate(tmp_path / "run") / "answers.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join([*lines[:9], b"{}\n", *lines[10:]]))
    with pytest.raises(ConfigError, match="line 10: not a row of a run"):
        evaluate(tmp_path / "run")
    file.write_bytes(b"".join([*lines[:9], *lines[10:]]))
    with pytest.raises(ConfigError, match=r"line 10: tiny/link-tokens/raw was not expected here"):
        read_rows(tmp_path / "run")


def test_a_question_that_does_not_fit_is_skipped_for_all_cells(
    evaluate: Evaluate, tmp_path: Path, questions: Path
) -> None:
    with questions.open("a") as file:
        file.write(json.dumps({"id": "long", "question": "q", "documents": [{"text": "x" * 2100}]}) + "\n")
    rows = [row for row in read_rows(evaluate(tmp_path / "run")) if row.id == "long"]
    assert {row.skipped for row in rows} == {"context_length_exceeded"}
    assert len(rows) == 7


def test_codecs_that_prune(evaluate: Evaluate, tmp_path: Path) -> None:
    """What keeps every token is the codec without pruning; linkers that compute tokens of documents have no slots."""
    codecs = ["raw", "raw:keep=1", "raw:keep=0.5,scorer=random"]
    rows = read_rows(evaluate(tmp_path / "run", linkers=["reposition", "epic:k=2"], codecs=codecs))
    for question in {row.id for row in rows}:
        found = {(row.linker, row.codec): row for row in rows if row.id == question}
        raw, whole, half = (found["reposition", codec] for codec in codecs)
        assert (raw.kl, raw.answer, raw.stored_bytes) == (whole.kl, whole.answer, whole.stored_bytes)
        assert half.kl != raw.kl
        assert 0.45 < half.stored_bytes / raw.stored_bytes < 0.85  # of few tokens; which ones are kept is stored, too
        assert found["epic:k=2", codecs[2]].skipped == "pruned_cache"
        assert found["epic:k=2", "raw"].skipped is None


def test_a_given_continuation_is_followed_and_needs_no_labels(
    evaluate: Evaluate, tmp_path: Path, tiny_model_dir: Path
) -> None:
    """Its likelihood under ``full`` is that of one plain pass over prompt and continuation."""
    row = {"id": "t", "question": "go on", "documents": [{"text": "one two"}], "continuation": "three"}
    (tmp_path / "text.jsonl").write_text(json.dumps(row))
    data = [str(tmp_path / "text.jsonl")]
    out = evaluate(tmp_path / "run", data=data, linkers=["reposition"], codecs=["raw"])
    full, other = read_rows(out)
    model = load_model(str(tiny_model_dir))
    layout = model.layout
    prompt = layout.build([Message("user", "go on")], [layout.document_tokens(Document("", "one two"))], links=None)
    ids = torch.cat([prompt.token_ids(), torch.tensor(layout.plain_tokens("three"))])
    with torch.inference_mode():
        logits = model.network(input_ids=ids[None], attention_mask=None).logits[0].float()
    losses = torch.nn.functional.cross_entropy(logits[prompt.length - 1 : -1], ids[prompt.length :], reduction="none")
    assert full.tokens == other.tokens == 5
    assert full.nll == pytest.approx(float(losses.mean()), rel=1e-4)
    assert (other.answer, dict(other.scores)) == (None, {})
    assert other.top1 is not None


def test_the_reference_can_be_followed(evaluate: Evaluate, tmp_path: Path) -> None:
    rows = read_rows(evaluate(tmp_path / "run", follow="reference", linkers=["reposition"], codecs=["raw"]))
    assert {row.tokens for row in rows} == {len("cat")}
    assert all(row.answer is not None for row in rows)
