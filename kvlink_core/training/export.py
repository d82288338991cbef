"""Writes the embedded model as a Hugging Face directory: weights, configuration, tokenizer and ``kvlink.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from kvlink_core.training.llama import Shape
from kvlink_core.training.tokenizer import BOS, END, LINKS, MEM_END, MEM_START, PAD

MAX_POSITIONS = 8192


def _write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def export_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write ``tokenizer.json``, ``tokenizer_config.json``, ``chat_template.jinja`` and ``kvlink.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(str(folder))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    # The class that every transformers release knows; newer ones write a name that older ones refuse.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    _write_json(path, config)

    def id_of(token: str) -> int:
        return int(tokenizer.convert_tokens_to_ids(token))

    kvlink = {
        "format": 1,
        "name": "kvlink-embedded",
        "documents_in": "user",
        "document_template": "Passage: {text}\n",
        "titled_document_template": "Passage: {title}. {text}\n",
        "mem_start": [id_of(MEM_START)],
        "mem_end": [id_of(MEM_END)],
        "link_tokens": {"k": len(LINKS), "ids": [id_of(link) for link in LINKS], "per_place": False},
        "default_linker": "link-tokens",
    }
    _write_json(folder / "kvlink.json", kvlink)


def export_weights(
    shape: Shape, weights: Mapping[str, Tensor], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    """Write ``model.safetensors`` in bfloat16, ``config.json`` and ``generation_config.json``."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().cpu().to(torch.bfloat16).contiguous() for name, tensor in weights.items()}
    (folder / "model.safetensors").write_bytes(save(tensors, metadata={"format": "pt"}))
    bos, eos, pad = (int(tokenizer.convert_tokens_to_ids(token)) for token in (BOS, END, PAD))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": shape.vocabulary,
        "hidden_size": shape.width,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": MAX_POSITIONS,
        "rms_norm_eps": shape.norm_eps,
        # Both spellings, so that releases before and after `rope_parameters` read the same base.
        "rope_theta": shape.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": shape.rope_theta},
        "attention_bias": False,
        "attention_dropout": 0.0,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        "initializer_range": 0.06,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "pad_token_id": pad,
        "dtype": "bfloat16",
        "use_cache": True,
    }
    _write_json(folder / "config.json", config)
    _write_json(
        folder / "generation_config.json",
        {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad, "do_sample": False, "max_new_tokens": 64},
    )
