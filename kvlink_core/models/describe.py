"""What a model is, without its weights in memory: enough to tokenize, to plan and to open a store."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoConfig

from kvlink_core.errors import ConfigError, ModelError, ModelNotFoundError
from kvlink_core.fingerprint import Fingerprint
from kvlink_core.models import loader
from kvlink_core.models.shapes import named_shape
from kvlink_core.models.spec import ModelSpec, spec_from_config
from kvlink_core.prompt import PromptLayout

_RANDOM = "random:"


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The parts of a ``LoadedModel`` that need no weights, and equal to its own.

    Attributes:
        spec: shape and attention.
        layout: lays prompts out, tokenizes documents.
        fingerprint: what caches made with this model depend on.
        dtype: dtype of weights and caches.
    """

    spec: ModelSpec
    layout: PromptLayout
    fingerprint: Fingerprint
    dtype: torch.dtype

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return self.spec.context_length

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, uncompressed."""
        spec = self.spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * self.dtype.itemsize


def describe_model(source: str, *, device: str = "cpu", dtype: str | None = None) -> ModelDescription:
    """Describe what ``load_model`` would load with the same arguments; the device need not exist here.

    Reads the weights once, as bytes, for their digest.

    Raises:
        ModelNotFoundError, UnsupportedModelError, ConfigError, ModelError: as ``load_model``.
    """
    if dtype is not None and dtype not in loader.DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(loader.DTYPES)}.", param="dtype")
    directory = _directory(source)
    if source.startswith(_RANDOM):
        config, weights = named_shape(source.removeprefix(_RANDOM)).config, "random:0"
        chosen = loader.DTYPES[dtype or "float32"]
    else:
        for pattern in ("config.json", "*.safetensors"):
            if not any(directory.glob(pattern)):
                raise ModelNotFoundError(
                    f"no model at {str(directory)!r}: it has no {pattern}. "
                    "Give a Hugging Face directory, or 'embedded'.",
                    param="model",
                )
        try:
            config = AutoConfig.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError) as error:  # what transformers raises for damaged files
            reason = str(error).splitlines()[0]
            raise ModelError(f"cannot load the model at {str(directory)!r}: {reason}") from error
        weights = loader.weights_digest(directory)
        if dtype is not None:
            chosen = loader.DTYPES[dtype]
        elif device == "cpu":
            chosen = torch.float32
        elif isinstance(config.dtype, torch.dtype):
            chosen = config.dtype
        else:
            raise ConfigError(f"the model at {str(directory)!r} does not say its dtype; give one.", param="dtype")
    spec = spec_from_config(config)
    layout, _, tokenizer_hash = loader._layout(directory, loader._layout_file(directory))
    fingerprint = Fingerprint(
        model=f"{spec.model_type}-{spec.layers}x{config.hidden_size}",
        weights=weights,
        tokenizer=tokenizer_hash,
        rope=json.dumps(config.rope_parameters, sort_keys=True),
        dtype=str(chosen).removeprefix("torch."),
        template=layout.template.to_json(),
    )
    return ModelDescription(spec, layout, fingerprint, chosen)


def load_layout(source: str) -> PromptLayout:
    """The prompt layout (and so the tokenizer) of a model alone; reads no weights.

    Raises:
        ModelNotFoundError, ConfigError, ModelError: as ``load_model``.
    """
    directory = _directory(source)
    layout, _, _ = loader._layout(directory, loader._layout_file(directory))
    return layout


def _directory(source: str) -> Path:
    """Where the tokenizer and layout of a model are; random weights borrow those of the embedded model."""
    return loader.EMBEDDED_DIRECTORY if source == loader.EMBEDDED or source.startswith(_RANDOM) else Path(source)
