"""What can be seen of a document while a model reads it, for those who judge which of its tokens matter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.capture import RotationCall
from kvlink_core.models.key_recipe import OTHER, KeyRecipe, Recipes

#: What is wanted: nothing, the document's own queries, or the attention of a second reading right behind the first.
Reads = Literal["cache", "queries", "again"]

#: Rotates vectors ``[heads, n, dim]`` of a layer to positions ``[n]``, as the model does.
Rotate = Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor]

_REMEDY = "prune with another scorer, e.g. knorm or compactor, which look at the cache alone."


@dataclass(frozen=True, slots=True)
class Reading:
    """What was seen of one document, by layer that caches.

    Attributes:
        rotate: the model's own rotation.
        kinds: layers of which this is equal rotate alike.
        queries: before RoPE, ``[heads, tokens, dim]``; for ``queries``.
        scaling: what scores of attention are multiplied with; for ``queries``.
        attention: float32 ``[kv_heads, tokens]``: the most that any query of the second reading gave; for ``again``.
    """

    rotate: Rotate
    kinds: Sequence[KeyRecipe | None]
    queries: Sequence[torch.Tensor] = ()
    scaling: Sequence[float] = ()
    attention: Sequence[torch.Tensor] = ()


def check_reads(recipes: Recipes, masking: str, reads: Reads) -> None:
    """Raise ``UnsupportedModelError`` where a model of these recipes does not show what is wanted."""
    if reads == "queries" and not all(_shows_queries(recipe, recipes) for recipe in recipes.layers):
        raise UnsupportedModelError(
            "this scorer needs queries before RoPE, and this model rotates them apart from its keys, in part, or not "
            f"in all layers; {_REMEDY}"
        )
    if reads == "again" and masking != "asked":
        raise UnsupportedModelError(
            f"this scorer needs to see attention, and this model has one of its own that cannot be seen; {_REMEDY}"
        )


def _shows_queries(recipe: KeyRecipe | None, recipes: Recipes) -> bool:
    if recipe is None or recipe.slot != "key" or recipe.after is not None:
        return False
    whole = (recipe.begin, recipe.end) == (0, recipes.key_dim)
    return whole and sum(argument is OTHER for argument in recipe.args) == 1


def query_of(recipe: KeyRecipe, calls: Sequence[RotationCall]) -> torch.Tensor:
    """The query before RoPE, ``[batch, heads, tokens, dim]``, of a layer that ``check_reads`` accepts."""
    place = next(i for i, argument in enumerate(recipe.args) if argument is OTHER)
    query: torch.Tensor = calls[recipe.call].args[place]
    return query.transpose(1, 2) if recipe.tokens_first else query


@dataclass(slots=True)
class SecondReading:
    """Watches a pass over documents that stand twice in their rows, padded on the right.

    Attributes:
        recipes: of the model.
        lengths: tokens of each document, once.
        attention: by document and layer, as in ``Reading``.
    """

    recipes: Recipes
    lengths: Sequence[int]
    attention: list[dict[int, torch.Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.attention = [{} for _ in self.lengths]

    def __call__(self, module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> None:
        """Called for each layer with rotated queries and keys, ``[batch, heads, tokens, dim]``."""
        number: Any = getattr(module, "layer_idx", None)
        if number not in self.recipes.numbers:
            return  # a layer that reads another one's keys
        layer = self.recipes.numbers.index(number)
        for row, tokens in enumerate(self.lengths):
            most = most_attention(query[row, :, : 2 * tokens], key[row, :, : 2 * tokens], scaling)
            self.attention[row][layer] = most.view(self.recipes.kv_heads, -1, tokens).amax(1)


def most_attention(query: torch.Tensor, key: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """The most that any query of the second half gives each key of the first: float32 ``[key heads, half]``.

    Args:
        query: ``[heads, 2 half, dim]``, rotated.
        key: ``[key heads, 2 half, dim]``, rotated; the queries of several heads may share one.
        scaling: of the scores; ``None`` for one over the root of dim.
    """
    heads, tokens, dim = query.shape
    half, groups = tokens // 2, heads // key.shape[0]
    ahead = torch.ones(half, tokens, dtype=torch.bool, device=query.device).triu(half + 1)
    found = []
    for number, keys in enumerate(key.float()):  # one head at a time: the weights of all would take much memory
        asked = query[number * groups : (number + 1) * groups, half:].float()
        scores = asked @ keys.T * (dim**-0.5 if scaling is None else scaling)
        weights = scores.masked_fill(ahead, -torch.inf).softmax(dim=2)
        found.append(weights[:, :, :half].amax((0, 1)))
    return torch.stack(found)
