"""Decode steps by tables of addresses: against one masked pass, and whatever goes wrong falls back to the plain way."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from typing import Any

import pytest
import torch
from engine_runs import NEVER, cached, run, worst
from oracles import greedy
from transformers import LlamaConfig

from kvlink_core.conformance.check import loaded, prompt_of
from kvlink_core.conformance.tiny import random_model, tiny_config, tiny_model
from kvlink_core.engine import Engine, EngineSettings, GenerationRequest, SamplingParams
from kvlink_core.engine.flat_runner import FlatRunner
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.models.decode import Decoder, Kernels

CUDA = torch.cuda.is_available()


class ByHand:
    """The kernels again, one token and head after the other, reading memory at the addresses that it is given."""

    def tile(self, dtype: torch.dtype) -> int:
        return 8

    def write(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, layer: int) -> None:
        for token, row in enumerate(table.view(-1, 8).tolist()):
            if row[0] == 0:
                continue
            for head in range(keys.shape[0]):
                at(row[0], layer * row[1] + head * row[2], 1, keys.shape[2])[0] = keys[head, token]
                at(row[3], layer * row[4] + head * row[5], 1, values.shape[2])[0] = values[head, token]
            ctypes.c_int64.from_address(row[6]).value = row[7]

    def attend(
        self, query: Any, parts: Any, rows: Any, turns: Any, bounds: Any, order: Any, layer: int, **o: Any
    ) -> Any:
        heads, tokens, dim = query.shape
        scores: list[list[list[torch.Tensor]]] = [[[] for _ in range(heads)] for _ in range(tokens)]
        values: list[list[list[torch.Tensor]]] = [[[] for _ in range(heads)] for _ in range(tokens)]
        results = {}
        for key, kl, kh, value, vl, vh, slots, first, count, result in parts.tolist():
            for row in range(count):
                results[result + row] = int(rows[first + row])
                for head in range(heads):
                    kv = head // (heads // o["kv_heads"])
                    asked = query[head, rows[first + row]]
                    if turns is not None:
                        turned = torch.cat([-asked[dim // 2 :], asked[: dim // 2]])
                        asked = asked * turns[0][first + row] + turned * turns[1][first + row]
                    at_token = int(rows[first + row])
                    scores[at_token][head].append(at(key, layer * kl + kv * kh, slots, dim) @ asked * o["scale"])
                    values[at_token][head].append(at(value, layer * vl + kv * vh, slots, o["value_dim"]))
        for token in range(tokens):  # the list of results is what the real ones merge by
            named = [results[int(place)] for place in order[bounds[token] : bounds[token + 1]]]
            assert named == [token] * sum(x == token for x in results.values())
        merged = torch.zeros(tokens, heads, o["value_dim"])
        for token in range(tokens):
            for head in range(heads):
                if scores[token][head]:
                    weights = torch.cat(scores[token][head]).softmax(0)
                    merged[token, head] = weights @ torch.cat(values[token][head])
        return merged


def at(address: int, offset: int, rows: int, width: int) -> torch.Tensor:
    """Memory as a tensor ``[rows, width]`` of float32."""
    return torch.frombuffer(
        (ctypes.c_float * (rows * width)).from_address(address + 4 * offset), dtype=torch.float32
    ).view(rows, width)


class Wrong(ByHand):
    def attend(self, *args: Any, **options: Any) -> Any:
        return super().attend(*args, **options) * 1.5


class Broken(ByHand):
    def attend(self, *args: Any, **options: Any) -> Any:
        raise RuntimeError("no kernel image is available for execution on the device")


def asked(model: LoadedModel) -> list[GenerationRequest]:
    requests = []
    for seed, links, answer in ((0, 0, 9), (0, 2, 12), (1, 0, 10)):  # the first two share documents
        prompt = prompt_of((19, 9, 1, 19), links=links, seed=seed)
        caches = cached(model, [s.token_ids for s in prompt.documents])
        how = get_linker("link-tokens" if links else "reposition")
        requests.append(GenerationRequest(prompt, how, SamplingParams(max_tokens=answer), caches, NEVER))
    return requests


def answered(model: LoadedModel, kernels: Kernels | None) -> Decoder:
    """Requests that come and go, each compared with one masked pass from nothing; returns what decoded."""
    engine = Engine(model, EngineSettings(step_tokens=64, stretch=None))
    runner = engine._runner
    assert isinstance(runner, FlatRunner)
    if kernels is not None:
        runner.decoder = Decoder(model.lm, runner._turner, kernels)
    requests = asked(model)
    for request, outcome in zip(requests, run(engine, requests, arrivals=[0, 1, 3]), strict=True):
        tokens, logits = greedy(model.network, request.prompt, request.sampling.max_tokens, isolate=True)
        assert outcome.token_ids == tokens
        assert worst(outcome, logits) <= 1e-5
    assert runner.decoder is not None
    return runner.decoder


@pytest.mark.parametrize("model_type", ["llama", "olmo2", "smollm3"])
def test_steps_by_tables_follow_one_masked_pass(model_type: str) -> None:
    """Documents that are shared, in other places, cut into tiles; a model with layers that do not rotate."""
    changes = {"layer_types": ["full_attention"] * 4} if model_type == "smollm3" else {}
    decoder = answered(loaded(tiny_model(model_type, **changes)), ByHand())
    assert decoder.usable
    assert decoder.steps >= 4


@pytest.mark.parametrize("kernels", [Wrong(), Broken()])
def test_kernels_that_fail_are_not_used(kernels: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    decoder = answered(loaded(tiny_model("llama")), kernels)
    assert not decoder.usable
    assert decoder.steps == 0
    assert len(caplog.records) == 1


@pytest.mark.parametrize("model_type", ["gpt_oss", "gemma2"])
def test_windows_are_left_to_the_plain_way(model_type: str, caplog: pytest.LogCaptureFixture) -> None:
    decoder = answered(loaded(tiny_model(model_type)), ByHand())
    assert not decoder.usable
    assert not [record for record in caplog.records if record.levelname == "WARNING" and "decod" in record.message]


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or not (CUDA or os.environ.get("TRITON_INTERPRET") == "1"),
    reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("groups", [2, 3])
def test_the_kernels_follow_one_masked_pass(groups: int) -> None:
    """On a GPU as they are, elsewhere in Triton's interpreter."""
    config = tiny_config(
        "llama", num_attention_heads=2 * groups, num_key_value_heads=2, head_dim=32, hidden_size=16 * groups
    )
    assert isinstance(config, LlamaConfig)
    lm = random_model(config, device="cuda" if CUDA else "cpu")
    from kvlink_core.models import decode_triton

    decoder = answered(loaded(lm), decode_triton)
    assert decoder.usable
    assert decoder.steps >= 4
    assert (decoder.replays > 0) == CUDA
