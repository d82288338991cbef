"""What the rest of the system must know of a model's attention, read from its Hugging Face configuration.

An architecture is either known to meet the oracle (``tests/linking``) or refused by name: nothing is served by a
model that was never checked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from kvlink_core.errors import UnsupportedModelError

#: ``model_type`` of the architectures whose linked logits meet the oracle in float32.
SUPPORTED_MODEL_TYPES = ("gemma2", "llama", "mistral", "qwen2", "qwen3")

#: RoPE kinds whose rotation of a position does not depend on the length of the prompt. The others ("dynamic",
#: "longrope") change the hidden states *inside* a document once the whole prompt outgrows the original context, so
#: a cache made alone would be wrong there.
LENGTH_FREE_ROPE = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape of a model's key/value cache and reach of its attention.

    Attributes:
        model_type: Hugging Face's ``model_type``.
        layers, kv_heads, head_dim: shape of K and V: ``[layers, kv_heads, tokens, head_dim]``.
        context_length: positions the model was made for.
        windows: per layer, how many tokens back (itself included) a token may see; ``None`` for all.
        mask_kinds: per layer, the name under which the model looks its mask up in a mapping, or ``None`` when the
            model takes one mask for all layers.
        attention: ``sdpa``, or ``eager`` where the model's attention has a term that SDPA lacks (soft-capping).
    """

    model_type: str
    layers: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    context_length: int
    windows: tuple[int | None, ...]
    mask_kinds: tuple[str | None, ...]
    attention: str

    @property
    def windowed(self) -> bool:
        """Whether any layer sees less than everything before it."""
        return any(w is not None for w in self.windows)


def spec_from_config(config: Any) -> ModelSpec:
    """Read a ``PretrainedConfig``.

    Raises:
        UnsupportedModelError: the architecture or its RoPE kind was not shown to link exactly.
    """
    model_type = str(config.model_type)
    if model_type not in SUPPORTED_MODEL_TYPES:
        raise UnsupportedModelError(
            f"architecture {model_type!r} is not among those that link exactly: "
            f"{', '.join(SUPPORTED_MODEL_TYPES)}. Use one of these."
        )
    rope = config.rope_parameters or {}
    kind = rope.get("rope_type", "default")
    if kind not in LENGTH_FREE_ROPE:
        raise UnsupportedModelError(
            f"RoPE type {kind!r} depends on the length of the whole prompt, so a document encoded alone would "
            f"differ from the same document in a long prompt; supported: {', '.join(LENGTH_FREE_ROPE)}."
        )
    layers = int(config.num_hidden_layers)
    heads = int(config.num_attention_heads)
    layer_types = getattr(config, "layer_types", None)  # present in configs that mix kinds of attention
    window = getattr(config, "sliding_window", None)
    if layer_types is None:
        windows: tuple[int | None, ...] = (window,) * layers
        kinds: tuple[str | None, ...] = (None,) * layers
    else:
        windows = tuple(window if t == "sliding_attention" else None for t in layer_types)
        kinds = tuple(layer_types)
    softcap = getattr(config, "attn_logit_softcapping", None)
    return ModelSpec(
        model_type=model_type,
        layers=layers,
        kv_heads=int(getattr(config, "num_key_value_heads", None) or heads),
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // heads),
        vocab_size=int(config.vocab_size),
        context_length=int(config.max_position_embeddings),
        windows=windows,
        mask_kinds=kinds,
        attention="eager" if softcap is not None else "sdpa",
    )
