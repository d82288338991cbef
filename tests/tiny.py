"""Tiny random models on disk: every supported architecture, a byte tokenizer, control and link tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
)

CONTROL = ("<bos>", "<end>", "<user>", "<assistant>", "<system>", "<mem>", "</mem>", "<l0>", "<l1>", "<l2>")
VOCABULARY = 256 + len(CONTROL)
CHAT_TEMPLATE = (
    "<bos>{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, and the control tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in CONTROL])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<end>", pad_token="<end>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_configs(context: int = 2048, layers: int = 3) -> dict[str, PreTrainedConfig]:
    """A configuration per architecture and RoPE kind; windows smaller than the documents of the tests."""
    size: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        # Wide weights: with the usual 0.02 attention is nearly uniform and a wrong position would hardly show.
        "initializer_range": 0.4,
        "bos_token_id": 256,
        "eos_token_id": 257,
        "pad_token_id": 257,
    }
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    llama3 = {
        "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
    }  # fmt: skip
    linear = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
    qwen_window = {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1}
    latent = {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
        "v_head_dim": 12, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1,
        "n_shared_experts": 1, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
    }  # fmt: skip
    return {
        "deepseek_v3": DeepseekV3Config(**{**size, **latent}),
        "llama": LlamaConfig(**size),
        "llama-yarn": LlamaConfig(**size, rope_parameters=yarn),
        "llama-llama3": LlamaConfig(**size, rope_parameters=llama3),
        "llama-linear": LlamaConfig(**size, rope_parameters=linear),
        "qwen2": Qwen2Config(**size),
        "qwen2-window": Qwen2Config(**size, **qwen_window),
        "qwen3": Qwen3Config(**size, head_dim=16),
        "qwen3-window": Qwen3Config(**size, head_dim=16, **qwen_window),
        "mistral": MistralConfig(**size, sliding_window=None),
        "mistral-window": MistralConfig(**size, sliding_window=9),
        "gemma2": Gemma2Config(**size, head_dim=16, sliding_window=9, query_pre_attn_scalar=16),
    }


def save_tiny(directory: Path, config: PreTrainedConfig | None = None, *, seed: int = 0) -> Path:
    """Write a Hugging Face directory with random weights, the byte tokenizer and a ``kvlink.json``."""
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config or tiny_configs()["llama"]).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    layout = {
        "format": 1,
        "name": "tiny",
        "documents_in": "user",
        "document_template": "* {text}\n",
        "titled_document_template": "* {title}: {text}\n",
        "mem_start": [261],
        "mem_end": [262],
        "link_tokens": {"k": 3, "ids": [263, 264, 265], "per_place": False},
    }
    (directory / "kvlink.json").write_text(json.dumps(layout))
    return directory
