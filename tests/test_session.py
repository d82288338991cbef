"""A question from documents to an answer, with and without a store, sound and damaged."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from oracles import greedy

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import (
    DocumentLostError,
    DuplicateDocumentError,
    EmptyDocumentError,
    EmptyQuestionError,
    PromptTooLongError,
    SamplingError,
    UnknownDocumentError,
    UnknownLinkerError,
)
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentRef, Message

ASK = [Message("user", "Where?")]
TEXTS = {"a": "Maria Lopez was born in Lima.", "b": "She moved to Oslo.", "c": "Nobody knows."}
GREEDY = SamplingParams(max_tokens=8)


@pytest.fixture
def store(tiny_model: LoadedModel, tmp_path: Path) -> DocumentStore:
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint, create=True)
    tokens = [tiny_model.layout.document_tokens(Document(i, t)) for i, t in TEXTS.items()]
    store.commit(store.write_shard(list(zip(TEXTS, DocumentEncoder(tiny_model).encode(tokens), strict=True))))
    return store


def expected(model: LoadedModel, ids: list[str], linker: str) -> str:
    documents = [model.layout.document_tokens(Document(i, TEXTS[i])) for i in ids]
    links = model.layout.link_tokens if linker == "link-tokens" else None
    prompt = model.layout.build(ASK, documents, links=links)
    tokens, _ = greedy(model.network, prompt, GREEDY.max_tokens, isolate=linker != "full")
    if end := [i for i, t in enumerate(tokens) if t in model.stop_ids]:
        tokens = tokens[: end[0]]
    return model.layout.decode(tokens)


@pytest.mark.parametrize("linker", ["full", "reposition", "link-tokens"])
def test_stored_sent_and_mixed_documents_give_the_oracles_answer(
    tiny_model: LoadedModel, store: DocumentStore, linker: str
) -> None:
    session = Session(tiny_model, store)
    ids = ["b", "a", "b"]
    by_id = [DocumentRef(i) for i in ids]
    as_text = [Document("", TEXTS[i]) for i in ids]
    mixed = [DocumentRef("b"), Document("new", TEXTS["a"]), DocumentRef("b")]
    answers = {session.start(AnswerRequest(ASK, d, linker, GREEDY)).text() for d in (by_id, as_text, mixed)}
    assert answers == {expected(tiny_model, ids, linker)}


def test_usage_counts(tiny_model: LoadedModel, store: DocumentStore) -> None:
    session = Session(tiny_model, store)
    lengths = {i: len(tiny_model.layout.document_tokens(Document(i, t))) for i, t in TEXTS.items()}
    request = AnswerRequest(ASK, [DocumentRef("a"), Document("x", "Not in the store.")], "link-tokens", GREEDY)
    answer = session.start(request)
    new = len(tiny_model.layout.document_tokens(Document("x", "Not in the store.")))
    other = answer.usage.prompt_tokens - lengths["a"] - new  # prefix, mem, links, suffix
    assert answer.usage.cached_tokens == lengths["a"]
    assert answer.usage.computed_tokens == new + other
    assert [(d.id, d.origin) for d in answer.documents] == [("a", "store"), ("x", "encoded")]
    answer.text()
    assert answer.usage.completion_tokens == 8
    full = session.start(AnswerRequest(ASK, [DocumentRef("a")], "full", GREEDY))
    assert full.usage.cached_tokens == 0
    assert full.usage.computed_tokens == full.usage.prompt_tokens
    assert session.counters.as_dict() == {
        "documents_hit": 1, "documents_encoded": 1, "corrupt_payloads": 0,
        "requested_tokens": lengths["a"] + new, "hit_tokens": lengths["a"],
    }  # fmt: skip


def test_flipped_bytes_are_noticed_recomputed_counted_and_logged(
    tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (shard,) = (tmp_path / "store").rglob("shards/*.parquet")
    content = bytearray(shard.read_bytes())
    # The middle half is payload: every document there is hit.
    for at in range(len(content) // 4, 3 * len(content) // 4, 97):
        content[at] ^= 0x40
    shard.chmod(0o644)
    shard.write_bytes(content)
    fresh = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint)
    session = Session(tiny_model, fresh)
    with caplog.at_level(logging.WARNING):
        answer = session.start(AnswerRequest(ASK, [DocumentRef(i) for i in "abc"], "link-tokens", GREEDY))
    assert answer.text() == expected(tiny_model, ["a", "b", "c"], "link-tokens")
    damaged = [d for d in answer.documents if d.origin == "reencoded-corrupt"]
    assert damaged
    assert session.counters.corrupt_payloads == len(damaged)
    assert f"document {damaged[0].id!r}: stored payload refused" in caplog.text


def test_a_shard_that_is_gone_is_recomputed_from_its_tokens(
    tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path
) -> None:
    for shard in (tmp_path / "store").rglob("shards/*.parquet"):
        shard.unlink()
    fresh = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint)
    answer = Session(tiny_model, fresh).start(AnswerRequest(ASK, [DocumentRef("a")], "reposition", GREEDY))
    assert answer.documents[0].origin == "reencoded-corrupt"
    assert answer.text() == expected(tiny_model, ["a"], "reposition")


def test_a_document_whose_tokens_are_gone_too_is_named(
    tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path
) -> None:
    for file in [*(tmp_path / "store").rglob("shards/*"), *(tmp_path / "store").rglob("tokens/*")]:
        file.unlink()
    session = Session(tiny_model, DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint))
    with pytest.raises(DocumentLostError, match=r"'a'.*run precompute"):
        session.start(AnswerRequest(ASK, [DocumentRef("a")], "reposition", GREEDY))
    sent = session.start(AnswerRequest(ASK, [Document("a", TEXTS["a"])], "reposition", GREEDY))
    assert sent.text() == expected(tiny_model, ["a"], "reposition")


def test_documents_committed_later_are_found_without_a_restart(
    tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path
) -> None:
    session = Session(tiny_model, DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint))
    session._resolver._refresh_after = 0
    request = AnswerRequest(ASK, [DocumentRef("late")], "reposition", GREEDY)
    with pytest.raises(UnknownDocumentError):
        session.validate(request)
    tokens = tiny_model.layout.document_tokens(Document("late", "Better late."))
    store.commit(store.write_shard([("late", DocumentEncoder(tiny_model).encode([tokens])[0])]))
    assert session.start(request).documents[0].origin == "store"


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (AnswerRequest(ASK, [DocumentRef("zz"), DocumentRef("a")]), UnknownDocumentError, "'zz'"),
        (AnswerRequest(ASK, [Document("x", " ")]), EmptyDocumentError, "'x'"),
        (AnswerRequest([Message("user", " ")]), EmptyQuestionError, "ask something"),
        (AnswerRequest(ASK, linker="glue"), UnknownLinkerError, "'glue'"),
        (AnswerRequest(ASK, sampling=SamplingParams(top_p=2)), SamplingError, "top_p"),
        (AnswerRequest(ASK, [Document("x", "one"), Document("x", "two")]), DuplicateDocumentError, "'x'"),
        (AnswerRequest(ASK, [Document("x", "word " * 500)]), PromptTooLongError, r"\d{4} tokens.*2048"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(
    tiny_model: LoadedModel, store: DocumentStore, request_: AnswerRequest, error: type[Exception], match: str
) -> None:
    session = Session(tiny_model, store)
    for attempt in (session.validate, session.start):
        with pytest.raises(error, match=match):
            attempt(request_)
    assert session.counters.as_dict() == dict.fromkeys(session.counters.as_dict(), 0)


def test_an_answer_ends_where_the_context_ends(tiny_model: LoadedModel) -> None:
    tokens = tiny_model.context_length - 40
    request = AnswerRequest(ASK, [Document("x", "y" * tokens)], "reposition", SamplingParams(max_tokens=100))
    answer = Session(tiny_model).start(request)
    events = list(answer)
    if events[-1].finish_reason == "length":
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens == tiny_model.context_length
    else:
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens < tiny_model.context_length


def test_stop_strings_and_seeds_reach_the_engine(tiny_model: LoadedModel) -> None:
    session = Session(tiny_model)

    def run(**sampling: object) -> str:
        params = SamplingParams(max_tokens=30, **sampling)  # type: ignore[arg-type]  # one test's keywords
        return session.start(AnswerRequest(ASK, [], None, params)).text()

    whole = run(temperature=1.0, seed=3)
    assert run(temperature=1.0, seed=3) == whole
    assert len(whole) > 5
    assert run(temperature=1.0, seed=3, stop=(whole[3:5],)) == whole[: whole.index(whole[3:5])]
