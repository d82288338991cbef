"""The table of architectures is true, and the check behind it can fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from kvlink_core.conformance import check as checking
from kvlink_core.conformance import walk
from kvlink_core.conformance.check import STEPS, check, prompt_of
from kvlink_core.conformance.oracle import oracle_logits
from kvlink_core.conformance.report import render
from kvlink_core.conformance.tiny import CHUNK, random_model, tiny_config, tiny_model
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import UnsupportedModelError
from kvlink_core.linking import get_linker
from kvlink_core.models import attention
from kvlink_core.models.rope import Rotary
from kvlink_core.models.spec import check_architecture, exact_model_types, spec_from_config, with_long_rope

#: What the project promises by name.
PROMISED = set(
    """
    llama mistral mixtral qwen2 qwen2_moe qwen3 qwen3_moe gemma gemma2 gemma3 gemma3_text phi phi3 granite olmo2 olmo3
    cohere cohere2 glm glm4 starcoder2 stablelm gpt_neox smollm3 exaone4 falcon deepseek_v2 deepseek_v3 gpt_oss
    llama4_text
    """.split()  # noqa: SIM905
)


def test_the_table_is_what_this_transformers_gives() -> None:
    rows = walk.walk()
    assert walk.drift(rows) == []
    document = Path(__file__).parents[2] / "docs" / "architectures.md"
    assert document.read_text() == render(rows, transformers.__version__, STEPS)


def test_the_promised_architectures_are_exact() -> None:
    assert set(exact_model_types()) >= PROMISED
    assert len(exact_model_types()) >= 80


@pytest.mark.parametrize("model_type", ["gpt2", "bloom", "mamba", "qwen3_next"])
def test_the_refused_are_refused_with_the_reason(model_type: str) -> None:
    with pytest.raises(UnsupportedModelError, match=r"does not link exactly: .*(adds|keep)"):
        check_architecture(model_type)


def test_drift_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    rows = walk.walk(["llama"])
    table = tmp_path / "table.json"
    table.write_text(walk.to_json([walk.Row("llama", "LlamaForCausalLM", "refused", "because")]))
    monkeypatch.setattr(walk, "TABLE", table)
    assert walk.drift(rows) == ["llama: the table says refused (because), found exact"]


def _positions_off_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    tables = Rotary.tables
    monkeypatch.setattr(Rotary, "tables", lambda self, positions: tables(self, positions + 1))


def _windows_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    ours = attention._mask

    def forgetful(*args: Any, mask_function: Callable[..., torch.Tensor], **kwargs: Any) -> Any:
        return ours(*args, mask_function=lambda b, h, q, k: k <= q, **kwargs)

    transformers.AttentionMaskInterface.register(attention.ATTENTION, forgetful)


@pytest.mark.parametrize(("model_type", "sabotage"), [
    ("llama", _positions_off_by_one), ("deepseek_v3", _positions_off_by_one), ("gptj", _positions_off_by_one),
    ("gemma3_text", _windows_forgotten), ("llama4_text", _windows_forgotten),
])  # fmt: skip
def test_the_check_sees_what_is_wrong(
    model_type: str, sabotage: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny_model(model_type)
    assert check(lm).exact
    try:
        sabotage(monkeypatch)
        assert not check(lm).exact
    finally:
        transformers.AttentionMaskInterface.register(attention.ATTENTION, attention._mask)


_FACTORS = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 2.1, 2.2, 2.3]}
ROPE: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.0},
    "dynamic": {"factor": 2.0},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64
    },
    "longrope": {"factor": 4.0, "original_max_position_embeddings": 64, **_FACTORS},
    "proportional": {"partial_rotary_factor": 0.5},
}  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "kind"), [*(("llama", kind) for kind in ROPE), ("phi3", "longrope"), ("gpt_neox", "yarn")]
)
def test_every_kind_of_rope_is_exact(kind: str, model_type: str) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, **ROPE[kind]}
    assert check(tiny_model(model_type, rope_parameters=rope)).exact


def test_long_rope_used_throughout_is_exact_beyond_the_original_context() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "factor": 8.0, "original_max_position_embeddings": 16}
    config = tiny_config("phi3", rope_parameters={**rope, **_FACTORS}, original_max_position_embeddings=16)
    assert spec_from_config(config).context_length == 16 < prompt_of(links=0).length
    stock = random_model(config)
    assert not check(stock).exact  # documents were encoded with the short factors
    pinned = random_model(with_long_rope(config))
    prompt = prompt_of(links=2)
    expected = oracle_logits(stock, prompt, [], isolate=True)
    assert check(pinned).exact
    assert torch.equal(oracle_logits(pinned, prompt, [], isolate=True), expected)


def test_rope_by_kind_of_layer() -> None:
    rope = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        "full_attention": {"rope_type": "yarn", "rope_theta": 1e5, **ROPE["yarn"]},
    }
    lm = tiny_model("gemma3_text", rope_parameters=rope)
    assert len(lm.recipes.sources) == 2
    assert check(lm).exact


def test_an_unknown_rope_is_refused() -> None:
    config = tiny_config("llama")
    config.rope_parameters = {"rope_type": "spiral", "rope_theta": 1e4}
    with pytest.raises(UnsupportedModelError, match="'spiral'"):
        spec_from_config(config)


def test_attention_temperature_limits_the_context() -> None:
    spec = spec_from_config(tiny_config("llama4_text", attn_temperature_tuning=True, floor_scale=64))
    assert spec.context_length == 63
    assert "position" in spec.context_reason


def test_keys_weighed_after_rotation_are_refused_unless_the_weights_are_alike() -> None:
    with pytest.raises(UnsupportedModelError, match="weighs the dimensions"):
        tiny_model("hunyuan_v1_dense")


@pytest.mark.parametrize("model_type", ["llama4_text", "gemma3_text"])
def test_chunks_and_windows_against_a_mask_written_out(model_type: str) -> None:
    """The generic oracle asks the model for its predicate; here the predicate is spelled out, pair by pair."""
    lm = tiny_model(model_type)
    prompt = prompt_of(links=2)
    owner: list[int] = [-1] * prompt.length
    for segment in prompt.documents:
        owner[segment.start : segment.end] = [segment.start] * (segment.end - segment.start)
    masks = {}
    for kind in set(lm.network.config.layer_types):
        mask = torch.full((prompt.length, prompt.length), torch.finfo(torch.float32).min)
        for q in range(prompt.length):
            base = max(owner[q], 0)
            for k in range(base, q + 1):
                near = {
                    "full_attention": True,
                    "sliding_attention": q - k < lm.network.config.get_text_config().sliding_window
                    if model_type == "gemma3_text"
                    else True,
                    "chunked_attention": (q - base) // CHUNK == (k - base) // CHUNK,
                }[kind]
                if near and (owner[q] < 0 or owner[k] == owner[q]):
                    mask[q, k] = 0
        masks[kind] = mask[None, None]
    with torch.inference_mode():
        expected = lm.network(
            input_ids=prompt.token_ids()[None], attention_mask=masks, use_cache=False,
            position_ids=torch.arange(prompt.length)[None],
        ).logits[0, -1]  # fmt: skip
    model = checking.loaded(lm)
    caches = DocumentEncoder(model).encode([list(s.token_ids) for s in prompt.documents])
    linked = get_linker("link-tokens").link(model, prompt, caches, reserve=1)
    got = linked.compute(linked.token_ids[linked.pending], linked.pending)
    tolerance = checking.TOLERANCE * float(expected.abs().max())
    assert float((got - expected).abs().max()) <= tolerance
    assert float((oracle_logits(lm, prompt, [], isolate=True) - expected).abs().max()) <= tolerance
