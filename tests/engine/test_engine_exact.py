"""Whatever else is in the batch, a request has the logits of the oracle: architectures, linkers, ways of running."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from engine_runs import NEVER, TEXTS, alone, cached, request_for, run, worst
from oracles import greedy
from tiny import VOCABULARY, save_tiny, tiny_configs
from transformers import Cohere2Config, GPTNeoXConfig, GptOssConfig, PreTrainedConfig

from kvlink_core.conformance.check import loaded, prompt_of
from kvlink_core.conformance.tiny import tiny_model as tiny
from kvlink_core.engine import Engine, EngineSettings, GenerationRequest, SamplingParams
from kvlink_core.errors import PrunedCacheError
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.types import DocumentCache

_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 2048, "initializer_range": 0.4, "bos_token_id": 256,
    "eos_token_id": 257, "pad_token_id": 257,
}  # fmt: skip
#: Partial rotary; pairs of neighbours rotated and layers without RoPE; attention sinks.
MORE: dict[str, PreTrainedConfig] = {
    "gpt_neox": GPTNeoXConfig(**_SIZE, rotary_pct=0.5),
    "cohere2": Cohere2Config(**_SIZE, num_key_value_heads=2, sliding_window=9),
    "gpt_oss": GptOssConfig(
        **_SIZE, num_key_value_heads=2, head_dim=8, sliding_window=9, num_local_experts=4, num_experts_per_tok=2
    ),
}
SHARED = ("llama", "llama-yarn", "llama-llama3", "qwen3", "qwen3-window", "mistral-window", "gemma2", *MORE)


@pytest.fixture(scope="module", params=SHARED)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    config = MORE.get(request.param) or tiny_configs()[request.param]
    return load_model(str(save_tiny(tmp_path_factory.mktemp(request.param), config)))


@pytest.fixture(scope="module")
def latent(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """A model whose cache holds no keys, which nothing can be shared of."""
    return load_model(str(save_tiny(tmp_path_factory.mktemp("latent"), tiny_configs()["deepseek_v3"])))


def test_requests_that_share_documents_follow_the_oracle(model: LoadedModel) -> None:
    """Documents in other orders and places, one of them twice; some cold; prefill in chunks beside decoding."""
    requests = [
        request_for(model, "link-tokens", (0, 1, 2, 0), "Who?"),
        request_for(model, "reposition", (1, 0), "Where does Maria live?", max_tokens=9),
        request_for(model, "link-tokens", (3, 1, 4), "When does it close?", cold=True),
        request_for(model, "full", (0, 1), "Who was it?"),
        request_for(model, "link-tokens", (), "Nothing?"),
    ]
    engine = Engine(model, EngineSettings(step_tokens=11, stretch=None))
    assert engine.mode == "shared"
    outcomes = run(engine, requests, arrivals=[0, 3, 0, 5, 9])
    for request, outcome in zip(requests, outcomes, strict=True):
        isolate = request.linker.name != "full"
        tokens, logits = greedy(model.network, request.prompt, request.sampling.max_tokens, isolate=isolate)
        assert outcome.token_ids == tokens
        assert worst(outcome, logits) <= 1e-5


@pytest.mark.parametrize("linker", ["concat", "epic:k=3", "cacheblend:ratio=0.3,layer=1"])
def test_every_linker_gives_what_it_gives_alone(model: LoadedModel, linker: str) -> None:
    requests = [
        request_for(model, linker, (0, 1, 3)),
        request_for(model, "link-tokens", (1, 0)),
        request_for(model, linker, (4, 0), "Who?", cold=True),
    ]
    outcomes = run(Engine(model, EngineSettings(step_tokens=13, stretch=None)), requests, arrivals=[0, 1, 2])
    for request, outcome in zip(requests, outcomes, strict=True):
        expected = alone(model, request)
        assert outcome.token_ids == expected.token_ids
        assert worst(outcome, expected.logits) <= 1e-5


@pytest.mark.parametrize("mode", ["copied", "solo"])
def test_the_other_ways_of_running_give_the_same(tiny_model: LoadedModel, mode: Any) -> None:
    requests = [request_for(tiny_model, "link-tokens", (0, 1, 2)), request_for(tiny_model, "full", (1,), cold=True)]
    requests.append(request_for(tiny_model, "reposition", (3, 4), cold=True))
    outcomes = run(Engine(tiny_model, EngineSettings(step_tokens=9, mode=mode)), requests, arrivals=[0, 2, 2])
    for request, outcome in zip(requests, outcomes, strict=True):
        expected = alone(tiny_model, request)
        assert outcome.token_ids == expected.token_ids
        assert worst(outcome, expected.logits) <= 1e-5


def test_a_model_that_cannot_be_batched_is_run_by_itself(latent: LoadedModel) -> None:
    requests = [request_for(latent, "link-tokens", (0, 1)), request_for(latent, "full", (1, 2))]
    engine = Engine(latent, EngineSettings(step_tokens=9))
    assert engine.mode == "solo"
    for request, outcome in zip(requests, run(engine, requests), strict=True):
        assert outcome.token_ids == alone(latent, request).token_ids


def test_a_rotation_that_does_not_compose_takes_the_copying_way(
    tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Queries that are not turned back give other logits, and the trial tells."""
    monkeypatch.setattr("kvlink_core.models.turning.QueryTurner.turn", lambda self, layer, queries, tables: queries)
    engine = Engine(tiny_model)
    assert engine.mode == "copied"
    request = request_for(tiny_model, "link-tokens", (0, 1))
    assert run(engine, [request])[0].token_ids == alone(tiny_model, request).token_ids


def test_long_documents_far_apart(tiny_model: LoadedModel) -> None:
    """Queries turned back by a thousand positions."""
    places = [i % len(TEXTS) for i in range(40)]
    request = request_for(tiny_model, "link-tokens", places, max_tokens=3)
    assert request.prompt.length > 1200
    tokens, logits = greedy(tiny_model.network, request.prompt, 3, isolate=True)
    (outcome,) = run(Engine(tiny_model), [request])
    assert outcome.token_ids == tokens
    assert worst(outcome, logits) <= 1e-5


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_are_near(tiny_model: LoadedModel, tmp_path: Any, dtype: str) -> None:
    model = load_model(str(save_tiny(tmp_path)), dtype=dtype)
    request = request_for(model, "link-tokens", (0, 1, 3), max_tokens=1)
    (outcome,) = run(Engine(model), [request])
    assert worst(outcome, alone(model, request).logits) <= (3e-2 if model.dtype == torch.bfloat16 else 4e-3)


@pytest.mark.parametrize(
    ("model_type", "mode"),
    [
        ("llama4_text", "shared"),
        ("phi", "shared"),
        ("glm4", "shared"),
        ("dbrx", "shared"),
        ("gptj", "solo"),
        ("codegen", "solo"),
    ],
)
def test_more_architectures(model_type: str, mode: str) -> None:
    """Chunks, partial and interleaved rotation, complex tables, clipped values; sines that are a table of their own."""
    model = loaded(tiny(model_type))
    engine = Engine(model, EngineSettings(step_tokens=10, stretch=None))
    assert engine.mode == mode
    requests = []
    for seed in (0, 1):
        prompt = prompt_of(links=2 * seed, seed=seed)
        caches = cached(model, [s.token_ids for s in prompt.documents])
        requests.append(
            GenerationRequest(prompt, get_linker("reposition"), SamplingParams(max_tokens=4), caches, NEVER)
        )
    for request, outcome in zip(requests, run(engine, requests, arrivals=[0, 2]), strict=True):
        expected = alone(model, request)
        assert outcome.token_ids == expected.token_ids
        assert worst(outcome, expected.logits) <= 1e-5


def test_pruned_documents_are_read_in_place(model: LoadedModel) -> None:
    """Each layer and head has other tokens left, of which windows hide some in some heads and all in others."""
    draw = torch.Generator().manual_seed(0)

    def pruned(cache: DocumentCache | None) -> DocumentCache:
        assert cache is not None
        count = max(1, cache.tokens // 3)
        order = torch.rand(*cache.keys.shape[:2], cache.tokens, generator=draw).argsort(-1)
        kept = order[..., :count].sort(-1).values
        keys, values = (
            part.gather(2, kept[..., None].expand(-1, -1, -1, part.shape[3])) for part in (cache.keys, cache.values)
        )
        return DocumentCache(cache.token_ids, keys, values, kept.to(torch.int32))

    requests = [
        request_for(model, "link-tokens", (0, 1, 3), "?"),
        request_for(model, "reposition", (1, 0), "??"),
        request_for(model, "concat", (3, 0), "?"),
    ]
    made: dict[tuple[int, ...], DocumentCache] = {}
    for i, request in enumerate(requests):
        caches = []
        for segment, cache in zip(request.prompt.documents, request.caches, strict=True):
            if segment.token_ids not in made:
                made[segment.token_ids] = pruned(cache)
            caches.append(made[segment.token_ids])
        requests[i] = replace(request, caches=caches)
    engine = Engine(model, EngineSettings(step_tokens=7, stretch=None))
    for request, outcome in zip(requests, run(engine, requests, arrivals=[0, 1, 2]), strict=True):
        expected = alone(model, request)
        assert outcome.token_ids == expected.token_ids
        assert worst(outcome, expected.logits) <= 1e-5
    refused = replace(request_for(model, "epic:k=2", (0, 1, 3), "?"), caches=requests[0].caches)
    assert isinstance(run(engine, [refused])[0].error, PrunedCacheError)
    assert engine.stats.kv_used == engine.stats.kv_idle
