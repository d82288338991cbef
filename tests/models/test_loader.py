"""Loading: what is refused, and what the fingerprint notices."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import VOCABULARY, save_tiny, tiny_configs
from transformers import FalconConfig, LlamaConfig

from kvlink_core.errors import ConfigError, ModelError, ModelNotFoundError, UnsupportedModelError
from kvlink_core.models import LoadedModel, describe_model, load_model
from kvlink_core.models.spec import check_architecture, spec_from_config


@pytest.fixture
def copy(tiny_model_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_model_dir, tmp_path / "copy"))


def test_no_such_directory() -> None:
    with pytest.raises(ModelNotFoundError, match=r"config\.json"):
        load_model("/nowhere/at/all")


def test_no_weights(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load_model(str(copy))


def test_torn_weights(copy: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    with pytest.raises(ModelError, match="cannot load"):
        load_model(str(copy))


def test_a_missing_tensor(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj"):
        load_model(str(copy))


def test_an_adapter_beside_the_model(copy: Path) -> None:
    (copy / "adapter_config.json").write_text("{}")
    with pytest.raises(ConfigError, match="merge it"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"link_tokens": {"k": 0, "ids": []}}, "k"),
        ({"link_tokens": {"k": 3, "ids": [1, 2]}}, "2 ids"),
        ({"link_tokens": {"k": 1, "ids": [1, 2]}}, "2 ids"),
        ({"link_tokens": {"k": 1, "ids": [-5]}}, "ids"),
        ({"link_tokens": {"k": 1, "ids": [99_999]}}, "99999"),
        ({"mem_end": [VOCABULARY]}, str(VOCABULARY)),
        ({"documents_in": "assistant"}, "documents_in"),
        ({"format": 2}, "format"),
        ({"document_template": "no text"}, "template"),
    ],
)
def test_impossible_layouts_are_refused_when_loading(copy: Path, change: dict[str, object], match: str) -> None:
    layout = json.loads((copy / "kvlink.json").read_text())
    (copy / "kvlink.json").write_text(json.dumps(layout | change))
    with pytest.raises(ConfigError, match=match):
        describe_model(str(copy))


def test_no_fast_tokenizer(copy: Path) -> None:
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelNotFoundError, match="tokenizer"):
        load_model(str(copy))


def test_unknown_key_in_the_layout_file(copy: Path) -> None:
    layout = json.loads((copy / "kvlink.json").read_text())
    (copy / "kvlink.json").write_text(json.dumps(layout | {"link_tokns": {}}))
    with pytest.raises(ConfigError, match="link_tokns"):
        load_model(str(copy))


@pytest.mark.parametrize(
    ("kw", "match"), [({"dtype": "float8"}, "float8"), ({"device": "cuda:99"}, "cuda:99"), ({"device": "x"}, "'x'")]
)
def test_unusable_dtype_and_device(tiny_model_dir: Path, kw: dict[str, str], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        load_model(str(tiny_model_dir), **kw)  # type: ignore[arg-type]  # one keyword each


def test_unknown_shape() -> None:
    with pytest.raises(ConfigError, match="llama-100m"):
        load_model("random:llama-7t")


def test_unchecked_architectures_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match="'no-such-model'"):
        check_architecture("no-such-model")


@pytest.mark.parametrize(("kind", "limit"), [("dynamic", 64), ("longrope", 16)])
def test_rope_that_depends_on_the_length_is_exact_up_to_the_original_context(kind: str, limit: int) -> None:
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 2.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, num_attention_heads=4, rope_parameters=rope, max_position_embeddings=64
    )
    spec = spec_from_config(config)
    assert spec.context_length == limit
    assert kind in spec.context_reason


def test_long_context_is_for_models_with_long_factors(copy: Path) -> None:
    layout = json.loads((copy / "kvlink.json").read_text())
    (copy / "kvlink.json").write_text(json.dumps(layout | {"long_context": True}))
    with pytest.raises(ConfigError, match="longrope"):
        load_model(str(copy))


def test_a_bias_by_distance_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="ALiBi"):
        spec_from_config(FalconConfig(alibi=True))


def test_the_fingerprint_is_stable(tiny_model: LoadedModel, tiny_model_dir: Path) -> None:
    assert load_model(str(tiny_model_dir)).fingerprint == tiny_model.fingerprint


def test_one_changed_weight_changes_the_fingerprint(tiny_model: LoadedModel, copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    tensors["model.layers.0.self_attn.k_proj.weight"][0, 0] += 1
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert set(load_model(str(copy)).fingerprint.difference(tiny_model.fingerprint)) == {"weights"}


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 0.1), ("hidden_act", "gelu"), ("mlp_bias", True)])
def test_the_same_weights_in_another_architecture_are_another_model(
    tiny_model: LoadedModel, copy: Path, key: str, value: object
) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {key: value}))
    assert set(describe_model(str(copy)).fingerprint.difference(tiny_model.fingerprint)) == {"model"}


def test_another_version_of_transformers_is_not_another_model(tiny_model: LoadedModel, copy: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"transformers_version": "5.99.0"}))
    assert describe_model(str(copy)).fingerprint == tiny_model.fingerprint


def test_template_rope_and_dtype_change_the_fingerprint(tiny_model: LoadedModel, copy: Path) -> None:
    layout = json.loads((copy / "kvlink.json").read_text())
    (copy / "kvlink.json").write_text(json.dumps(layout | {"document_template": "- {text}\n"}))
    assert set(load_model(str(copy)).fingerprint.difference(tiny_model.fingerprint)) == {"template"}
    assert "dtype" in load_model(str(copy), dtype="bfloat16").fingerprint.difference(tiny_model.fingerprint)
    config = json.loads((copy / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 77_777.0
    (copy / "config.json").write_text(json.dumps(config))
    assert "rope" in load_model(str(copy)).fingerprint.difference(tiny_model.fingerprint)


def test_a_model_without_a_layout_file_links_by_reposition(tmp_path: Path) -> None:
    directory = save_tiny(tmp_path, tiny_configs()["qwen2"])
    (directory / "kvlink.json").unlink()
    model = load_model(str(directory))
    assert model.default_linker == "reposition"
    assert model.layout.link_tokens is None
    assert model.name == directory.name


def test_bfloat16_weights_load_as_float32_on_cpu(copy: Path) -> None:
    tensors = {k: v.bfloat16() for k, v in load_file(copy / "model.safetensors").items()}
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    assert load_model(str(copy)).dtype == torch.float32
