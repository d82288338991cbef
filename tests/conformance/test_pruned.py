"""Pruned documents on architectures that rotate, mask or cache in ways of their own: exact, or refused by name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from kvlink_core.compress.pruning import take
from kvlink_core.conformance import oracle
from kvlink_core.conformance.check import TOLERANCE, loaded, prompt_of
from kvlink_core.conformance.tiny import tiny_model
from kvlink_core.conformance.walk import quiet
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import UnsupportedModelError
from kvlink_core.linking import get_linker
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.prompt import Prompt
from kvlink_core.types import DocumentCache

#: One of each kind. Of the 94 that are exact without pruning, 92 are with it; the other two are refused below.
NAMES = (
    "codegen", "deepseek_v2", "exaone4", "falcon", "gpt_neox", "gpt_oss", "gptj", "llama4_text", "nanochat",
    "persimmon", "smollm3",
)  # fmt: skip

#: What is left of each document of ``prompt_of``: in all layers and heads the same, so that the oracle can say it.
KEPT = ((0, 3, 4, 8, 10), (1, 2, 8), (0,), (2, 9, 10))


@pytest.fixture(autouse=True)
def still() -> Iterator[None]:
    with quiet():
        yield


def expected(prompt: Prompt, generated: list[int], patch: pytest.MonkeyPatch, lm: CausalLM) -> torch.Tensor:
    """DESIGN's oracle, told that tokens behind a document do not see what was taken from it."""
    length = prompt.length + len(generated)
    dropped, owner = torch.zeros(length, dtype=torch.bool), torch.full((length,), -1)
    for number, (segment, kept) in enumerate(zip(prompt.documents, KEPT, strict=True)):
        dropped[segment.start : segment.end] = True
        dropped[[segment.start + k for k in kept]] = False
        owner[segment.start : segment.end] = number
    hidden = dropped[None, :] & (owner[:, None] != owner[None, :])
    before = oracle._seen
    with patch.context() as patched:
        patched.setattr(oracle, "_seen", lambda *args: before(*args) & ~hidden)
        return oracle.oracle_logits(lm, prompt, generated, isolate=True)


@pytest.mark.parametrize("name", NAMES)
def test_pruned_documents_are_exact(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny_model(name)
    model = loaded(lm)
    for linker, links in (("reposition", 0), ("link-tokens", 2)):
        prompt = prompt_of(links=links)
        caches = DocumentEncoder(model).encode([list(s.token_ids) for s in prompt.documents])
        pruned = [left(cache, kept) for cache, kept in zip(caches, KEPT, strict=True)]
        linked = get_linker(linker).link(model, prompt, pruned, reserve=2)
        token_ids, positions = linked.token_ids[linked.pending], linked.pending
        generated: list[int] = []
        for step in range(2):
            ours = linked.compute(token_ids, positions)
            truth = expected(prompt, generated, monkeypatch, lm)
            assert float((ours - truth).abs().max() / truth.abs().max()) <= TOLERANCE
            assert int(ours.argmax()) == int(truth.argmax())
            generated.append(int(truth.argmax()))
            token_ids, positions = torch.tensor(generated[-1:]), torch.tensor([prompt.length + step])
        whole = oracle.oracle_logits(lm, prompt, [], isolate=True)
        first = expected(prompt, [], monkeypatch, lm)
        assert float((whole - first).abs().max() / first.abs().max()) > 10 * TOLERANCE


@pytest.mark.parametrize(("name", "says"), [("doge", "changes the mask"), ("gemma3n_text", "another layer's keys")])
def test_where_windows_cannot_be_told_apart_they_are_refused(name: str, says: str) -> None:
    model = loaded(tiny_model(name))
    prompt = prompt_of(links=0)
    caches = DocumentEncoder(model).encode([list(s.token_ids) for s in prompt.documents])
    pruned = [left(cache, kept) for cache, kept in zip(caches, KEPT, strict=True)]
    linked = get_linker("reposition").link(model, prompt, pruned, reserve=0)
    with pytest.raises(UnsupportedModelError, match=says):
        linked.compute(linked.token_ids[linked.pending], linked.pending)


def left(cache: DocumentCache, kept: tuple[int, ...]) -> DocumentCache:
    layers, heads = cache.keys.shape[:2]
    return take(cache, torch.tensor(kept).expand(layers, heads, len(kept)))
