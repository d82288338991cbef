"""Named shapes with random weights, for measuring speed: they answer nothing, and cost what the real thing costs."""

from __future__ import annotations

from transformers import LlamaConfig

from kvlink_core.errors import ConfigError


def _llama(hidden: int, layers: int, heads: int, kv_heads: int, inner: int, vocab: int, tied: bool) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        vocab_size=vocab,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        tie_word_embeddings=tied,
    )


_SHAPES = {
    # for tests of what measures: it costs nothing
    "llama-tiny": (64, 2, 4, 2, 128, 3072, True),
    "llama-100m": (768, 12, 12, 4, 2304, 16_384, True),
    # Llama-3.2-1B and Llama-3.1-8B, but for their scaling of RoPE, which costs nothing at a prompt
    "llama-1b": (2048, 16, 32, 8, 8192, 128_256, True),
    "llama-8b": (4096, 32, 32, 8, 14_336, 128_256, False),
}


def named_shape(name: str) -> LlamaConfig:
    """The configuration of a named shape.

    Raises:
        ConfigError: no such shape.
    """
    if name not in _SHAPES:
        raise ConfigError(f"unknown shape {name!r}; there are {', '.join(_SHAPES)}.", param="model")
    return _llama(*_SHAPES[name])
