"""A question from documents to an answer, with and without a store, sound and damaged."""

from __future__ import annotations

import dataclasses
import logging
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from oracles import greedy

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import (
    DocumentLostError,
    DuplicateDocumentError,
    EmptyDocumentError,
    EmptyQuestionError,
    MisplacedDocumentsError,
    PromptTooLongError,
    SamplingError,
    StoreUnavailableError,
    UnknownDocumentError,
    UnknownLinkerError,
)
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentCache, DocumentRef, Message

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
        "hit_tokens_device": 0, "hit_tokens_host": 0, "hit_tokens_disk": 0, "hit_tokens_store": lengths["a"],
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
    with pytest.raises(DocumentLostError, match=r"'a'.*precompute on it with --replace"):
        session.start(AnswerRequest(ASK, [DocumentRef("a")], "reposition", GREEDY))
    sent = session.start(AnswerRequest(ASK, [Document("a", TEXTS["a"])], "reposition", GREEDY))
    assert sent.text() == expected(tiny_model, ["a"], "reposition")


def test_documents_added_and_replaced_are_seen_without_a_restart(
    tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path
) -> None:
    session = Session(tiny_model, DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint))
    session._resolver._refresh_after = 0
    request = AnswerRequest(ASK, [DocumentRef("late")], "reposition", GREEDY)
    with pytest.raises(UnknownDocumentError):
        session.start(request)
    for text in ("Better late.", "Better late than never."):
        tokens = tiny_model.layout.document_tokens(Document("late", text))
        store.commit(store.write_shard([("late", DocumentEncoder(tiny_model).encode([tokens])[0])]))
        answer = session.start(request)
        assert [(d.origin, d.tokens) for d in answer.documents] == [("store", len(tokens))]


def test_a_store_that_cannot_be_refreshed_still_serves_what_is_known(
    tiny_model: LoadedModel, store: DocumentStore, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def away() -> bool:
        raise StoreUnavailableError("the store is away")

    monkeypatch.setattr(store, "refresh", away)
    session = Session(tiny_model, store)
    session._resolver._refresh_after = 0
    answer = session.start(AnswerRequest(ASK, [DocumentRef("a")], "reposition", GREEDY))
    assert answer.text() == expected(tiny_model, ["a"], "reposition")
    assert "the store is away" in caplog.text


def test_a_store_that_does_not_answer_costs_time_where_the_text_is_known_and_is_said_where_not(
    tiny_model: LoadedModel, store: DocumentStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    def away(_: object) -> list[DocumentCache]:
        raise StoreUnavailableError("the store is away")

    monkeypatch.setattr(store, "load", away)
    monkeypatch.setattr(store, "token_ids", away)
    session = Session(tiny_model, store)
    answer = session.start(AnswerRequest(ASK, [Document("a", TEXTS["a"])], "reposition", GREEDY))
    assert answer.text() == expected(tiny_model, ["a"], "reposition")
    assert answer.documents[0].origin == "encoded"
    assert session.counters.corrupt_payloads == 0
    with pytest.raises(StoreUnavailableError):
        session.start(AnswerRequest(ASK, [DocumentRef("a")], "reposition", GREEDY))


def test_a_document_stored_in_chunks_is_explained(tiny_model: LoadedModel, store: DocumentStore) -> None:
    tokens = tiny_model.layout.document_tokens(Document("long#0", "The first part."))
    store.commit(store.write_shard([("long#0", DocumentEncoder(tiny_model).encode([tokens])[0])]))
    with pytest.raises(UnknownDocumentError, match="chunks: ask for 'long#0'"):
        Session(tiny_model, store).start(AnswerRequest(ASK, [DocumentRef("long")]))


def test_a_payload_of_another_shape_is_refused_and_recomputed(
    tiny_model: LoadedModel, store: DocumentStore, caplog: pytest.LogCaptureFixture
) -> None:
    """Written under this model's fingerprint by a faulty program; broadcasting would have hidden it."""
    tokens = torch.tensor(tiny_model.layout.document_tokens(Document("odd", "Odd.")))
    small = torch.ones(1, 1, len(tokens), 1)
    store.commit(store.write_shard([("odd", DocumentCache(tokens, small, small))]))
    answer = Session(tiny_model, store).start(AnswerRequest(ASK, [DocumentRef("odd")], "reposition", GREEDY))
    sent = Session(tiny_model).start(AnswerRequest(ASK, [Document("odd", "Odd.")], "reposition", GREEDY))
    assert answer.documents[0].origin == "reencoded-corrupt"
    assert answer.text() == sent.text()
    assert "payload_foreign" in caplog.text


def test_eight_threads_get_the_answers_of_one(tiny_model: LoadedModel, store: DocumentStore) -> None:
    """Encoding, loading and generating at the same time must not mix: captures and tokenizers are shared."""
    session = Session(tiny_model, store)
    requests = [
        AnswerRequest(ASK, [DocumentRef("a"), Document("", f"Number {i % 4}.")], linker, GREEDY)
        for i in range(12)
        for linker in ("full", "link-tokens")
    ]
    alone = [session.start(r).text() for r in requests]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda r: session.start(r).text(), requests))
    assert together == alone
    assert len(set(alone)) > 4


@pytest.mark.parametrize(
    ("request_", "error", "match"),
    [
        (AnswerRequest(ASK, [DocumentRef("zz"), DocumentRef("a")]), UnknownDocumentError, "'zz'"),
        (AnswerRequest(ASK, [Document("x", " ")]), EmptyDocumentError, "'x'"),
        (AnswerRequest([Message("user", " ")]), EmptyQuestionError, "ask something"),
        (AnswerRequest(ASK, linker="glue"), UnknownLinkerError, "'glue'"),
        (AnswerRequest(ASK, sampling=SamplingParams(top_p=2)), SamplingError, "top_p"),
        (AnswerRequest(ASK, [Document("x", "one"), Document("x", "two")]), DuplicateDocumentError, "'x'"),
        (AnswerRequest([Message("user", "x", [DocumentRef("zz")]), *ASK]), UnknownDocumentError, "'zz'"),
        (AnswerRequest([Message("user", "x", [Document("x", "")]), *ASK]), EmptyDocumentError, "'x'"),
        (AnswerRequest([Message("system", "x", [DocumentRef("a")]), *ASK]), MisplacedDocumentsError, "message 0"),
        (
            AnswerRequest([Message("user", "x", [Document("x", "one")]), *ASK], [Document("x", "two")]),
            DuplicateDocumentError,
            "'x'",
        ),
        (AnswerRequest(ASK, [Document("x", "word " * 500)]), PromptTooLongError, r"\d{4} tokens.*2048"),
    ],
)
def test_bad_requests_are_refused_before_anything_is_computed(
    tiny_model: LoadedModel, store: DocumentStore, request_: AnswerRequest, error: type[Exception], match: str
) -> None:
    session = Session(tiny_model, store)
    with pytest.raises(error, match=match):
        session.start(request_)
    assert session.counters.as_dict() == dict.fromkeys(session.counters.as_dict(), 0)


def test_an_answer_ends_where_the_context_ends(tiny_model: LoadedModel) -> None:
    endless = dataclasses.replace(tiny_model, stop_ids=frozenset())
    tokens = tiny_model.context_length - 40
    request = AnswerRequest(ASK, [Document("x", "y" * tokens)], "reposition", SamplingParams(max_tokens=100))
    answer = Session(endless).start(request)
    assert list(answer)[-1].finish_reason == "length"
    assert answer.usage.prompt_tokens + answer.usage.completion_tokens == tiny_model.context_length


def test_stop_strings_and_seeds_reach_the_engine(tiny_model: LoadedModel) -> None:
    session = Session(tiny_model)

    def run(**sampling: object) -> str:
        params = SamplingParams(max_tokens=30, **sampling)  # type: ignore[arg-type]  # one test's keywords
        return session.start(AnswerRequest(ASK, [], None, params)).text()

    whole = run(temperature=1.0, seed=3)
    assert run(temperature=1.0, seed=3) == whole
    assert len(whole) > 5
    assert run(temperature=1.0, seed=3, stop=(whole[3:5],)) == whole[: whole.index(whole[3:5])]
