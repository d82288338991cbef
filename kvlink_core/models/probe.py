"""Find out how a loaded model rotates its keys by watching it compute a few tokens.

No family is described anywhere: for each layer the recipe is sought that gives exactly the tensor that the layer
caches, among all rotating calls that it made, all parts of the head and all norms that it has. A layer without one is
refused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.capture import Recorder, RotationCall
from kvlink_core.models.key_recipe import (
    KEY,
    OTHER,
    KeyRecipe,
    Recipes,
    RotaryBuffer,
    RotaryModule,
    TableRole,
    TableSource,
    rotate_in_halves,
)

#: Enough that no two positions rotate alike by chance.
PROBE_TOKENS = 5


@torch.inference_mode()
def find_recipes(network: Any, decoder: Any) -> Recipes:
    """Watch ``decoder``, the part of ``network`` without its head, compute a few tokens; find its layers' recipes.

    Raises:
        UnsupportedModelError: a layer does something to its keys that no recipe describes.
    """
    vocabulary = network.get_input_embeddings().weight.shape[0]
    ids = (torch.arange(1, PROBE_TOKENS + 1, device=network.device) * 7) % vocabulary
    probe = _Probe()
    with probe, _TableWatch(decoder) as watch:
        decoder(input_ids=ids[None], past_key_values=probe, use_cache=True)
    if not probe.layers:
        raise UnsupportedModelError("this model caches no keys: there is nothing to reuse.")
    shapes = {(k.shape[1], k.shape[3], v.shape[1], v.shape[3]) for _, k, v in probe.layers}
    if len(shapes) != 1 or any(key_heads != value_heads for key_heads, _, value_heads, _ in shapes):
        raise UnsupportedModelError(
            "the layers of this model cache keys of different shapes; a document cache holds one shape for all layers."
        )
    modules = attention_modules(decoder)
    layers = tuple(
        _find(number, calls, (keys, values), watch, modules.get(number))
        for number, (calls, keys, values) in zip(probe.numbers, probe.layers, strict=True)
    )
    ((kv_heads, key_dim, _, value_dim),) = shapes
    return Recipes(layers, tuple(probe.numbers), tuple(watch.sources), kv_heads, key_dim, value_dim)


class _Probe(Recorder):
    """Keeps everything that a probing pass shows."""

    def __init__(self) -> None:
        super().__init__()
        self.layers: list[tuple[Sequence[RotationCall], torch.Tensor, torch.Tensor]] = []

    def keep(self, calls: Sequence[RotationCall], keys: torch.Tensor, values: torch.Tensor) -> None:
        self.layers.append((calls, keys, values))


class _TableWatch:
    """Knows which table of which source a tensor is."""

    def __init__(self, decoder: torch.nn.Module) -> None:
        self.sources: list[TableSource] = []
        self._made: list[tuple[torch.Tensor, TableRole]] = []
        self._rotary = [m for m in decoder.modules() if "Rotary" in type(m).__name__]
        self._hooks: list[Any] = []

    def __enter__(self) -> _TableWatch:
        self._hooks = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._rotary]
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _note(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        parts = result if isinstance(result, (tuple, list)) else (result,)
        self._made += [(part, TableRole(len(self.sources), i)) for i, part in enumerate(parts)]
        self.sources.append(RotaryModule(module, args, tuple(sorted(kwargs.items()))))

    def role(self, tensor: torch.Tensor, attention: torch.nn.Module | None) -> TableRole | None:
        """Which table ``tensor`` is: by identity what a rotary module made, by value a piece of a buffer."""
        for made, role in self._made:
            if tensor is made or (tensor.shape == made.shape and tensor.data_ptr() == made.data_ptr()):
                return role
        if attention is None or tensor.ndim != 3:
            return None
        width = tensor.shape[-1]
        for name, buffer in attention.named_buffers(recurse=False):
            if buffer.ndim == 2 and buffer.shape[0] >= PROBE_TOKENS:
                for begin in range(0, buffer.shape[1] - width + 1, width):
                    if torch.equal(tensor[0], buffer[:PROBE_TOKENS, begin : begin + width].to(tensor)):
                        source = RotaryBuffer(attention, name, begin, begin + width)
                        self.sources.append(source)
                        role = TableRole(len(self.sources) - 1, 0)
                        self._made.append((tensor, role))
                        return role
        return None


def attention_modules(decoder: torch.nn.Module) -> dict[int, torch.nn.Module]:
    """The modules that know which layer they are and attend, by layer."""
    found: dict[int, torch.nn.Module] = {}
    for module in decoder.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and "ttention" in type(module).__name__:
            found.setdefault(layer, module)
    return found


def _find(
    layer: int,
    calls: Sequence[RotationCall],
    cached: tuple[torch.Tensor, torch.Tensor],
    watch: _TableWatch,
    attention: torch.nn.Module | None,
) -> KeyRecipe | None:
    if not calls:
        return None
    norms = [m for m in attention.children() if "Norm" in type(m).__name__] if attention is not None else []
    for after in (None, *norms):
        for match in _matches(calls, cached, after):
            if after is not None and not _turns_freely(after):
                raise UnsupportedModelError(
                    f"this model weighs the dimensions of a key after rotating it ({type(after).__name__}), so what a "
                    "document's tokens see of each other depends on where the document stands."
                )
            recipe = _recipe(match, calls[match.call], watch, attention)
            if recipe is not None:
                return recipe
    raise UnsupportedModelError(
        f"layer {layer} of this model makes its keys with {calls[0].function.__name__} in a way that is not known: "
        "what it caches is not the rotated key."
    )


def _turns_freely(norm: torch.nn.Module) -> bool:
    """Whether a norm treats all dimensions alike, so that it makes no difference before or after a rotation."""
    return all(bool((p == p.flatten()[0]).all()) for p in norm.parameters())


@dataclass(frozen=True, slots=True)
class _Match:
    """A result of a rotating call that stands, as it is, in what the layer caches."""

    slot: Literal["key", "value"]
    call: int
    position: int
    tokens_first: bool
    begin: int
    end: int
    width: int
    after: torch.nn.Module | None


def _matches(
    calls: Sequence[RotationCall], cached: tuple[torch.Tensor, torch.Tensor], after: torch.nn.Module | None
) -> Iterator[_Match]:
    slots: tuple[Literal["key", "value"], ...] = ("key", "value")
    for slot, target in zip(slots, cached, strict=True):
        for number, call in enumerate(calls):
            results = call.result if isinstance(call.result, (tuple, list)) else (call.result,)
            for position, result in enumerate(results):
                for tokens_first in (False, True):
                    out = result.transpose(1, 2) if tokens_first else result
                    if out.ndim != 4 or out.shape[2] != target.shape[2] or out.shape[1] not in (1, target.shape[1]):
                        continue
                    for begin in dict.fromkeys((0, target.shape[3] - out.shape[3])):
                        if begin >= 0 and _stands_in(out, target, begin, after):
                            end = begin + out.shape[3]
                            yield _Match(slot, number, position, tokens_first, begin, end, target.shape[3], after)


def _stands_in(out: torch.Tensor, cached: torch.Tensor, begin: int, after: torch.nn.Module | None) -> bool:
    part = cached[..., begin : begin + out.shape[3]]
    if after is not None:
        try:
            out = after(out)
        except RuntimeError:  # a norm of another width
            return False
    return torch.equal(out.expand_as(part).to(part.dtype), part)  # some rotate in float32 and cache in less


def _recipe(
    match: _Match, call: RotationCall, watch: _TableWatch, attention: torch.nn.Module | None
) -> KeyRecipe | None:
    """The recipe of a match, or ``None`` when an argument of its call cannot be had for other positions."""
    paired = isinstance(call.result, (tuple, list))
    argument = match.position if paired else 0
    if argument >= len(call.args):
        return None

    def role(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        table = watch.role(value, attention)
        if table is not None:
            return table
        if value.ndim == 4:
            return OTHER
        raise LookupError

    try:
        args = tuple(KEY if i == argument else role(a) for i, a in enumerate(call.args))
        kwargs = tuple((k, role(v)) for k, v in sorted(call.kwargs.items()))
    except LookupError:
        return None
    recipe = KeyRecipe(
        slot=match.slot,
        call=match.call,
        function=call.function,
        args=args,
        kwargs=kwargs,
        argument=argument,
        result=match.position if paired else None,
        tokens_first=match.tokens_first,
        other_heads=0,
        begin=match.begin,
        end=match.end,
        after=match.after,
    )
    if not _runs(recipe, watch.sources, call):
        recipe = replace(recipe, other_heads=1)
    whole = match.end - match.begin == match.width
    return replace(recipe, halves=whole and _in_halves(recipe, watch.sources, call))


def _runs(recipe: KeyRecipe, sources: Sequence[TableSource], call: RotationCall) -> bool:
    """Whether the rotating function takes a query of no heads, which costs nothing."""
    given = call.args[recipe.argument]
    heads = given.transpose(1, 2) if recipe.tokens_first else given
    keys = heads.new_zeros(*heads.shape[:3], recipe.end)
    positions = torch.arange(heads.shape[2], device=heads.device)
    try:
        recipe.rotated(keys.float(), [source.tables(positions) for source in sources])
    except RuntimeError:
        return False
    return True


def _in_halves(recipe: KeyRecipe, sources: Sequence[TableSource], call: RotationCall) -> bool:
    """Try whether the recipe does what ``rope.rotate_in_halves`` does, on random keys."""
    tables = [source.tables(torch.arange(PROBE_TOKENS, device=call.args[0].device)) for source in sources]
    used = [a for a in recipe.args if isinstance(a, TableRole)]
    if recipe.after is not None or [a.part for a in used] != [0, 1] or len({a.source for a in used}) != 1:
        return False
    cos, sin = tables[used[0].source]
    if cos.shape != (1, PROBE_TOKENS, recipe.end) or cos.dtype != torch.float32:
        return False
    keys = torch.randn(2, 3, PROBE_TOKENS, recipe.end, device=cos.device)
    expected = recipe.rotated(keys, tables)
    if expected.shape != keys.shape:
        return False
    found = torch.empty_like(keys)
    rotate_in_halves(keys, cos, sin, found)
    return bool(torch.allclose(found, expected, rtol=1e-6, atol=1e-6))
