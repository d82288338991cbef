"""What a decode step costs without an engine: transformers' own forward over a batch whose contexts are ready."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.benchmark.candidates import stock_attention
from kvlink_core.benchmark.rounds import Clock
from kvlink_core.models import LoadedModel


class BareBatch:
    """A batch of prompts of one length, each with keys and values of its own, as ``generate`` would hold them.

    Their content is random: it does not matter to speed. Use as a context manager; its memory is freed at the end.

    Args:
        model: run with stock ``sdpa`` attention.
        batch: prompts.
        length: tokens in each one's cache.
    """

    def __init__(self, model: LoadedModel, *, batch: int, length: int) -> None:
        self._model = model
        self._batch = batch
        self._length = length
        self._slots: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __enter__(self) -> BareBatch:
        model = self._model
        (_, heads, _, key_dim), (*_, value_dim) = model.recipes.shapes(1)
        with torch.inference_mode():
            for _ in model.recipes.numbers:
                shape = (self._batch, heads, self._length + 1)
                keys = torch.randn(*shape, key_dim, dtype=model.dtype, device=model.device)
                values = torch.randn(*shape, value_dim, dtype=model.dtype, device=model.device)
                self._slots.append((keys, values))
        return self

    def __exit__(self, *_: object) -> None:
        self._slots.clear()

    @torch.inference_mode()
    def step(self, clock: Clock, *, grow: bool) -> float:
        """Seconds of one step.

        Args:
            clock: of the model's device.
            grow: as ``DynamicCache`` does it, with new tensors of old and new slots in each layer; else the new slots
                are written behind the old ones, which is the least that can be done.
        """
        model = self._model
        cache = self._grown() if grow else _InPlace(self._slots, model.recipes.numbers, self._length)
        token_ids = torch.full((self._batch, 1), 3, device=model.device)
        positions = torch.full((self._batch, 1), self._length, device=model.device)
        with stock_attention(model):
            seconds, _ = clock.time(
                lambda: model.network(
                    input_ids=token_ids, position_ids=positions, past_key_values=cache, use_cache=True
                ).logits.argmax(-1)
            )
        return seconds

    def _grown(self) -> DynamicCache:
        numbers = self._model.recipes.numbers
        pairs: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * (numbers[-1] + 1)
        for number, (keys, values) in zip(numbers, self._slots, strict=True):
            pairs[number] = (keys[:, :, :1], values[:, :, :1])
        cache = DynamicCache(pairs)
        for number, (keys, values) in zip(numbers, self._slots, strict=True):
            cache.layers[number].keys, cache.layers[number].values = keys[:, :, :-1], values[:, :, :-1]
        return cache


class _InPlace(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    def __init__(self, slots: list[tuple[torch.Tensor, torch.Tensor]], numbers: Any, length: int) -> None:
        super().__init__()
        self._slots = dict(zip(numbers, slots, strict=True))
        self._filled = length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        keys, values = self._slots[layer_idx]
        keys[:, :, self._filled :] = key_states
        values[:, :, self._filled :] = value_states
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._filled

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._filled + query_length, 0
