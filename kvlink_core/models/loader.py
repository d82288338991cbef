"""Load a model for linking: its description, its weights, and the handles that capture and RoPE need."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from kvlink_core.errors import ConfigError, ModelError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.models.causal_lm import CausalLM, attention_of, prepare
from kvlink_core.models.describe import EMBEDDED, ModelDescription, describe_model
from kvlink_core.models.key_recipe import Recipes
from kvlink_core.models.rope import Rotary
from kvlink_core.models.spec import ModelSpec
from kvlink_core.prompt import PromptLayout
from kvlink_core.text import first_line


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model ready to encode, link and generate. Shared by threads; its weights are never changed.

    Attributes:
        description: what the model is.
        lm: its network, made ready for encoding and linking.
        stop_ids: token ids that end an answer.
    """

    description: ModelDescription
    lm: CausalLM
    stop_ids: frozenset[int]

    @property
    def name(self) -> str:
        """Public model id."""
        return self.description.name

    @property
    def network(self) -> Any:
        """The Hugging Face causal language model."""
        return self.lm.network

    @property
    def rotary(self) -> Rotary:
        """Re-positions keys."""
        return self.lm.rotary

    @property
    def recipes(self) -> Recipes:
        """What the model caches, and in which shapes."""
        return self.lm.recipes

    @property
    def spec(self) -> ModelSpec:
        """Shape and attention."""
        return self.description.spec

    @property
    def layout(self) -> PromptLayout:
        """Lays prompts out."""
        return self.description.layout

    @property
    def fingerprint(self) -> Fingerprint:
        """What caches made with this model depend on."""
        return self.description.fingerprint

    @property
    def default_linker(self) -> str:
        """The linker that suits the model: ``link-tokens`` when it was trained with them."""
        return self.description.default_linker

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return self.spec.context_length

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.lm.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and caches."""
        return self.description.dtype


def load_model(source: str = EMBEDDED, *, device: str = "cpu", dtype: str | None = None) -> LoadedModel:
    """Load a model.

    Args:
        source: ``embedded`` (the small model that ships), a Hugging Face directory, or ``random:NAME`` for a named
            shape with random weights (see ``kvlink_core.models.shapes``), of use for measuring speed only.
        device: a torch device.
        dtype: ``float32``, ``bfloat16`` or ``float16``; the default is float32 on CPU and the checkpoint's own
            elsewhere (bfloat16 for random weights).

    Raises:
        ModelNotFoundError: no such directory, or it lacks a file.
        UnsupportedModelError: the architecture does not link exactly, or cannot be given the soft wrap that it has.
        ConfigError: an unknown dtype, device or key of ``kvlink.json``; a soft wrap of another model.
        ModelError: the files are there and cannot be loaded.
    """
    where = _usable(device)
    description = describe_model(source, device=where.type, dtype=dtype)
    attention, masking = attention_of(description.config)
    network = _random(description, attention, where) if description.random else _pretrained(description, attention)
    lm = prepare(network.to(where), masking)
    if description.soft_wrap is not None:
        description.soft_wrap.check(lm)
    return assemble(description, lm)


def assemble(description: ModelDescription, lm: CausalLM) -> LoadedModel:
    """A loaded model from its two halves."""
    end = lm.network.generation_config.eos_token_id
    stop_ids = {end} if isinstance(end, int) else set(end or ())
    if description.layout.end_id is not None:
        stop_ids.add(description.layout.end_id)
    return LoadedModel(description, lm, frozenset(stop_ids))


def _usable(device: str) -> torch.device:
    try:
        where = torch.device(device)
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:  # torch has no class of its own for this
        raise ConfigError(f"device {device!r} cannot be used here: {first_line(error)}") from error
    return where


def _random(description: ModelDescription, attention: str, where: torch.device) -> Any:
    torch.manual_seed(0)
    with where:  # drawn where they stay: 8 billion numbers take a GPU a moment, and a CPU minutes and its memory
        return AutoModelForCausalLM.from_config(
            description.config, attn_implementation=attention, dtype=description.dtype
        )


def _pretrained(description: ModelDescription, attention: str) -> Any:
    directory = str(description.directory)
    transformers_logging.disable_progress_bar()  # it writes over ours, and into the logs of every replica
    try:
        network, report = AutoModelForCausalLM.from_pretrained(
            directory,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation=attention,
            dtype=description.dtype,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:  # what damaged files give
        raise ModelError(f"cannot load the model at {directory!r}: {first_line(error)}") from error
    if report["missing_keys"]:
        # transformers would fill these with random numbers and only log it.
        raise ModelError(
            f"the weights at {directory!r} lack {len(report['missing_keys'])} tensors, "
            f"{sorted(report['missing_keys'])[0]!r} among them; the download or the export is incomplete."
        )
    return network
