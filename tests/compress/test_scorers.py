"""Scorers that watch the model: what they see is what transformers shows, and what they make of it is as published."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from strategies import tokens
from tiny import save_tiny, tiny_configs
from transformers import AutoModelForCausalLM

from kvlink_core.compress import get_codec, pruning_of
from kvlink_core.compress.scorers import get_scorer
from kvlink_core.compress.scorers.expected_attention import AHEAD
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import PromptTooLongError, UnsupportedModelError
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.models.reading import Reading, Reads
from kvlink_core.types import DocumentCache

DOCUMENTS = [tokens(n) for n in (17, 1, 12)]


class Noting:
    """Prunes nothing; keeps what it was shown."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads
        self.shown: list[tuple[DocumentCache, Reading | None]] = []

    def prune(self, cache: DocumentCache, reading: Reading | None = None) -> DocumentCache:
        self.shown.append((cache, reading))
        return cache


def read(model: LoadedModel, reads: Reads, documents: Sequence[Sequence[int]]) -> dict[int, tuple[DocumentCache, Any]]:
    """What is shown of each document, by its length."""
    noting = Noting(reads)
    DocumentEncoder(model, prune=noting).encode(documents)
    return {cache.tokens: (cache, reading) for cache, reading in noting.shown}


@pytest.fixture(scope="module", params=["llama", "qwen3", "gemma2", "deepseek_v3"])
def directory(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = tiny_configs()[request.param]
    if request.param == "gemma2":
        config.sliding_window = 1024
        config.attn_logit_softcapping = None  # which scores leave out: they rank
    return save_tiny(tmp_path_factory.mktemp(request.param), config)


@torch.inference_mode()
def test_a_second_reading_is_what_the_model_attends_to(directory: Path) -> None:
    model = load_model(str(directory))
    plain = AutoModelForCausalLM.from_pretrained(str(directory), attn_implementation="eager").eval()
    alone = {c.tokens: c for c in DocumentEncoder(model).encode(DOCUMENTS)}
    for length, (cache, reading) in read(model, "again", DOCUMENTS).items():
        document = cache.token_ids.tolist()
        attentions = plain(input_ids=torch.tensor([document * 2]), output_attentions=True).attentions
        for layer, weights in enumerate(attentions):
            heads = weights[0, :, length:, :length].amax(1)
            expected = heads.view(model.recipes.kv_heads, -1, length).amax(1)
            torch.testing.assert_close(reading.attention[layer], expected, rtol=1e-4, atol=1e-5)
            norms = torch.tensor([[math.hypot(*v.tolist()) for v in head] for head in cache.values[layer]])
            scores = get_scorer("repeat").score(cache, reading)[layer]
            torch.testing.assert_close(scores, expected * norms, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(cache.keys, alone[length].keys, rtol=0, atol=2e-5)
        torch.testing.assert_close(cache.values, alone[length].values, rtol=0, atol=2e-5)


def rope(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """Llama's rotation in float64, pair by pair: ``[..., n, dim]``."""
    half = x.shape[-1] // 2
    angles = positions[:, None] * theta ** (-np.arange(half) / half)
    cos, sin = np.cos(angles), np.sin(angles)
    a, b = x[..., :half], x[..., half:]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)


@torch.inference_mode()
def test_expected_attention_is_that_of_normal_queries_ahead(tiny_model: LoadedModel, tiny_model_dir: Path) -> None:
    """Means and covariances of what ``q_proj`` gives, rotations averaged one position at a time, in float64."""
    plain = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir)).eval()
    seen: list[torch.Tensor] = []
    for layer in plain.model.layers:
        layer.self_attn.q_proj.register_forward_hook(lambda _, __, out: seen.append(out[0]))
    theta = plain.config.rope_parameters["rope_theta"]
    dim = plain.config.hidden_size // plain.config.num_attention_heads
    for length, (cache, reading) in read(tiny_model, "queries", DOCUMENTS).items():
        seen.clear()
        plain(input_ids=cache.token_ids[None])
        found = get_scorer("expected-attention").score(cache, reading)
        for layer, projected in enumerate(seen):
            queries = projected.view(length, -1, dim).transpose(0, 1).double().numpy()
            keys = rope(cache.keys[layer].double().numpy(), np.arange(length), theta)
            for head in range(keys.shape[0]):
                weights = np.zeros(length)
                for query in queries[2 * head : 2 * head + 2]:
                    mean = rope(np.tile(query.mean(0), (AHEAD, 1)), length + np.arange(AHEAD), theta).mean(0)
                    turn = np.mean([rope(np.eye(dim), np.full(dim, length + p), theta) for p in range(AHEAD)], 0)
                    covariance = turn.T @ np.cov(query.T, bias=True).reshape(dim, dim) @ turn
                    exponent = keys[head] @ mean / np.sqrt(dim)
                    exponent += np.einsum("td,de,te->t", keys[head], covariance, keys[head]) / (2 * dim)
                    likely = np.exp(exponent - exponent.max())
                    weights += likely / likely.sum() / 2
                norms = np.linalg.norm(cache.values[layer, head].double().numpy(), axis=1)
                np.testing.assert_allclose(
                    found[layer, head].numpy(), (weights + 0.01 / length) * norms, rtol=2e-3, atol=1e-5
                )


@pytest.mark.parametrize("scorer", ["random", "knorm", "compactor", "expected-attention", "repeat"])
def test_batches_change_nothing_but_rounding(tiny_model: LoadedModel, scorer: str) -> None:
    prune = pruning_of(get_codec(f"raw:keep=0.5,scorer={scorer}"))
    together = DocumentEncoder(tiny_model, prune=prune).encode(DOCUMENTS)
    alone = [DocumentEncoder(tiny_model, prune=prune).encode([d])[0] for d in DOCUMENTS]
    for a, b in zip(together, alone, strict=True):
        assert a.slots == -(-a.tokens // 2)
        assert (a.kept is None) == (b.kept is None) == (a.tokens == 1)
        if a.kept is not None and b.kept is not None:
            assert torch.equal(a.kept, b.kept)
            torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=2e-5)


def test_scorers_differ(tiny_model: LoadedModel) -> None:
    found = []
    for scorer in ("random", "knorm", "compactor", "expected-attention", "repeat"):
        prune = pruning_of(get_codec(f"raw:keep=0.5,scorer={scorer}"))
        found.append(DocumentEncoder(tiny_model, prune=prune).encode([DOCUMENTS[0]])[0].kept)
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])  # type: ignore[arg-type]


def test_models_that_do_not_show_their_queries_are_refused(tmp_path: Path) -> None:
    model = load_model(str(save_tiny(tmp_path, tiny_configs()["deepseek_v3"])))
    with pytest.raises(UnsupportedModelError, match=r"queries before RoPE.*another scorer, e\.g\. knorm"):
        DocumentEncoder(model, prune=pruning_of(get_codec("raw:keep=0.5,scorer=expected-attention")))


def test_what_cannot_be_read_twice_is_refused(tmp_path: Path) -> None:
    model = load_model(str(save_tiny(tmp_path, tiny_configs(context=20)["llama"])))
    encoder = DocumentEncoder(model, prune=pruning_of(get_codec("raw:keep=0.5,scorer=repeat")))
    assert encoder.encode([tokens(10)])[0].slots == 5
    with pytest.raises(PromptTooLongError, match=r"has 11 tokens, and the model's context is 10 \(half of it"):
        encoder.encode([tokens(11)])
