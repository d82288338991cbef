"""A tiny random model of any architecture: few and narrow layers, wide weights, windows smaller than a document."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.causal_lm import CausalLM, attention_of, prepare

#: Tokens are drawn below this, so that no architecture takes one for a picture or a sound.
VOCABULARY = 96

#: Smaller than the documents of ``check``, so that windows and chunks hide something inside a document too.
WINDOW, CHUNK = 8, 8

#: A tiny model has fewer parameters than this; more means that a size was not understood.
_MOST_PARAMETERS = 30_000_000

#: Values for configuration fields, wherever an architecture has a field of that name.
_SIZES: Mapping[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_kv_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "sliding_window": WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": CHUNK,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "intermediate_size_mlp": 48,
    # latent attention
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    # older names
    "n_layer": 4,
    "n_layers": 4,
    "num_layers": 4,
    "n_head": 4,
    "n_heads": 4,
    "n_embd": 32,
    "n_inner": 48,
    "n_positions": 256,
    "n_ctx": 256,
    "max_seq_len": 256,
    "rotary_dim": 4,
    "d_model": 32,
    "d_ff": 48,
    "ffn_dim": 48,
    "ffn_hidden_size": 48,
    "embedding_size": 32,
    "emb_dim": 32,
    "dff": 48,
    "decoder_layers": 3,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    # Gemma's extras
    "vocab_size_per_layer_input": VOCABULARY,
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 8,
    "num_kv_shared_layers": 2,
    "query_pre_attn_scalar": 8,
    "index_topk": 8,
    "index_n_heads": 2,
    "index_head_dim": 16,
    # parts that see or hear, which texts do not reach
    "image_size": 28,
    "patch_size": 14,
}

#: Fields that must differ, or whose own default does not fit the sizes above.
_MIXED = ["sliding_attention", "full_attention"] * 2
_EXCEPTIONS: Mapping[str, Mapping[str, Any]] = {
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}},
    "doge": {"keep_window_size": 8},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "vaultgemma": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 5.0},
    "gemma3_text": {"layer_types": _MIXED},
    "gemma3n_text": {"layer_types": _MIXED},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gemma4_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0},
    "gemma4_unified_text": {"layer_types": _MIXED, "num_kv_shared_layers": 0},
    "kolibri1": {"layer_types": _MIXED},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "moshi": {"audio_vocab_size": 64},
    "zaya": {"num_experts_per_tok": 1},
}


def tiny_config(model_type: str, **changes: Any) -> Any:
    """A tiny configuration of an architecture; ``changes`` are fields of its text model."""
    return _tiny(CONFIG_MAPPING[model_type], model_type, changes)


def _tiny(config_class: Any, model_type: str, changes: Mapping[str, Any]) -> Any:
    default = config_class()
    parts = {}
    for name in getattr(config_class, "sub_configs", {}):
        part = getattr(default, name, None)
        if isinstance(part, PreTrainedConfig):
            is_text = part is default.get_text_config(decoder=True)
            parts[name] = _tiny(type(part), part.model_type, changes if is_text else {}).to_dict()
    known = set(inspect.signature(config_class.__init__).parameters) | set(vars(default))
    fields = {k: v for k, v in _SIZES.items() if k in known and k not in parts}
    if "kv_lora_rank" in known:
        fields["num_key_value_heads"] = fields["num_attention_heads"]
    return config_class(**{**fields, **parts, **_EXCEPTIONS.get(model_type, {}), **({} if parts else changes)})


def tiny_model(model_type: str, *, seed: int = 0, device: str = "cpu", **changes: Any) -> CausalLM:
    """A tiny random model of an architecture, in float32.

    Raises:
        UnsupportedModelError: the architecture cannot be prepared for linking.
        Exception: whatever transformers raises when it cannot build the architecture at this size.
    """
    return random_model(tiny_config(model_type, **changes), seed=seed, device=device)


def random_model(config: Any, *, seed: int = 0, device: str = "cpu") -> CausalLM:
    """A model of ``config`` with wide random weights: nearly uniform attention would hide a wrong position.

    Raises:
        UnsupportedModelError: too large to be tiny, or it cannot be prepared for linking.
    """
    attention, masking = attention_of(config)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _MOST_PARAMETERS:
        raise UnsupportedModelError(f"a tiny model of it has {size / 1e6:.0f} million parameters.")
    torch.manual_seed(seed)
    network = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return prepare(network.to(device), masking)
