"""Re-position: give unrotated keys the rotation of their place in this prompt (DESIGN section 3).

Nothing of RoPE is computed here. Cosines and sines come from the model's own rotary modules, in float32, and are
applied by the very functions that the model's attention calls, so every RoPE kind is right by construction.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.key_recipe import KeyRecipe, Recipes, Tables, rotate_in_halves
from kvlink_core.text import first_line

logger = logging.getLogger(__name__)

#: Bytes of one tensor in between; a core of a current server has a second-level cache of 1 to 2 MiB.
_CACHE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class RopeTables:
    """What the rotary modules say of some positions: per table source a tuple of float32 tensors ``[1, n, dim]``."""

    sources: tuple[tuple[torch.Tensor, ...], ...]

    def slice(self, start: int, end: int) -> RopeTables:
        """The tables of positions ``start..end-1`` of these (views)."""
        return RopeTables(tuple(tuple(part[:, start:end] for part in source) for source in self.sources))


class Rotary:
    """Re-positions the keys of one loaded model. Safe to use from several threads."""

    def __init__(self, recipes: Recipes) -> None:
        self._recipes = recipes
        self._runs: list[tuple[int, int, KeyRecipe | None]] = []
        for recipe, layers in groupby(enumerate(recipes.layers), key=lambda pair: pair[1]):
            numbers = [number for number, _ in layers]
            self._runs.append((numbers[0], numbers[-1] + 1, recipe))
        self._fused = _Fused()
        self._rows_checked = False

    @torch.inference_mode()
    def tables(self, positions: torch.Tensor) -> RopeTables:
        """Tables for int64 positions ``[n]``, computed in float32 whatever the model's dtype is."""
        return RopeTables(tuple(source.tables(positions) for source in self._recipes.sources))

    @torch.inference_mode()
    def place(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tables: RopeTables,
        out_keys: torch.Tensor,
        out_values: torch.Tensor,
    ) -> None:
        """Write what a document's layers cache into its place, rotated to the positions of ``tables``.

        Args:
            keys, values: ``[layers, heads, n, dim]`` before RoPE, in any dtype, on the model's device; not written to.
            tables: of n positions.
            out_keys, out_values: of the same shapes, usually views; computed in float32 and then cast.
        """
        place = _place_here if keys.device.type == "cpu" else self._fused
        for begin, end, recipe in self._runs:
            place(
                recipe, keys[begin:end], values[begin:end], tables.sources, out_keys[begin:end], out_values[begin:end]
            )

    @torch.inference_mode()
    def place_kept(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        kept: torch.Tensor,
        tables: RopeTables,
        out_keys: torch.Tensor,
        out_values: torch.Tensor,
    ) -> None:
        """``place`` for a pruned document, each of whose layers and heads has keys of other tokens.

        To the model's function every head is a row of a batch, since rows may have positions of their own.

        Args:
            keys, values: ``[layers, heads, slots, dim]``.
            kept: ``[layers, heads, slots]``, which token each is.
            tables: of all tokens of the document, in order.
            out_keys, out_values: of the shapes of ``keys`` and ``values``.

        Raises:
            UnsupportedModelError: the model's function takes no such rows.
        """
        self._check_rows(keys.device)
        for begin, end, recipe in self._runs:
            of_run = (kept[begin:end], keys[begin:end], values[begin:end], out_keys[begin:end], out_values[begin:end])
            _place_rows(recipe, tables, *of_run)

    def _check_rows(self, device: torch.device) -> None:
        """Try each recipe with rows at positions of their own, once, against the same rows one by one."""
        if self._rows_checked:
            return
        for recipe in dict.fromkeys(recipe for _, _, recipe in self._runs):
            if recipe is not None and not self._takes_rows(recipe, device):
                raise UnsupportedModelError(
                    f"{recipe.function.__name__} of this model cannot rotate heads to positions of their own, which "
                    "pruned caches need. Use caches of a codec without keep."
                )
        self._rows_checked = True

    def _takes_rows(self, recipe: KeyRecipe, device: torch.device) -> bool:
        kept = torch.tensor([[[0, 1, 2, 3], [2, 5, 7, 9], [1, 4, 30, 31]]], device=device)
        dim = self._recipes.key_dim if recipe.slot == "key" else self._recipes.value_dim
        keys = torch.randn(1, 3, 4, dim, generator=torch.Generator().manual_seed(0)).to(device)
        rows = torch.empty_like(keys)
        try:
            _rotate_rows(recipe, self.tables(torch.arange(32, device=device)), kept, keys, rows)
        except RuntimeError:
            return False
        alone = torch.empty_like(keys)
        for head, positions in enumerate(kept[0]):
            _rotate(recipe, keys[:, head, None], self.tables(positions).sources, alone[:, head, None])
        return bool(torch.allclose(rows, alone, rtol=1e-5, atol=1e-5))

    @torch.inference_mode()
    def rotate(self, layer: int, vectors: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Keys or queries of one layer, float32 ``[heads, n, dim]``, rotated to int64 positions ``[n]``."""
        recipe = self._recipes.layers[layer]
        if recipe is None:
            return vectors
        made = recipe.rotated(vectors[None], self.tables(positions).sources)[0]
        return made if recipe.after is None else recipe.after(made)

    @torch.inference_mode()
    def place_all(
        self,
        documents: Sequence[tuple[torch.Tensor, torch.Tensor]],
        starts: Sequence[int],
        tables: RopeTables,
        out_keys: torch.Tensor,
        out_values: torch.Tensor,
    ) -> None:
        """``place`` for several documents, each at its own positions; on accelerators in one launch where it can be.

        Args:
            documents: keys and values of each, as ``place`` takes them.
            starts: the slot, and so the position, of each one's first token.
            tables: of positions ``0..slots-1``.
            out_keys, out_values: ``[layers, heads, slots, dim]``.
        """
        fused = _fused_kernel(self._recipes, documents, out_keys, out_values)
        if fused is not None:
            for begin, end, recipe in self._runs:
                assert recipe is not None
                cos, sin = tables.sources[recipe.source]
                part = [(keys[begin:end], values[begin:end]) for keys, values in documents]
                fused(part, starts, cos, sin, out_keys[begin:end], out_values[begin:end])
            return
        for (keys, values), start in zip(documents, starts, strict=True):
            at = slice(start, start + keys.shape[2])
            self.place(keys, values, tables.slice(at.start, at.stop), out_keys[:, :, at], out_values[:, :, at])


def _fused_kernel(
    recipes: Recipes,
    documents: Sequence[tuple[torch.Tensor, torch.Tensor]],
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> Callable[..., None] | None:
    """The kernel that places all documents at once, if this device and these tensors are what it was made for."""
    tensors = [out_keys, out_values, *(t for pair in documents for t in pair)]
    if out_keys.device.type != "cuda" or not all(r is not None and r.halves for r in recipes.layers):
        return None
    same = recipes.key_dim == recipes.value_dim and all(t.dtype == out_keys.dtype for t in tensors)
    if not same or not all(t.is_contiguous() and t.device == out_keys.device for t in tensors):
        return None
    if recipes.key_dim & (recipes.key_dim - 1) or importlib.util.find_spec("triton") is None:
        return None
    from kvlink_core.models.fused_triton import place_all

    return place_all


def _place(
    recipe: KeyRecipe | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Tables,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """What ``Rotary.place`` does, for layers with one recipe."""
    for slot, stored, out in (("key", keys, out_keys), ("value", values, out_values)):
        if recipe is None or recipe.slot != slot:
            out.copy_(stored)
        else:
            _rotate(recipe, stored, tables, out)


def _place_rows(
    recipe: KeyRecipe | None,
    tables: RopeTables,
    kept: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """What ``Rotary.place_kept`` does, for layers with one recipe."""
    for slot, stored, out in (("key", keys, out_keys), ("value", values, out_values)):
        if recipe is None or recipe.slot != slot:
            out.copy_(stored)
            continue
        step = stored.shape[0]
        if stored.device.type == "cpu":
            step = max(1, _CACHE_BYTES // (4 * stored[0].numel()))
        for first in range(0, stored.shape[0], step):
            part = slice(first, first + step)
            _rotate_rows(recipe, tables, kept[part], stored[part], out[part])


def _rotate_rows(
    recipe: KeyRecipe, tables: RopeTables, kept: torch.Tensor, keys: torch.Tensor, out: torch.Tensor
) -> None:
    """Rotate ``[layers, heads, slots, dim]``, each head of each layer as a row with tables of its own."""
    slots, dim = keys.shape[2:]
    where = kept.reshape(-1, slots).to(torch.int64)
    used = recipe.sources
    of_rows = [tuple(part[0][where] for part in s) if i in used else () for i, s in enumerate(tables.sources)]
    rows, into = keys.reshape(-1, 1, slots, dim), out.view(-1, 1, slots, dim)
    if keys.device.type == "cpu":
        _rotate_here(recipe, rows, of_rows, into)
    else:
        _rotate(recipe, rows, of_rows, into)


def _place_here(
    recipe: KeyRecipe | None,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: Tables,
    out_keys: torch.Tensor,
    out_values: torch.Tensor,
) -> None:
    """``_place`` on a CPU: what rotating writes in between stays in the cache of a core."""
    for slot, stored, out in (("key", keys, out_keys), ("value", values, out_values)):
        if recipe is None or recipe.slot != slot:
            out.copy_(stored)
            continue
        step = max(1, _CACHE_BYTES // (4 * stored[0].numel()))
        for first in range(0, stored.shape[0], step):
            _rotate_here(recipe, stored[first : first + step], tables, out[first : first + step])


def _rotate_here(recipe: KeyRecipe, keys: torch.Tensor, tables: Tables, out: torch.Tensor) -> None:
    """``_rotate`` on a CPU."""
    if recipe.halves and keys.dtype == out.dtype == torch.float32:
        cos, sin = tables[recipe.source]
        rotate_in_halves(keys, cos, sin, out)
    else:
        _rotate(recipe, keys, tables, out)


def _rotate(recipe: KeyRecipe, keys: torch.Tensor, tables: Tables, out: torch.Tensor) -> None:
    made = recipe.rotated(keys.float(), tables)
    out.copy_(made if recipe.after is None else recipe.after(made))


class _Fused:
    """``_place`` as one kernel by ``torch.compile``, or as it is where that cannot be had."""

    def __init__(self) -> None:
        self._compiled: Callable[..., None] | None = None
        self._usable = True

    def __call__(self, recipe: KeyRecipe | None, *tensors: Any) -> None:
        if self._usable:
            try:
                # Not before it is needed: torch imports its compiler for this, which a CPU has no use for.
                self._compiled = self._compiled or torch.compile(_place, dynamic=True)
                return self._compiled(recipe, *tensors)
            # Broad on purpose: without a compiler, or with an operator it does not know, it raises as it likes; what
            # is asked for is the same either way.
            except Exception as error:
                logger.warning("torch.compile cannot fuse the rotation, going on without: %s", first_line(error))
                self._usable = False
        return _place(recipe, *tensors)
