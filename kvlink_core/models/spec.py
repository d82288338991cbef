"""What the rest of the system must know of a model before its weights are there, read from its configuration.

An architecture is either known to meet the oracle (``kvlink architectures``; the table is ``architectures.json``) or
refused with the reason: nothing is served by a model that was never checked.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import transformers

from kvlink_core.errors import ConfigError, UnsupportedModelError

logger = logging.getLogger(__name__)

#: RoPE kinds whose rotation of a position does not depend on the length of the prompt.
LENGTH_FREE_ROPE = ("default", "linear", "llama3", "yarn", "proportional")

#: RoPE kinds whose frequencies change once a prompt outgrows the original context. That changes the hidden states
#: *inside* a document too, so a cache made alone is exact up to that length and not beyond.
LENGTH_BOUND_ROPE = ("dynamic", "longrope")

#: Kinds of layers whose cache is keys and values, one of each per token.
ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")

_TABLE = Path(__file__).with_name("architectures.json")


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Shape and reach of a model.

    Attributes:
        model_type: Hugging Face's ``model_type``.
        layers, kv_heads, key_dim, value_dim: what one token takes in the cache, for estimates before loading; the
            loaded model knows exactly.
        vocab_size: token ids that it knows.
        context_length: positions that it is exact for.
        context_reason: why ``context_length`` is less than what the model was made for, or "".
    """

    model_type: str
    layers: int
    kv_heads: int
    key_dim: int
    value_dim: int
    vocab_size: int
    context_length: int
    context_reason: str = ""


@cache
def architecture_table() -> Mapping[str, Mapping[str, str]]:
    """By ``model_type``: ``class``, ``status`` (``exact`` or ``refused``) and ``remark``."""
    table = json.loads(_TABLE.read_text())
    if table["transformers"] != transformers.__version__:
        logger.warning(
            "architectures were judged with transformers %s, this is %s: `kvlink architectures --check` judges again",
            table["transformers"], transformers.__version__,
        )  # fmt: skip
    return table["architectures"]  # type: ignore[no-any-return]


def exact_model_types() -> tuple[str, ...]:
    """The ``model_type`` of every architecture whose linked logits meet the oracle."""
    return tuple(name for name, row in architecture_table().items() if row["status"] == "exact")


def check_architecture(model_type: str) -> None:
    """Raises ``UnsupportedModelError`` unless the architecture is known to link exactly."""
    row = architecture_table().get(model_type)
    if row is None:
        raise UnsupportedModelError(
            f"architecture {model_type!r} was never checked against the oracle, so it is not served. "
            "`kvlink architectures` lists those that were."
        )
    if row["status"] != "exact":
        raise UnsupportedModelError(f"architecture {model_type!r} does not link exactly: {row['remark']}")


def spec_from_config(config: Any) -> ModelSpec:
    """Read a ``PretrainedConfig``, that of a text model or of one with a text model inside.

    Raises:
        UnsupportedModelError: a setting changes what a document's cache is in a way that cannot be linked.
    """
    text = config.get_text_config(decoder=True)
    if getattr(text, "alibi", False):
        raise UnsupportedModelError(
            "this model adds a bias by distance (ALiBi) instead of rotating its keys, which is not supported."
        )
    others = set(getattr(text, "layer_types", None) or ()) - set(ATTENTION_LAYERS)
    if others:
        raise UnsupportedModelError(
            f"its {' and '.join(sorted(others))} layers keep a state of another kind than keys and values of tokens, "
            "which caches of single documents cannot restore."
        )
    if getattr(text, "max_position_embeddings", None) is None:
        raise UnsupportedModelError("its configuration names no number of positions: it does not rotate its keys.")
    heads = int(text.num_attention_heads)
    latent = getattr(text, "kv_lora_rank", None)
    head_dim = int(getattr(text, "head_dim", None) or text.hidden_size // heads)
    length, reason = exact_length(text)
    return ModelSpec(
        model_type=str(config.model_type),
        layers=int(text.num_hidden_layers),
        kv_heads=1 if latent else int(getattr(text, "num_key_value_heads", None) or heads),
        key_dim=int(latent or head_dim),
        value_dim=int(text.qk_rope_head_dim if latent else head_dim),
        vocab_size=int(text.vocab_size),
        context_length=length,
        context_reason=reason,
    )


def exact_length(config: Any) -> tuple[int, str]:
    """How long a prompt may get while documents encoded alone stay exact, and why not longer ("" when it is all).

    Raises:
        UnsupportedModelError: a RoPE kind that is not known.
    """
    limits = [(int(config.max_position_embeddings), "")]
    for rope in _rope_settings(config):
        # A fixed "alpha" makes a "dynamic" RoPE of Hunyuan static.
        kind = "default" if rope.get("alpha") else rope.get("rope_type", "default")
        if kind not in LENGTH_FREE_ROPE + LENGTH_BOUND_ROPE:
            raise UnsupportedModelError(
                f"RoPE type {kind!r} is not known; supported: {', '.join(LENGTH_FREE_ROPE + LENGTH_BOUND_ROPE)}."
            )
        original = int(rope.get("original_max_position_embeddings") or config.max_position_embeddings)
        if kind in LENGTH_BOUND_ROPE and not _one_regime(rope):
            limits.append((original, f"beyond, RoPE type {kind!r} changes what a document's own tokens compute"))
        if rope.get("llama_4_scaling_beta"):
            limits.append((original, _TEMPERATURE))
    if getattr(config, "attn_temperature_tuning", False):
        limits.append((int(config.floor_scale) - 1, _TEMPERATURE))
    return min(limits, key=lambda limit: (limit[0], not limit[1]))


def with_long_rope(config: Any) -> Any:
    """A copy of a configuration that uses the long factors of RoPE type "longrope" at every length.

    A document is encoded alone and so is short; with one set of factors it has the same keys in a long prompt.

    Raises:
        ConfigError: the model has no such RoPE.
    """
    config = copy.deepcopy(config)
    found = [r for r in _rope_settings(config.get_text_config(decoder=True)) if r.get("rope_type") == "longrope"]
    if not found:
        raise ConfigError("kvlink.json sets long_context, which only models of RoPE type 'longrope' have.")
    for rope in found:
        rope["short_factor"] = rope["long_factor"]
    return config


def _one_regime(rope: Mapping[str, Any]) -> bool:
    return "long_factor" in rope and rope["long_factor"] == rope.get("short_factor")


_TEMPERATURE = "beyond, attention is scaled by a token's position in the prompt, which a document encoded alone lacks"


def _rope_settings(config: Any) -> Iterator[dict[str, Any]]:
    """The RoPE settings of all kinds of layers."""
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [v for v in rope.values() if isinstance(v, dict)]
    yield from nested or [rope]
