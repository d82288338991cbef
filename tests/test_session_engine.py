"""What a session prepares for an engine: the same answers, usage and origins as it gives itself."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Engine, EngineSettings, Generated, SamplingParams
from kvlink_core.errors import PromptTooLongError, UnknownDocumentError
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentRef, Message

TEXTS = {"a": "Maria Lopez was born in Lima.", "b": "She moved to Oslo."}
SAMPLING = SamplingParams(temperature=0.9, seed=4, max_tokens=7)


@pytest.fixture
def store(tiny_model: LoadedModel, tmp_path: Path) -> DocumentStore:
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint, create=True)
    tokens = [tiny_model.layout.document_tokens(Document(i, t)) for i, t in TEXTS.items()]
    store.commit(store.write_shard(list(zip(TEXTS, DocumentEncoder(tiny_model).encode(tokens), strict=True))))
    return store


def asked(linker: str) -> AnswerRequest:
    documents = [DocumentRef("b"), Document("new", "Nobody knows."), DocumentRef("a"), Document("", TEXTS["a"])]
    return AnswerRequest([Message("user", "Where?")], documents, linker, SAMPLING)


@pytest.mark.parametrize("linker", ["link-tokens", "full", "epic:k=2"])
def test_an_engine_answers_what_a_session_answers(tiny_model: LoadedModel, store: DocumentStore, linker: str) -> None:
    session = Session(tiny_model, store)
    answer = session.start(asked(linker))
    text = answer.text()
    counted = session.counters.as_dict()
    prepared = session.prepare(asked(linker))
    engine = Engine(tiny_model, EngineSettings(step_tokens=16, mode="shared"))
    handle = engine.submit(prepared.request)
    events = []
    while engine.busy:
        events += [e.event for e in engine.step() if isinstance(e, Generated)]
    assert "".join(event.text for event in events) == text
    assert prepared.documents == answer.documents
    usage = answer.usage
    assert handle.prompt_tokens == usage.prompt_tokens
    assert prepared.cached_tokens == usage.cached_tokens
    assert handle.computed_tokens == usage.computed_tokens
    assert handle.completion_tokens == usage.completion_tokens
    assert session.counters.as_dict() == {name: 2 * count for name, count in counted.items()}


def test_a_damaged_payload_is_left_to_the_engine(tiny_model: LoadedModel, store: DocumentStore, tmp_path: Path) -> None:
    for shard in (tmp_path / "store").rglob("shards/*.parquet"):
        shard.unlink()
    fresh = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint)
    session = Session(tiny_model, fresh)
    prepared = session.prepare(asked("link-tokens"))
    assert list(prepared.request.caches) == [None] * 4
    assert [d.origin for d in prepared.documents] == [
        "reencoded-corrupt", "encoded", "reencoded-corrupt", "reencoded-corrupt",
    ]  # fmt: skip
    assert [d.tokens for d in prepared.documents] == [s.end - s.start for s in prepared.request.prompt.documents]
    assert session.counters.corrupt_payloads == 2


def test_what_cannot_be_is_refused_before_the_engine(tiny_model: LoadedModel, store: DocumentStore) -> None:
    session = Session(tiny_model, store)
    with pytest.raises(UnknownDocumentError):
        session.prepare(dataclasses.replace(asked("full"), documents=[DocumentRef("no such")]))
    with pytest.raises(PromptTooLongError):
        session.prepare(dataclasses.replace(asked("full"), documents=[Document("", "x" * 3000)]))


def test_sessions_without_a_store_share_nothing_in_an_engine(tiny_model: LoadedModel, store: DocumentStore) -> None:
    first, second = (Session(tiny_model).prepare(asked_as_text()) for _ in range(2))
    assert first.request.namespace != second.request.namespace
    assert Session(tiny_model, store).prepare(asked("full")).request.namespace == "default"


def asked_as_text() -> AnswerRequest:
    return AnswerRequest([Message("user", "Where?")], [Document("", TEXTS["a"])], "link-tokens", SAMPLING)
