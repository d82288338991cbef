"""Pruned documents: each head's keys at their true positions, against a pass that hides from each what it lacks."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pruned_oracle
import pytest
import torch
from strategies import QUESTION, difference, follow, logits_of, tokens
from tiny import VOCABULARY, save_tiny, tiny_configs
from transformers import Gemma2Config, PhiConfig

from kvlink_core.compress import get_codec
from kvlink_core.compress.pruning import take
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import PrunedCacheError
from kvlink_core.linking import LinkedCache, get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.prompt import Prompt
from kvlink_core.types import DocumentCache

STEPS = 4
LAYERS = 3

#: As long as windows are wide and longer, a lone token, one of them twice; windows end within the last one.
_FIRST = tokens(19)
DOCUMENTS = (_FIRST, tokens(9), tokens(1), _FIRST, tokens(6))

#: How many tokens of each document are left; 0 for an unpruned cache.
LEFT = (7, 0, 1, 9, 3)


def more_configs() -> dict[str, Any]:
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2048, "initializer_range": 0.4,
        "bos_token_id": 256, "eos_token_id": 257, "pad_token_id": 257,
    }  # fmt: skip
    return {
        "phi": PhiConfig(**size, partial_rotary_factor=0.5),
        "gemma2-wide": Gemma2Config(**size, head_dim=16, sliding_window=1024, query_pre_attn_scalar=16),
    }


@dataclass(frozen=True)
class Given:
    """A model, its plain twin, and documents of which tokens were taken at random."""

    model: LoadedModel
    plain: Any
    whole: list[DocumentCache]
    caches: list[DocumentCache]
    kept: list[list[list[set[int]]] | None]


ARCHITECTURES = (
    "llama", "llama-yarn", "qwen3", "phi", "gemma2-wide", "gemma2", "mistral-window", "qwen3-window", "deepseek_v3",
)  # fmt: skip


@pytest.fixture(scope="module", params=ARCHITECTURES)
def given(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Given:
    config = {**tiny_configs(layers=LAYERS), **more_configs()}[request.param]
    return prepared(save_tiny(tmp_path_factory.mktemp(request.param), config))


def prepared(directory: Path) -> Given:
    model = load_model(str(directory))
    whole = DocumentEncoder(model).encode(DOCUMENTS)
    kept = [chosen(model, len(d), n) if n else None for d, n in zip(DOCUMENTS, LEFT, strict=True)]
    caches = [c if k is None else take(c, tensor_of(k)) for c, k in zip(whole, kept, strict=True)]
    return Given(model, pruned_oracle.load(directory), whole, caches, kept)


def chosen(model: LoadedModel, length: int, count: int) -> list[list[set[int]]]:
    draw = random.Random(length)
    heads = model.recipes.kv_heads
    return [[set(draw.sample(range(length), count)) for _ in range(heads)] for _ in model.recipes.layers]


def tensor_of(kept: Sequence[Sequence[set[int]]]) -> torch.Tensor:
    return torch.tensor([[sorted(head) for head in layer] for layer in kept])


def prompt_for(model: LoadedModel, spec: str) -> Prompt:
    return model.layout.build(QUESTION, DOCUMENTS, links=get_linker(spec).links(model.layout))


def link(given: Given, spec: str, prompt: Prompt, caches: Sequence[DocumentCache]) -> LinkedCache:
    return get_linker(spec).link(given.model, prompt, caches, reserve=STEPS)


@pytest.mark.parametrize("spec", ["reposition", "link-tokens", "concat"])
def test_every_head_sees_what_it_has_left_at_its_true_place(given: Given, spec: str) -> None:
    prompt = prompt_for(given.model, spec)
    linked = link(given, spec, prompt, given.caches)
    dropped = sum(len(d) - n for d, n in zip(DOCUMENTS, LEFT, strict=True) if n)
    assert linked.keys.shape[2] == prompt.length + STEPS - dropped
    assert linked.computed_tokens == prompt.length - sum(map(len, DOCUMENTS))
    follow(linked, pruned_oracle.greedy(given.plain, prompt, given.kept, STEPS, local=spec == "concat"))


def test_the_oracle_can_tell(given: Given) -> None:
    """It hides what it is told to, and other tokens in each head, layer and document."""
    prompt = prompt_for(given.model, "reposition")

    def of(kept: Sequence[Any]) -> torch.Tensor:
        return pruned_oracle.greedy(given.plain, prompt, kept, 1)[1][0]

    truth = of(given.kept)
    assert difference(of([None] * len(DOCUMENTS)), truth) > 1e-3
    last = given.kept[4]  # which windows let be seen, in part
    assert last is not None
    others = [
        [[{(t + 1) % len(DOCUMENTS[4]) for t in h} if (i, j) == place else h for j, h in enumerate(layer)]
         for i, layer in enumerate(last)]
        for place in ((0, 0), (LAYERS - 1, len(last[0]) - 1))
    ]  # fmt: skip
    for other in others:
        assert difference(of([*given.kept[:4], other]), truth) > 1e-5


def test_without_pruning_the_oracle_is_what_the_linker_gives(given: Given) -> None:
    prompt = prompt_for(given.model, "reposition")
    expected = pruned_oracle.greedy(given.plain, prompt, [None] * len(DOCUMENTS), STEPS)
    follow(link(given, "reposition", prompt, given.whole), expected)


def test_keeping_everything_is_bit_for_bit_no_pruning(given: Given) -> None:
    prompt = prompt_for(given.model, "reposition")
    codec = get_codec("raw:keep=1,scorer=knorm")
    decoded = [codec.decode(codec.encode(cache)) for cache in given.whole]
    ours, theirs = (logits_of(link(given, "reposition", prompt, caches)) for caches in (decoded, given.whole))
    assert torch.equal(ours, theirs)


def test_a_share_that_rounds_to_all_is_no_pruning(given: Given) -> None:
    codec = get_codec("raw:keep=0.99,scorer=knorm")
    for cache in given.whole:
        decoded = codec.decode(codec.encode(cache))
        assert decoded.kept is None
        assert torch.equal(decoded.keys, cache.keys)


@pytest.mark.parametrize("spec", ["epic", "epic:k=1", "cacheblend", "cacheblend:ratio=0"])
def test_linkers_that_compute_document_tokens_are_refused(given: Given, spec: str) -> None:
    prompt = prompt_for(given.model, spec)
    with pytest.raises(
        PrunedCacheError, match=r"no slots for them; use .*reposition.* or a codec without keep"
    ) as caught:
        link(given, spec, prompt, given.caches)
    assert caught.value.param == "linker"
    link(given, spec, prompt, given.whole)
    follow_epic = link(given, "epic:k=0", prompt, given.caches)  # computes none
    assert torch.equal(logits_of(follow_epic), logits_of(link(given, "reposition", prompt, given.caches)))


def test_a_linker_that_does_not_know_of_pruning_is_told(given: Given) -> None:
    prompt = prompt_for(given.model, "reposition")
    linked = LinkedCache(given.model, prompt, reserve=0)
    tables = given.model.rotary.tables(torch.arange(prompt.length))
    with pytest.raises(PrunedCacheError, match="this linker has no slots for pruned caches"):
        linked.place_all(given.caches, tables)


def test_what_is_placed_is_left_as_it_was(given: Given) -> None:
    before = [[t.clone() for t in (c.keys, c.values)] for c in given.caches]
    link(given, "reposition", prompt_for(given.model, "reposition"), given.caches)
    for cache, (keys, values) in zip(given.caches, before, strict=True):
        assert torch.equal(cache.keys, keys)
        assert torch.equal(cache.values, values)
