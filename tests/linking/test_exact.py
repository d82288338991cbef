"""Every linker, on every supported architecture and RoPE kind, against the oracle in float32."""

from __future__ import annotations

import pytest
import torch
from oracles import greedy
from tiny import save_tiny, tiny_configs

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.engine.generate import Generation
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.prompt import Prompt, Segment
from kvlink_core.types import Document, Message

DOCUMENTS = [
    Document("a", "Maria Lopez was born in Lima."),
    Document("b", "She moved to Oslo in 1998.", title="Maria"),
    Document("c", "!"),
    Document("a again", "Maria Lopez was born in Lima."),
]
QUESTION = [Message("system", "Answer briefly."), Message("user", "Where does Maria live?")]


@pytest.fixture(scope="module", params=sorted(tiny_configs()))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config = tiny_configs()[request.param]
    return load_model(str(save_tiny(tmp_path_factory.mktemp(request.param), config)))


@pytest.mark.parametrize("name", ["full", "reposition", "link-tokens"])
def test_linked_path_equals_the_oracle(model: LoadedModel, name: str) -> None:
    linker = get_linker(name)
    documents = [model.layout.document_tokens(d) for d in DOCUMENTS]
    prompt = model.layout.build(QUESTION, documents, links=linker.links(model.layout))
    caches = DocumentEncoder(model, max_batch_tokens=64).encode(documents)
    steps = 6
    expected_tokens, expected_logits = greedy(model.network, prompt, steps, isolate=name != "full")

    linked = linker.link(model, prompt, caches if linker.uses_caches else [], reserve=steps)
    token_ids, positions = linked.token_ids[linked.pending], linked.pending
    tokens: list[int] = []
    for expected in expected_logits:
        logits = linked.compute(token_ids, positions)
        error = float((logits - expected).abs().max() / expected.abs().max())
        assert error <= 1e-5
        tokens.append(int(logits.argmax()))
        token_ids, positions = torch.tensor(tokens[-1:]), torch.tensor([prompt.length + len(tokens) - 1])
    assert tokens == expected_tokens


def test_isolation_changes_the_logits(model: LoadedModel) -> None:
    """The oracle can tell linkers apart: otherwise the test above would prove nothing."""
    # A short question and a short last document: through windows of 7 and 9 little else can be seen at all.
    documents = [model.layout.document_tokens(d) for d in DOCUMENTS[:3]]
    prompt = model.layout.build([Message("user", "Who?")], documents, links=None)
    (_, isolated), (_, joint) = (greedy(model.network, prompt, 1, isolate=i) for i in (True, False))
    assert float((isolated[0] - joint[0]).abs().max() / joint[0].abs().max()) > 1e-2


def test_one_document_without_prefix_or_links_is_prefix_caching(model: LoadedModel) -> None:
    """First identity of DESIGN section 3: nothing stands before the document, so reuse must equal full prefill."""
    document = model.layout.document_tokens(DOCUMENTS[0])
    suffix = model.layout.plain_tokens("Where?")
    prompt = Prompt(
        (
            Segment("document", tuple(document), 0, 0),
            Segment("suffix", tuple(suffix), len(document)),
        )
    )
    reposition, full = get_linker("reposition"), get_linker("full")
    caches = DocumentEncoder(model).encode([document])
    reused = reposition.link(model, prompt, caches, reserve=1)
    computed = full.link(model, prompt, [], reserve=1)
    ours = reused.compute(reused.token_ids[reused.pending], reused.pending)
    theirs = computed.compute(computed.token_ids, computed.pending)
    assert reused.computed_tokens == len(suffix)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5


def test_generation_follows_the_oracle(model: LoadedModel) -> None:
    linker = get_linker("link-tokens")
    documents = [model.layout.document_tokens(d) for d in DOCUMENTS[:2]]
    prompt = model.layout.build(QUESTION, documents, links=linker.links(model.layout))
    expected, _ = greedy(model.network, prompt, 5, isolate=True)
    caches = DocumentEncoder(model).encode(documents)
    linked = linker.link(model, prompt, caches, reserve=5)
    events = list(Generation(linked, SamplingParams(), max_tokens=5, stop_ids=frozenset()))
    assert [t for e in events for t in e.token_ids] == expected
    assert events[-1].finish_reason == "length"
