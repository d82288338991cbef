"""The network that a recipe trains, and what of it is trained."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvlink_core.errors import ConfigError, ModelError
from kvlink_core.models.describe import describe_model
from kvlink_core.models.spec import check_architecture
from kvlink_core.template import FIRST_WRAP_ID
from kvlink_core.text import first_line
from kvlink_core.training.recipes.config import Recipe
from kvlink_core.training.recipes.directory import Target
from kvlink_core.training.recipes.masks import check_layers
from kvlink_core.training.recipes.trainee import Rows, Trainee, start_of_rows


def load_network(recipe: Recipe, target: Target) -> Any:
    """The base's network, with room for added tokens, ready for training."""
    description = describe_model(str(target.base))
    check_architecture(description.config.model_type)
    check_layers(description.config)
    frozen = recipe.train != "model" or recipe.lora is not None
    dtype: Any = "auto" if frozen and recipe.dtype == "bfloat16" else torch.float32
    transformers_logging.disable_progress_bar()
    try:
        network = AutoModelForCausalLM.from_pretrained(
            str(target.base),
            local_files_only=True,
            use_safetensors=True,
            dtype=dtype,
            attn_implementation="flex_attention" if recipe.attention == "flex" else plain_attention(description.config),
        )
    except (OSError, ValueError, RuntimeError, KeyError, ImportError) as error:
        raise ModelError(f"cannot load the model at {str(target.base)!r} for training: {first_line(error)}") from error
    if target.added and max(target.added) >= network.get_input_embeddings().weight.shape[0]:
        network.resize_token_embeddings(max(target.added) + 1, mean_resizing=False)
        like = network.get_input_embeddings().weight
        with torch.no_grad():
            first = min(target.added)
            start = start_of_rows(network, target.added, list(range(min(first, 1000))), recipe.seed)
            like[list(target.added)] = start.to(like.dtype)
    if recipe.gradient_checkpointing:
        # transformers 5.17 knows the second name only, and 5.23 warns of it.
        enable = getattr(network, "activation_checkpointing_enable", None) or network.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return network


def plain_attention(config: Any) -> str:
    """The implementation of attention that takes a 4-D mask: SDPA, or where a model lacks it its own."""
    return "sdpa" if AutoModelForCausalLM._model_mapping[type(config)]._supports_sdpa else "eager"


def make_trainee(recipe: Recipe, target: Target, network: Any) -> Trainee:
    """What the recipe trains of ``network``; the rest of it is frozen."""
    if recipe.train == "model" and recipe.lora is None:
        rows = None
    else:
        network.requires_grad_(False)
        rows = _rows(recipe, target, network)
        if recipe.lora is not None:
            network = _with_lora(recipe, network)
        network.train()
    tied = None
    head = network.get_output_embeddings()
    if rows is not None and recipe.train != "wrap" and head is not None:
        tied = head if head.weight is network.get_input_embeddings().weight else None
    dtype = torch.bfloat16 if recipe.dtype == "bfloat16" else torch.float32
    mask_dtype = dtype if rows is None else network.get_input_embeddings().weight.dtype
    return Trainee(network, rows, tied=tied, attention=recipe.attention, dtype=mask_dtype)


def _rows(recipe: Recipe, target: Target, network: Any) -> Rows | None:
    if recipe.train == "wrap":
        ids = tuple(range(FIRST_WRAP_ID, FIRST_WRAP_ID + recipe.wrap.header + recipe.wrap.trailer))
        like = target.layout.plain_tokens("\n") or [0]
        return Rows(ids, start_of_rows(network, ids, like, recipe.seed))
    if target.links is None:
        return None
    ids = target.links.ids
    embedding = network.get_input_embeddings()
    with torch.no_grad():
        own = embedding(torch.tensor([ids]))[0].float()
    like = list(target.layout.mem_end) or target.layout.plain_tokens("\n") or [0]
    spread = embedding.weight[: min(2000, embedding.weight.shape[0])].float().std()
    # Reserved tokens that nothing was trained on may all be one point, or far smaller than the others.
    alike = bool(own.std(0).mean() < 0.1 * spread) and len(ids) > 1
    return Rows(ids, start_of_rows(network, ids, like, recipe.seed) if alike else own)


def _with_lora(recipe: Recipe, network: Any) -> Any:
    assert recipe.lora is not None
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ConfigError("a LoRA adapter needs the extra 'train': pip install 'kvlink[train]'.") from error
    targets = recipe.lora.targets if isinstance(recipe.lora.targets, str) else list(recipe.lora.targets)
    config = LoraConfig(
        r=recipe.lora.rank, lora_alpha=recipe.lora.alpha, lora_dropout=recipe.lora.dropout, target_modules=targets,
        task_type="CAUSAL_LM",
    )  # fmt: skip
    try:
        return get_peft_model(network, config)
    except ValueError as error:
        raise ConfigError(f"lora.targets do not fit this model: {first_line(error)}") from error
