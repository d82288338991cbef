"""The key/value cache of one prompt, slot by slot, and the forward pass over what is not in it yet.

Slot = position, but behind pruned documents, which have fewer slots than tokens. Documents are placed once, straight
into their slots; the tokens that no cache covers are computed in one forward pass that writes its own slots and reads
all of them. The engine drives a ``LinkedCache`` only through ``compute``, so that another kind of context (shared,
paged) can take its place.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.errors import ConfigError, PrunedCacheError
from kvlink_core.linking.slots import Slots
from kvlink_core.models import LoadedModel
from kvlink_core.models.graphs import SlotBuffer
from kvlink_core.models.memory import view
from kvlink_core.models.pruned import PrunedContext
from kvlink_core.models.rope import RopeTables
from kvlink_core.prompt import Prompt
from kvlink_core.template import FIRST_WRAP_ID
from kvlink_core.types import DocumentCache

WRAPPED = "this model wraps its documents in trained embeddings"
PRUNED_REMEDY = "use a linker that computes none (reposition, link-tokens, concat), or a codec without keep."
WRAPPED_REMEDY = "use the linker 'soft-wrap', or 'full', which leaves them out."


class LinkedCache:
    """Keys and values of one prompt, with room for its answer. Owned by one request; not thread-safe.

    Args:
        model: the model.
        prompt: the laid-out prompt.
        reserve: slots for tokens to be generated after the prompt.
        caches: those to be placed, of all documents in order; needed for pruned ones, which then take fewer slots.

    Attributes:
        keys, values: ``[layers, kv_heads, capacity, dim]``, with as many slots as needed or more; a slot's content is
            undefined until it is placed or computed, and is not read before.
        pending: int64 positions of the prompt, ascending, that the engine has yet to compute.
    """

    def __init__(
        self, model: LoadedModel, prompt: Prompt, *, reserve: int, caches: Sequence[DocumentCache] = ()
    ) -> None:
        self.model = model
        self.prompt = prompt
        self.token_ids = prompt.token_ids()
        self._buffer: SlotBuffer | None = None
        self._at = Slots(prompt, caches)
        capacity = prompt.length + reserve - self._at.dropped
        self.keys, self.values = self._slots(capacity)
        self._where: torch.Tensor | None = None
        if self._at.pruned:
            where = self._at.positions(capacity).to(self.keys.device)
            self._where = where.repeat(*self.keys.shape[:2], 1)
        self.pending = torch.arange(prompt.length)
        self._placed = torch.zeros(prompt.length, dtype=torch.bool)
        self._first_layers = 0

    def _slots(self, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Memory for keys and values, lent until this cache is gone; its views must not outlive it."""
        model = self.model
        if model.lm.graphs is not None:
            self._buffer = model.lm.graphs.take(capacity)
            weakref.finalize(self, model.lm.graphs.give, self._buffer).atexit = False
            # What an earlier prompt left is never attended to, but a number that is not finite would show even so.
            for slots in (self._buffer.keys, self._buffer.values):
                slots[:, :, self.prompt.length :].zero_()
            return self._buffer.keys, self._buffer.values
        shapes = model.recipes.shapes(capacity)
        if model.device.type != "cpu":
            keys, values = (torch.empty(shape, dtype=model.dtype, device=model.device) for shape in shapes)
            return keys, values
        size = math.prod(shapes[0]) * model.dtype.itemsize
        buffer = model.lm.memory.take(size + math.prod(shapes[1]) * model.dtype.itemsize)
        weakref.finalize(self, model.lm.memory.give, buffer).atexit = False
        return view(buffer, 0, shapes[0], model.dtype), view(buffer, size, shapes[1], model.dtype)

    @property
    def prompt_slots(self) -> int:
        """How many of the slots the prompt takes; pruned documents have fewer than tokens."""
        return self.prompt.length - self._at.dropped

    @property
    def computed_tokens(self) -> int:
        """Tokens of the prompt that are computed rather than loaded.

        A token counts once for all layers: ``compute_first`` adds the prompt's tokens times the share of the layers
        that it ran, rounded up. It may come to more than the prompt has: pending tokens are computed there as well.
        """
        early = -(-self._first_layers * self.prompt.length // self.keys.shape[0])
        return int(self.pending.shape[0]) + early

    @torch.inference_mode()
    def place(self, cache: DocumentCache, start: int, tables: RopeTables) -> None:
        """Write a document's cache into its slots.

        Args:
            cache: the document's unrotated cache, on any device.
            start: the position of the document's first token.
            tables: RoPE tables for exactly the rotation wanted, ``cache.tokens`` positions.

        Raises:
            PrunedCacheError: a pruned cache that was not among ``caches``.
            UnsupportedModelError: a pruned cache, of which this model cannot rotate each head by itself.
        """
        first = self._at.first_of(start)
        at = slice(first, first + cache.slots)
        device = self.keys.device
        keys, values, out = cache.keys.to(device), cache.values.to(device), (self.keys[:, :, at], self.values[:, :, at])
        if cache.kept is None:
            self.model.rotary.place(keys, values, tables, *out)
        else:
            if self._where is None:
                raise PrunedCacheError(f"this linker has no slots for pruned caches; {PRUNED_REMEDY}", param="linker")
            kept = cache.kept.to(device)
            self.model.rotary.place_kept(keys, values, kept, tables, *out)
            torch.add(kept, start, out=self._where[:, :, at])
        self._placed[start : start + cache.tokens] = True

    @torch.inference_mode()
    def place_all(self, caches: Sequence[DocumentCache], tables: RopeTables) -> None:
        """``place`` every document at its own positions of the prompt.

        Args:
            caches: of all documents of the prompt, in order.
            tables: of positions ``0..length-1``.

        Raises:
            PrunedCacheError, UnsupportedModelError: as ``place``.
        """
        if any(cache.kept is not None for cache in caches):
            for segment, cache in zip(self.prompt.documents, caches, strict=True):
                self.place(cache, segment.start, tables.slice(segment.start, segment.end))
            return
        device = self.keys.device
        documents = [(cache.keys.to(device), cache.values.to(device)) for cache in caches]
        starts = []
        for segment, cache in zip(self.prompt.documents, caches, strict=True):
            assert segment.end - segment.start == cache.tokens
            starts.append(segment.start)
            self._placed[segment.start : segment.end] = True
        self.model.rotary.place_all(documents, starts, tables, self.keys, self.values)

    def seal(self) -> None:
        """All documents are placed: everything else of the prompt is pending."""
        self.pending = torch.nonzero(~self._placed).flatten()

    def recompute(self, positions: torch.Tensor) -> None:
        """Make tokens pending that were placed: once computed, they replace what was placed for them.

        Args:
            positions: int64 ``[n]`` on the CPU, in any order.

        Raises:
            PrunedCacheError: some, and documents are pruned: what is computed has no slots.
        """
        if len(positions):
            self._refuse_pruned()
        self._placed[positions] = False
        self.seal()

    @torch.inference_mode()
    def compute_first(self, layers: int) -> None:
        """Run the whole prompt, each token seeing all before it, as far as the keys and values of the first layers.

        They take their slots there, over whatever was placed; the other layers keep theirs. Takes the memory that full
        prefill takes.

        Args:
            layers: how many, from 1 to all.

        Raises:
            ConfigError: as ``compute``.
            PrunedCacheError: as ``recompute``.
        """
        self._refuse_pruned()
        assert 1 <= layers <= self.keys.shape[0]
        length = self.prompt.length
        self._refuse_wraps(self.token_ids)
        positions = torch.arange(length, device=self.model.device)
        slots = _Slots(self.model.recipes.numbers, self.keys, self.values, positions, length, layers=layers)
        with suppress(_FirstLayersDone):
            self.model.lm.compute(self.token_ids.to(self.model.device), positions, length, slots)
        self._first_layers += layers

    @torch.inference_mode()
    def compute(self, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Run the model over some tokens; their keys and values take their slots.

        Args:
            token_ids, positions: int64 ``[n]``; positions ascending. Every slot before the last position must be
                placed, computed before, or among ``positions``.

        Returns:
            Float32 logits ``[vocabulary]`` after the last token.

        Raises:
            ConfigError: rows of a soft wrap are among the tokens: they are encoded with their document only.
            UnsupportedModelError: pruned documents reach beyond a window whose mask cannot be made for each head.
        """
        self._refuse_wraps(token_ids)
        if self._where is not None:
            return self._compute_pruned(self._where, token_ids, positions)
        lm, keys, values = self.model.lm, self.keys, self.values

        # Knows the slots and not this cache: what is recorded of it outlives the cache.
        def forward(token_ids: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
            return lm.compute(token_ids, positions, length, _Slots(lm.recipes.numbers, keys, values, positions, length))

        if self._buffer is not None and lm.graphs is not None:
            return lm.graphs.compute(self._buffer, token_ids, positions, forward)
        length = int(positions[-1]) + 1
        return forward(token_ids.to(lm.device), positions.to(lm.device), length)

    def _compute_pruned(self, where: torch.Tensor, token_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """``compute`` where slots are not positions. Without graphs, which take one for the other."""
        lm, at = self.model.lm, self._at.of(positions)
        length, slots = int(at[-1]) + 1, at.to(lm.device)
        pruned = PrunedContext(slots, positions.to(lm.device), where, lm.recipes.numbers)
        cache = _Slots(lm.recipes.numbers, self.keys, self.values, slots, length)
        return lm.compute(token_ids.to(lm.device), pruned.positions, length, cache, pruned)

    def _refuse_pruned(self) -> None:
        if self._at.pruned:
            raise PrunedCacheError(
                f"this linker computes tokens of documents, and pruned caches have no slots for them; {PRUNED_REMEDY}",
                param="linker",
            )

    def _refuse_wraps(self, token_ids: torch.Tensor) -> None:
        if self.model.layout.wrap is not None and int(token_ids.max()) >= FIRST_WRAP_ID:
            raise ConfigError(f"{WRAPPED}, and this linker computes them; {WRAPPED_REMEDY}", param="linker")


class _FirstLayersDone(Exception):
    """Ends a forward pass of which only the first layers are wanted."""


class _Slots(DynamicCache):  # type: ignore[misc]  # transformers is untyped
    """What a forward pass sees of a ``LinkedCache``: writes new keys into their slots, reads all slots so far.

    ``numbers`` are the model's own of the layers that cache; ``positions`` are slots. With ``layers``, raises
    ``_FirstLayersDone`` once that many layers have written theirs.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        *,
        layers: int | None = None,
    ) -> None:
        super().__init__()
        self._numbers = numbers
        self._keys = keys
        self._values = values
        self._positions = positions
        self._length = length
        self._layers = layers
        self._from_nothing = int(positions.shape[0]) == length

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with the keys and values of the computed tokens."""
        layer = self._numbers.index(layer_idx)
        keys, values = self._keys[layer], self._values[layer]
        if self._from_nothing:
            keys[:, : self._length] = key_states[0]
            values[:, : self._length] = value_states[0]
            if layer + 1 == self._layers:
                raise _FirstLayersDone
            return key_states, value_states
        if self._positions.shape[0] == 1:
            keys[:, self._length - 1] = key_states[0, :, 0]
            values[:, self._length - 1] = value_states[0, :, 0]
        else:
            keys.index_copy_(1, self._positions, key_states[0])
            values.index_copy_(1, self._positions, value_states[0])
        return keys[None, :, : self._length], values[None, :, : self._length]
