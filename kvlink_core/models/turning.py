"""Turn queries back, so that a document rotated once at its own positions 0..n-1 can be read where it lies.

RoPE is relative: the product of a query at position p with the key of token j of a document that starts at position o
is that of the query turned back by o with the key at position j (DESIGN section 3). Turning back is the model's own
rotation by o with its sines negated, without the factor by which some RoPE kinds (yarn) lengthen what they rotate.
Whether that holds for a model is tried, not assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlink_core.models.key_recipe import KeyRecipe, Recipes, Tables

#: Positions and distances of the trial; beyond them the angles' own rounding in float32 would hide a fault.
_TRIALS = ((9, 4), (130, 57), (1000, 999), (2047, 1024))

#: What float32 makes of angles of some thousand radians.
_TOLERANCE = 2e-3


@dataclass(frozen=True, slots=True)
class _Inverse:
    """How the tables of a source become those of the opposite rotation: what to multiply each part with."""

    signs: tuple[float, ...]
    conjugated: tuple[bool, ...]

    def of(self, parts: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        pairs = zip(parts, self.signs, self.conjugated, strict=True)
        return tuple(part.conj() * sign if conjugate else part * sign for part, sign, conjugate in pairs)


class QueryTurner:
    """Turns the rotated queries of one model back. Safe to use from several threads.

    Args:
        recipes: how the model rotates.
        device: where it is.
        positions: how many it was made for.

    Attributes:
        composes: whether turning back is exact for every layer of this model. Where it is not, documents must be
            placed at their positions of each prompt.
    """

    def __init__(self, recipes: Recipes, device: torch.device, *, positions: int) -> None:
        self._recipes = recipes
        self._trials = [trial for trial in _TRIALS if trial[0] < positions]
        self._inverses: list[_Inverse] = []
        self.composes = self._try(device)

    @torch.inference_mode()
    def tables(self, distances: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
        """Tables, by source, that turn back by int64 ``distances [n]``."""
        distinct, where = torch.unique(distances, return_inverse=True)
        made = []
        for source, inverse in zip(self._recipes.sources, self._inverses, strict=True):
            parts = inverse.of(source.tables(distinct))
            made.append(tuple(part.index_select(1, where) for part in parts))
        return made

    def turn(self, layer: int, queries: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Queries ``[kv_heads, n, groups, dim]`` of a layer, rotated to their positions, turned back.

        Args:
            layer: counted among those that cache.
            queries: in any dtype; not changed.
            tables: as ``tables`` made them for n distances.

        Returns:
            The same shape and dtype, computed in float32.
        """
        recipe = self._recipes.layers[layer]
        if recipe is None:
            return queries
        if recipe.halves:
            cos, sin = tables[recipe.source]
            return _in_halves(queries.float(), cos[0, :, None], sin[0, :, None]).to(queries.dtype)
        heads, count, groups, width = queries.shape
        flat = queries.transpose(1, 2).reshape(1, heads * groups, count, width).float()
        turned = recipe.rotated(flat, tables)
        return turned.view(heads, groups, count, width).transpose(1, 2).to(queries.dtype)

    @torch.inference_mode()
    def _try(self, device: torch.device) -> bool:
        recipes = self._recipes
        if any(recipe is not None and recipe.slot != "key" for recipe in recipes.layers):
            return False  # it is not keys that are cached
        zero = torch.zeros(1, dtype=torch.int64, device=device)
        for source in recipes.sources:
            parts = source.tables(zero)
            longest = max(float(part.abs().max()) for part in parts) or 1.0  # sines may be a source of their own
            # At position 0 a sine is 0 and a cosine is what the RoPE kind lengthens by.
            signs = [-1.0 if not part.is_complex() and float(part.abs().max()) == 0 else 1.0 for part in parts]
            self._inverses.append(
                _Inverse(tuple(sign / longest for sign in signs), tuple(part.is_complex() for part in parts))
            )
        distinct = {recipe for recipe in recipes.layers if recipe is not None}
        return all(self._composes(recipe, device) for recipe in distinct)

    def _composes(self, recipe: KeyRecipe, device: torch.device) -> bool:
        layer = self._recipes.layers.index(recipe)
        drawn = torch.randn(2, 1, 1, self._recipes.key_dim, generator=torch.Generator().manual_seed(0)).to(device)

        def rotated(position: int) -> torch.Tensor:
            at = torch.tensor([position], device=device)
            return recipe.rotated(drawn, [source.tables(at) for source in self._recipes.sources])

        for position, distance in self._trials:
            tables = self.tables(torch.tensor([distance], device=device))
            turned = self.turn(layer, rotated(position), tables)
            expected = rotated(position - distance)
            if turned.shape != expected.shape or not torch.allclose(turned, expected, rtol=0, atol=_TOLERANCE * 4):
                return False
        return True


def _in_halves(queries: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    half = queries.shape[-1] // 2
    turned = queries * cos
    turned[..., :half].addcmul_(queries[..., half:], sin[..., :half], value=-1)
    turned[..., half:].addcmul_(queries[..., :half], sin[..., half:])
    return turned
