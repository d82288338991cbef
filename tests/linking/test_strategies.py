"""Every strategy against an oracle of its own, over architectures, at the edges of its parameters."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from oracles import blended, cached, document_slots, greedy_blended
from strategies import DOCUMENTS, difference, follow, linked_by, logits_of, prompt_for, tokens
from tiny import save_tiny, tiny_configs

from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import ConfigError, EmptyDocumentError
from kvlink_core.linking import LinkedCache, get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.prompt import Prompt

#: RoPE of a kind with a factor on attention, windows in some layers, soft-capping, latent attention with experts.
ARCHITECTURES = ("llama", "llama-yarn", "qwen3-window", "gemma2", "deepseek_v3")
LAYERS = 4
STEPS = 4

Stale = Callable[[int], set[int]]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config = tiny_configs(layers=LAYERS)[request.param]
    return load_model(str(save_tiny(tmp_path_factory.mktemp(request.param), config)))


def stale_for(prompt: Prompt, spec: str, linked: LinkedCache) -> Stale:
    """The definition of each strategy: which document tokens are, in which layer, as their document has them alone."""
    documents = document_slots(prompt)
    name, _, rest = spec.partition(":")
    given = dict(part.split("=") for part in rest.split(",") if part)
    if name == "full":
        return lambda layer: set()
    if name == "epic":
        return lambda layer: documents - document_slots(prompt, int(given.get("k", 16)))
    if name == "cacheblend":
        # Which ones it chose is judged in a test of its own.
        kept = documents - set(linked.pending.tolist())
        return lambda layer: kept if layer > int(given.get("layer", 1)) else set()
    return lambda layer: documents


@pytest.mark.parametrize(
    "spec",
    [
        "full",
        "concat",
        "reposition",
        "link-tokens",
        "link-tokens:k=1",
        "epic",
        "epic:k=0",
        "epic:k=1",
        "epic:k=11",
        "epic:k=23",
        "cacheblend",
        "cacheblend:ratio=0",
        "cacheblend:ratio=0.5,layer=2",
        "cacheblend:ratio=0.9",
        "cacheblend:ratio=1",
    ],
)
def test_each_strategy_follows_its_oracle(model: LoadedModel, spec: str) -> None:
    prompt = prompt_for(model, spec)
    linked = linked_by(model, spec, prompt, reserve=STEPS)
    stale = stale_for(prompt, spec, linked)
    follow(linked, greedy_blended(model.network, prompt, STEPS, stale=stale, local=spec == "concat"))


def test_the_oracles_differ(model: LoadedModel) -> None:
    """Else the test above could not tell one strategy from another."""
    prompt = prompt_for(model, "reposition")
    documents, beginnings = document_slots(prompt), document_slots(prompt, 3)
    found = [
        blended(model.network, prompt, [], stale=lambda layer: set()),
        blended(model.network, prompt, [], stale=lambda layer: documents),
        blended(model.network, prompt, [], stale=lambda layer: documents, local=True),
        blended(model.network, prompt, [], stale=lambda layer: documents - beginnings),
        blended(model.network, prompt, [], stale=lambda layer: documents if layer > 1 else set()),
        blended(model.network, prompt, [], stale=lambda layer: documents - beginnings if layer > 1 else set()),
    ]
    for i, one in enumerate(found):
        for other in found[:i]:
            assert difference(one, other) > 1e-3


@pytest.mark.parametrize(
    ("spec", "same"),
    [
        ("epic:k=23", "full"),
        ("epic:k=1000", "full"),
        ("epic:k=0", "reposition"),
        ("cacheblend:ratio=1", "full"),
        ("cacheblend:ratio=1,layer=3", "full"),
        # The last layer is among the first layers: nothing cached is left.
        ("cacheblend:ratio=0,layer=3", "full"),
    ],
)
def test_identities(model: LoadedModel, spec: str, same: str) -> None:
    prompt = prompt_for(model, spec)
    ours, theirs = (logits_of(linked_by(model, s, prompt)) for s in (spec, same))
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize("spec", ["concat", "epic:k=4", "cacheblend:ratio=0.5", "cacheblend"])
def test_one_document_with_nothing_before_it_is_prefix_caching(model: LoadedModel, spec: str) -> None:
    """Alone at the start a document has what full prefill gives it, wherever and however much of it is computed."""
    built = prompt_for(model, spec, DOCUMENTS[:1])
    first = built.documents[0].start
    prompt = Prompt(tuple(replace(s, start=s.start - first) for s in built.segments if s.start >= first))
    ours, theirs = (logits_of(linked_by(model, s, prompt)) for s in (spec, "full"))
    assert difference(ours, theirs) <= 1e-5


@pytest.mark.parametrize(("ratio", "layer"), [(0.15, 1), (0.5, 1), (0.5, 2), (0.02, 3)])
def test_cacheblend_chooses_the_tokens_that_deviate_most(model: LoadedModel, ratio: float, layer: int) -> None:
    """By two passes of transformers, with and without isolation, and a plain sort."""
    prompt = prompt_for(model, "cacheblend")
    linked = linked_by(model, f"cacheblend:ratio={ratio},layer={layer}", prompt)
    joint, alone = (cached(model.network, prompt, isolate=isolate).layers[layer] for isolate in (False, True))
    latent = model.network.config.model_type == "deepseek_v3"  # its "values" are keys, and rotated
    pairs = (joint.keys, alone.keys) if latent else (joint.values, alone.values)
    deviation = {
        slot: sum(float((a - b) ** 2) for a, b in zip(*(p[0, :, slot].flatten() for p in pairs), strict=True))
        for slot in document_slots(prompt)
    }
    chosen = set(linked.pending.tolist()) & set(deviation)
    assert len(chosen) == round(ratio * len(deviation))
    best = sorted(deviation.values(), reverse=True)[: len(chosen)]
    assert sum(deviation[slot] for slot in chosen) == pytest.approx(sum(best), rel=1e-4)


def test_first_layers_are_those_of_full_prefill_and_stay_so(model: LoadedModel) -> None:
    prompt = prompt_for(model, "cacheblend")
    linked = linked_by(model, "cacheblend:ratio=0.3,layer=2", prompt)
    truth = cached(model.network, prompt, isolate=False)
    for _ in ("before", "after"):
        for layer in range(3):
            for ours, theirs in ((linked.keys, truth.layers[layer].keys), (linked.values, truth.layers[layer].values)):
                assert float((ours[layer, :, : prompt.length] - theirs[0]).abs().max()) < 1e-4
        logits_of(linked)


def test_computed_tokens(model: LoadedModel) -> None:
    prompt = prompt_for(model, "reposition")
    documents = sum(len(d) for d in DOCUMENTS)
    other = prompt.length - documents
    expected = {
        "full": prompt.length,
        "concat": other,
        "reposition": other,
        "epic": other + 16 + 11 + 1 + 16 + 4,
        "epic:k=0": other,
        "epic:k=2": other + 2 + 2 + 1 + 2 + 2,
        "epic:k=99": prompt.length,
        # two of four layers for the whole prompt
        "cacheblend:ratio=0.5": other + documents // 2 + math.ceil(prompt.length / 2),
        "cacheblend:ratio=0,layer=2": other + math.ceil(prompt.length * 3 / 4),
        "cacheblend:ratio=1": prompt.length + math.ceil(prompt.length / 2),
    }
    assert {spec: linked_by(model, spec, prompt).computed_tokens for spec in expected} == expected
    linked = linked_by(model, "link-tokens:k=2", prompt_for(model, "link-tokens:k=2"))
    assert linked.computed_tokens == other + 2 * len(DOCUMENTS)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return load_model(str(save_tiny(tmp_path_factory.mktemp("llama"), tiny_configs(layers=LAYERS)["llama"])))


SPECS = ("concat", "reposition", "link-tokens", "epic:k=2", "cacheblend:ratio=0.3")


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize(
    "documents",
    [
        [tokens(1)],
        [[65], [65], [65]],
        [DOCUMENTS[0], DOCUMENTS[0]],
        [tokens(1 + i % 4) for i in range(200)],
    ],
    ids=["one token", "one token thrice", "twice the same", "200 documents"],
)
def test_any_number_of_documents(llama: LoadedModel, spec: str, documents: list[list[int]]) -> None:
    prompt = prompt_for(llama, spec, documents)
    linked = linked_by(llama, spec, prompt, reserve=2)
    stale = stale_for(prompt, spec, linked)
    follow(linked, greedy_blended(llama.network, prompt, 2, stale=stale, local=spec == "concat"))


@pytest.mark.parametrize("spec", ["full", *SPECS])
def test_no_documents_at_all(llama: LoadedModel, spec: str) -> None:
    prompt = prompt_for(llama, spec, [])
    linked = linked_by(llama, spec, prompt)
    assert linked.computed_tokens == prompt.length
    assert difference(logits_of(linked), blended(llama.network, prompt, [], stale=lambda layer: set())) <= 1e-5


def test_an_empty_document_is_refused(llama: LoadedModel) -> None:
    with pytest.raises(EmptyDocumentError):
        DocumentEncoder(llama).encode([[65], []])


def test_caches_are_not_written_to(llama: LoadedModel) -> None:
    prompt = prompt_for(llama, "reposition")
    caches = DocumentEncoder(llama).encode([list(d) for d in DOCUMENTS])
    before = [(c.keys.clone(), c.values.clone()) for c in caches]
    for spec in ("concat", "reposition", "epic", "cacheblend"):
        logits_of(get_linker(spec).link(llama, prompt, caches, reserve=0))
    for cache, (keys, values) in zip(caches, before, strict=True):
        assert torch.equal(cache.keys, keys)
        assert torch.equal(cache.values, values)


def test_a_pass_that_was_ended_early_keeps_no_memory(llama: LoadedModel) -> None:
    prompt = prompt_for(llama, "cacheblend")
    linked = linked_by(llama, "cacheblend", prompt)
    idle = len(llama.lm.memory._idle)
    del linked
    assert len(llama.lm.memory._idle) == idle + 1


def test_a_layer_that_the_model_lacks(llama: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="layer 4 of a model with 4 layers; name one from 1 to 3"):
        linked_by(llama, "cacheblend:layer=4", prompt_for(llama, "cacheblend"))


def test_more_link_tokens_than_the_model_has(llama: LoadedModel) -> None:
    with pytest.raises(ConfigError, match="k=4, and this model has 3 link tokens"):
        prompt_for(llama, "link-tokens:k=4")
