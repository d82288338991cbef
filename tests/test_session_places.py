"""Documents of several turns, and caches that are good for one place of a prompt only."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from oracles import greedy
from tiny import byte_tokenizer

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import DocumentPlaceError, UnknownDocumentError
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import PromptLayout
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.template import DocumentTemplate
from kvlink_core.types import Document, DocumentRef, Message

ASK = [Message("user", "Where?")]
TEXTS = {"a": "Maria Lopez was born in Lima.", "b": "She moved to Oslo.", "c": "Nobody knows."}
GREEDY = SamplingParams(max_tokens=8)


@pytest.fixture
def store(tiny_model: LoadedModel, tmp_path: Path) -> DocumentStore:
    return at_places(tiny_model, tmp_path / "store", {i: (text, 0) for i, text in TEXTS.items()})


@pytest.mark.parametrize("linker", ["full", "reposition", "link-tokens"])
def test_documents_of_several_turns_give_the_oracles_answer(
    tiny_model: LoadedModel, store: DocumentStore, linker: str
) -> None:
    """Two groups, the same document in both: stored, sent as text, and sent with the request."""
    first, second = [DocumentRef("a"), Document("new", "Oslo is far.")], [DocumentRef("b"), Document("", TEXTS["a"])]
    turns = [Message("user", "Who?", first), Message("assistant", "Maria."), Message("user", "Where?", second)]
    plain = [Message(t.role, t.content, t.documents if t.content == "Who?" else ()) for t in turns]
    layout = tiny_model.layout
    texts = [TEXTS["a"], "Oslo is far.", TEXTS["b"], TEXTS["a"]]
    documents = [layout.document_tokens(Document("", text)) for text in texts]
    prompt = layout.build(turns, documents, links=layout.link_tokens if linker == "link-tokens" else None)
    assert [s.kind for s in prompt.segments].count("mem_start") == 2
    tokens, _ = greedy(tiny_model.network, prompt, GREEDY.max_tokens, isolate=linker != "full")
    endless = dataclasses.replace(tiny_model, stop_ids=frozenset())
    session = Session(endless, store)
    for request in (AnswerRequest(turns, (), linker, GREEDY), AnswerRequest(plain, second, linker, GREEDY)):
        answer = session.start(request)
        assert [d.id for d in answer.documents] == ["a", "new", "b", None]
        assert [t for event in answer for t in event.token_ids] == tokens
    if linker != "full":
        assert [d.origin for d in answer.documents] == ["store", "encoded", "store", "store"]


# Templates that name the place.


@pytest.fixture
def placed(tiny_model: LoadedModel) -> LoadedModel:
    """The model with a template that names the place."""
    layout = PromptLayout(
        byte_tokenizer(), template=DocumentTemplate("[{place}] {text};", "[{place}] {title}: {text};")
    )
    return dataclasses.replace(tiny_model, description=dataclasses.replace(tiny_model.description, layout=layout))


def at_places(model: LoadedModel, path: Path, ids: dict[str, tuple[str, int]]) -> DocumentStore:
    """A store of texts as rendered at a place, by the id they are stored under."""
    store = DocumentStore.open(str(path), fingerprint=model.fingerprint, create=True)
    tokens = [model.layout.document_tokens(Document("", text), place) for text, place in ids.values()]
    store.commit(store.write_shard(list(zip(ids, DocumentEncoder(model).encode(tokens), strict=True))))
    return store


def test_a_template_with_places_takes_from_the_store_what_was_made_for_the_place(
    placed: LoadedModel, tmp_path: Path
) -> None:
    layout = placed.layout
    store = at_places(placed, tmp_path / "store", {f"{i}@{p}": (TEXTS[i], p) for i in "ab" for p in range(2)})
    documents = [layout.document_tokens(Document("", TEXTS[i]), p) for p, i in enumerate("ba")]
    tokens, _ = greedy(placed.network, layout.build(ASK, documents, links=None), GREEDY.max_tokens, isolate=True)
    session = Session(dataclasses.replace(placed, stop_ids=frozenset()), store)
    for sent in ([DocumentRef("b"), DocumentRef("a")], [Document("b", TEXTS["b"]), Document("", TEXTS["a"])]):
        answer = session.start(AnswerRequest(ASK, sent, "reposition", GREEDY))
        assert [d.origin for d in answer.documents] == ["store", "store"]
        assert [t for event in answer for t in event.token_ids] == tokens
    twice = [Document("a", TEXTS["a"])] * 3
    answer = session.start(AnswerRequest(ASK, twice, "reposition", GREEDY))
    assert [d.origin for d in answer.documents] == ["store", "store", "encoded"]


@pytest.mark.parametrize(
    ("stored", "place"), [("a@0", 1), ("a@0", 2), ("a", 0)], ids=["next place", "later place", "without a place"]
)
def test_a_document_stored_for_another_place_is_not_served_by_id(
    placed: LoadedModel, tmp_path: Path, stored: str, place: int
) -> None:
    session = Session(placed, at_places(placed, tmp_path / "store", {stored: (TEXTS["a"], 0)}))
    before = [Document("", "x")] * place
    with pytest.raises(DocumentPlaceError, match=rf"'a' is not stored for place {place} .*more --places"):
        session.start(AnswerRequest(ASK, [*before, DocumentRef("a")], "reposition", GREEDY))
    with pytest.raises(UnknownDocumentError, match="no such document in the store: 'zz'"):
        session.start(AnswerRequest(ASK, [*before, DocumentRef("a"), DocumentRef("zz")], "reposition", GREEDY))
