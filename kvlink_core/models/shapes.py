"""Named shapes with random weights, for measuring speed. They answer nothing; their arithmetic costs the real thing."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig

from kvlink_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Shape:
    """A name, the figure people know it by, and its configuration."""

    name: str
    summary: str
    config: LlamaConfig


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=True,
    )


_SHAPES = {
    "llama-100m": (
        "100 M parameters: 768 wide, 12 layers, 12 query and 4 KV heads",
        (768, 12, 12, 4, 2304, 16_384),
    ),
    "llama-1b": (
        "Llama-3.2-1B: 2048 wide, 16 layers, 32 query and 8 KV heads",
        (2048, 16, 32, 8, 8192, 128_256),
    ),
    "llama-8b": (
        "Llama-3.1-8B: 4096 wide, 32 layers, 32 query and 8 KV heads",
        (4096, 32, 32, 8, 14_336, 128_256),
    ),
}


def shape_names() -> tuple[str, ...]:
    """All named shapes."""
    return tuple(_SHAPES)


def named_shape(name: str) -> Shape:
    """Look a shape up.

    Raises:
        ConfigError: no such shape.
    """
    if name not in _SHAPES:
        raise ConfigError(f"unknown shape {name!r}; there are {', '.join(_SHAPES)}.", param="model")
    summary, sizes = _SHAPES[name]
    return Shape(name, summary, _llama(*sizes))
