"""How a layer makes the key that it caches out of one before RoPE.

Architectures differ in which dimensions they rotate, in the layout and arguments of the function that rotates, in
which of their RoPE tables a layer uses, in whether a layer rotates at all, in what they still do to a key afterwards,
and in whether it is a key that they cache: latent attention (DeepSeek) caches a latent in the place of the key and
one rotated key, shared by all heads, in the place of the value. A recipe holds all of that for one layer; ``probe``
finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch

from kvlink_core.models.capture import Recorder, RotationCall

Tables = Sequence[tuple[torch.Tensor, ...]]


class TableSource(Protocol):
    """Where cosines and sines come from."""

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Tables for int64 positions ``[n]``: tensors ``[1, n, dim]``."""
        ...


@dataclass(frozen=True, slots=True)
class RotaryModule:
    """One way in which the model calls a rotary module: once a pass, or once per kind of layer."""

    module: torch.nn.Module
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``TableSource``; in float32 whatever the model's dtype is."""

        def fresh(argument: Any) -> Any:
            if not isinstance(argument, torch.Tensor):
                return argument
            if argument.dtype.is_floating_point:  # hidden states: only their dtype and device matter
                return torch.empty(1, positions.shape[0], 1, dtype=torch.float32, device=positions.device)
            return positions.expand(*argument.shape[:-1], -1)

        made = self.module(*(fresh(a) for a in self.args), **{k: fresh(v) for k, v in self.kwargs})
        return tuple(made) if isinstance(made, (tuple, list)) else (made,)


@dataclass(frozen=True, slots=True)
class RotaryBuffer:
    """A buffer ``[positions, dim]`` of an attention module, of which the columns ``begin..end-1`` are one table."""

    module: torch.nn.Module
    name: str
    begin: int
    end: int

    def tables(self, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """See ``TableSource``; as exact as the model keeps them."""
        buffer: torch.Tensor = getattr(self.module, self.name)
        return (buffer.to(positions.device)[positions, self.begin : self.end].unsqueeze(0),)


@dataclass(frozen=True, slots=True)
class TableRole:
    """Stands for one tensor of one ``TableSource`` among the arguments of a rotating function."""

    source: int
    part: int


#: Stand for the key, and for whatever else is rotated in the same call (the query).
KEY, OTHER = object(), object()


@dataclass(frozen=True, slots=True)
class KeyRecipe:
    """How one layer's cached key comes from an unrotated one.

    Attributes:
        slot: where the layer caches what it rotated.
        call: which of the layer's rotating calls rotates it.
        function: the rotating function.
        args, kwargs: its arguments, with ``KEY``, ``OTHER`` and ``TableRole`` in their places.
        argument: position of the key among ``args``.
        result: position of the rotated key in what the function returns, or ``None`` when that is the key itself.
        tokens_first: whether the function takes ``[batch, tokens, heads, dim]``.
        other_heads: heads to give it in place of ``OTHER``: none, unless it cannot do with none.
        begin, end: the dimensions of the cached tensor that are rotated.
        after: what the layer applies to the rotated key, e.g. a norm.
        halves: whether all of the key is rotated, dimension i together with i + dim/2, by a table of cosines and one
            of sines (the first and the second of its source): found by trial, and of use for speed alone.
    """

    slot: Literal["key", "value"]
    call: int
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: tuple[tuple[str, Any], ...]
    argument: int
    result: int | None
    tokens_first: bool
    other_heads: int
    begin: int
    end: int
    after: torch.nn.Module | None
    halves: bool = False

    @property
    def source(self) -> int:
        """The source of its tables; a recipe uses one."""
        return next(a.source for a in self.args if isinstance(a, TableRole))

    @property
    def sources(self) -> frozenset[int]:
        """All sources of its tables; those that are buffers hold one table each."""
        given = (*self.args, *(value for _, value in self.kwargs))
        return frozenset(a.source for a in given if isinstance(a, TableRole))

    def unrotated(self, calls: Sequence[RotationCall], cached: torch.Tensor) -> torch.Tensor:
        """What the layer would cache without RoPE, ``[batch, heads, tokens, dim]``, after a pass with these calls."""
        given = self._heads_first(calls[self.call].args[self.argument]).to(cached.dtype)
        if given.shape == cached.shape:
            return given
        given = given.expand(*cached.shape[:-1], -1)
        return torch.cat([cached[..., : self.begin], given, cached[..., self.end :]], dim=-1)

    def rotated(self, keys: torch.Tensor, tables: Tables) -> torch.Tensor:
        """Keys ``[layers, heads, n, dim]`` of layers with this recipe, rotated but for ``after``.

        Args:
            keys: as ``unrotated`` gave them.
            tables: of n positions, by source.
        """
        part = self._heads_first(keys[..., self.begin : self.end])
        other = part[:, :, : self.other_heads] if self.tokens_first else part[:, : self.other_heads]

        def fill(argument: Any) -> Any:
            if isinstance(argument, TableRole):
                return tables[argument.source][argument.part]
            return part if argument is KEY else other if argument is OTHER else argument

        made = self.function(*(fill(a) for a in self.args), **{k: fill(v) for k, v in self.kwargs})
        made = self._heads_first(made if self.result is None else made[self.result])
        if made.shape[-1] == keys.shape[-1]:
            return made
        return torch.cat([keys[..., : self.begin], made, keys[..., self.end :]], dim=-1)

    def _heads_first(self, x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2) if self.tokens_first else x


def rotate_in_halves(keys: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor) -> None:
    """What most models do, in three passes over memory and none in between; used where a trial showed it to be so.

    Args:
        keys: float32 ``[layers, heads, n, dim]``.
        cos, sin: float32 ``[1, n, dim]``.
        out: as ``keys``, usually a view.
    """
    half = keys.shape[-1] // 2
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    torch.mul(keys, cos, out=out)
    out[..., :half].addcmul_(keys[..., half:], sin[..., :half], value=-1)
    out[..., half:].addcmul_(keys[..., :half], sin[..., half:])


@dataclass(frozen=True, slots=True)
class Recipes:
    """What a model caches and how.

    Attributes:
        layers: the recipe of each layer that caches; ``None`` for one without RoPE.
        numbers: the model's own number of each of these layers.
        sources: where the tables come from that the recipes name.
        kv_heads, key_dim, value_dim: what a layer caches of a token: ``[kv_heads, key_dim]`` and
            ``[kv_heads, value_dim]``.
    """

    layers: tuple[KeyRecipe | None, ...]
    numbers: tuple[int, ...]
    sources: tuple[TableSource, ...]
    kv_heads: int
    key_dim: int
    value_dim: int

    def shapes(self, tokens: int) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
        """Shapes of the keys and of the values of ``tokens`` tokens over all layers."""
        layers = len(self.layers)
        return (layers, self.kv_heads, tokens, self.key_dim), (layers, self.kv_heads, tokens, self.value_dim)


class UnrotatedCache(Recorder):
    """Keeps, of one forward pass over documents, what each layer caches, before RoPE.

    Use as a context manager around the forward; afterwards ``keys[layer]`` is ``[batch, kv_heads, tokens, key_dim]``,
    and ``values[layer]`` ``[batch, kv_heads, tokens, value_dim]``.

    Args:
        recipes: of the model.
        watch: is told of each layer's recipe and its rotating calls.
    """

    def __init__(
        self, recipes: Recipes, watch: Callable[[KeyRecipe | None, Sequence[RotationCall]], None] | None = None
    ) -> None:
        super().__init__()
        self._recipes = recipes.layers
        self._watch = watch
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []

    def keep(self, calls: Sequence[RotationCall], keys: torch.Tensor, values: torch.Tensor) -> None:
        """See ``Recorder.keep``."""
        recipe = self._recipes[len(self.keys)]
        if self._watch is not None:
            self._watch(recipe, calls)
        if recipe is not None:
            keys = recipe.unrotated(calls, keys) if recipe.slot == "key" else keys
            values = recipe.unrotated(calls, values) if recipe.slot == "value" else values
        self.keys.append(keys)
        self.values.append(values)
