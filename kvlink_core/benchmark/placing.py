"""``kvlink bench place``: ways to rotate documents' keys and write keys and values into their place.

``plain`` is the model's own function as torch runs it. ``each alone`` places document by document: on a CPU a few
layers at a time, which stay in its cache, on an accelerator fused by ``torch.compile``. ``all at once`` is what linking
does: on an accelerator one launch of a Triton kernel where the model rotates in halves, else as ``each alone``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LlamaConfig

from kvlink_core.benchmark.rounds import Clock
from kvlink_core.conformance.tiny import random_model
from kvlink_core.errors import ConfigError
from kvlink_core.models import rope
from kvlink_core.models.key_recipe import Recipes
from kvlink_core.models.rope import Rotary


@dataclass(frozen=True, slots=True)
class PlacingCase:
    """What is placed: ``documents`` of ``tokens`` each, with a gap of ``links`` after each."""

    layers: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    documents: int = 10
    tokens: int = 500
    links: int = 5

    @property
    def slots(self) -> int:
        """Positions in all."""
        return self.documents * (self.tokens + self.links)

    @property
    def starts(self) -> tuple[int, ...]:
        """Each document's first position."""
        return tuple(range(0, self.slots, self.tokens + self.links))


@dataclass(frozen=True, slots=True)
class Placed:
    """One way: seconds of every run, and the largest difference from ``plain``, relative to the largest key."""

    name: str
    seconds: tuple[float, ...]
    difference: float

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


Documents = Sequence[tuple[torch.Tensor, torch.Tensor]]
Way = Callable[[Documents, torch.Tensor, torch.Tensor], None]


@torch.inference_mode()
def measure_placing(case: PlacingCase, device: str, dtype: torch.dtype, repeats: int) -> list[Placed]:
    """Time each way that runs on ``device``, alternately, after two rounds that are not counted.

    Raises:
        ConfigError: no such device.
    """
    try:
        where = torch.device(device)
        torch.manual_seed(0)
        shape = (case.layers, case.kv_heads, case.tokens, case.head_dim)
        documents = [
            (torch.randn(shape, device=where).to(dtype), torch.randn(shape, device=where).to(dtype))
            for _ in range(case.documents)
        ]
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {device!r} cannot be used here: {error}") from error
    recipes = _recipes(case, where)
    rotary = Rotary(recipes)
    tables = rotary.tables(torch.arange(case.slots, device=where))

    def by(place: Callable[..., None]) -> Way:
        def way(given: Documents, out_keys: torch.Tensor, out_values: torch.Tensor) -> None:
            for (keys, values), start in zip(given, case.starts, strict=True):
                at = slice(start, start + case.tokens)
                sliced = tables.slice(at.start, at.stop)
                place(keys, values, sliced, out_keys[:, :, at], out_values[:, :, at])

        return way

    ways: dict[str, Way] = {
        "plain": by(lambda k, v, t, ok, ov: rope._place(recipes.layers[0], k, v, t.sources, ok, ov)),
        "each alone": by(rotary.place),
        "all at once": lambda given, ok, ov: rotary.place_all(given, case.starts, tables, ok, ov),
    }
    out = [torch.zeros(case.layers, case.kv_heads, case.slots, case.head_dim, dtype=dtype, device=where)] * 2
    out[1] = torch.zeros_like(out[0])
    clock = Clock(where)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    placed: dict[str, list[torch.Tensor]] = {}
    for turn in range(repeats + 2):
        for name, way in ways.items():
            spent, _ = clock.time(lambda way=way: way(documents, *out))  # type: ignore[misc]
            if turn >= 2:
                seconds[name].append(spent)
            elif turn == 0:
                placed[name] = [t.float().cpu() for t in out]
    scale = float(placed["plain"][0].abs().max())
    return [
        Placed(
            name,
            tuple(seconds[name]),
            max(float((a - b).abs().max()) for a, b in zip(placed[name], placed["plain"], strict=True)) / scale,
        )
        for name in ways
    ]


def _recipes(case: PlacingCase, device: torch.device) -> Recipes:
    """Those of a Llama with heads of this width; one layer shows how all of them rotate."""
    config = LlamaConfig(
        hidden_size=4 * case.head_dim,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_hidden_layers=1,
        intermediate_size=64,
        vocab_size=96,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
    )
    lm = random_model(config, device=str(device))
    return replace(lm.recipes, layers=lm.recipes.layers * case.layers, numbers=tuple(range(case.layers)))
