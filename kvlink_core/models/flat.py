"""One forward pass over the new tokens of many prompts, laid end to end, documents read where they lie.

Each prompt's context is a list of parts: documents, which any number of prompts share, and slots of its own. A layer
attends to all parts of one kind at once (every query that reads a document in one product with its keys), and the
parts of each token are merged by their log-sum-exp. What a token may see is the model's own predicate, evaluated at
positions of its own prompt, so windows and chunks need no code here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.attention import flattened
from kvlink_core.models.capture import Recorder
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.models.flat_parts import Slots, Span
from kvlink_core.models.flat_plan import Plan, Seen, make_plan
from kvlink_core.models.partial import attend_part, attend_seen, merge_parts
from kvlink_core.models.turning import QueryTurner

_NOT_FLAT = "this model's attention does not attend to what its cache gave it"


class FlatPass:
    """A pass over the tokens of ``spans``; made for one ``forward``.

    Keys and values of the tokens are written to the slots of their spans.

    Args:
        lm: a model whose attention asks ours (``masking`` is ``asked``).
        turner: of that model; needed to compose only where a span reads segments.
        spans: at least one; each is ascending in positions.
        embed: token ids to embeddings, where some ids are no tokens (soft wraps).
    """

    def __init__(
        self,
        lm: CausalLM,
        turner: QueryTurner,
        spans: Sequence[Span],
        *,
        embed: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        self._lm = lm
        self._turner = turner
        self._embed = embed
        self._given = spans
        # Single tokens whose slots lie in one block of memory stand side by side: they attend in one call.
        order = sorted(range(len(spans)), key=lambda i: (len(spans[i].slots) > 1, id(spans[i].memory), spans[i].lane))
        self._spans = [spans[i] for i in order]
        token_ids: list[int] = []
        positions: list[int] = []
        self._starts: list[int] = []
        for span in self._spans:
            self._starts.append(len(token_ids))
            token_ids += span.token_ids
            positions += span.positions
        self._token_ids = torch.tensor(token_ids, device=lm.device)
        self._positions = torch.tensor(positions, device=lm.device)
        ends = {i: start + len(span.slots) - 1 for i, start, span in zip(order, self._starts, self._spans, strict=True)}
        self._wanted = torch.tensor([ends[i] for i in range(len(spans)) if spans[i].wants_logits], device=lm.device)
        self._kinds: dict[int, tuple[torch.Tensor, Seen | None]] = {}  # by the address of a tensor kept alive here
        self._plans: dict[int, Plan] = {}
        self._writes = _writes(self._spans, self._starts, lm.device)
        self._layer = -1
        self._latest: torch.Tensor | None = None

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        """Run it.

        Returns:
            Float32 logits ``[spans that want some, vocabulary]`` after the last token of each, in the order given.

        Raises:
            UnsupportedModelError: the model cannot be run so.
        """
        for write in self._writes:
            write.positions(self._positions)
        inputs: dict[str, Any] = {"position_ids": self._positions[None], "use_cache": True}
        if self._embed is None:
            inputs["input_ids"] = self._token_ids[None]
        else:
            inputs["inputs_embeds"] = self._embed(self._token_ids[None])
        cache = _FlatCache(self)
        with flattened(self):
            if any(span.unrotated is not None for span in self._spans):
                with cache:
                    return self._run(inputs, cache)
            return self._run(inputs, cache)

    def _run(self, inputs: dict[str, Any], cache: _FlatCache) -> torch.Tensor:
        if not self._wanted.shape[0]:
            self._lm.decoder(**inputs, past_key_values=cache)
            return torch.empty(0, device=self._lm.device)
        output = self._lm.network(**inputs, past_key_values=cache, logits_to_keep=self._wanted)
        logits = output.logits[0]
        if logits.shape[0] != self._wanted.shape[0]:  # a head that knows no such argument
            logits = logits[self._wanted]
        return logits.float()  # type: ignore[no-any-return]

    def mask(self, tokens: int, seen: Callable[..., torch.Tensor], *, causal: bool) -> torch.Tensor:
        """See ``FlatAttention``: an empty tensor whose address names the plan."""
        marker = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=self._lm.device)
        self._kinds[marker.data_ptr()] = (marker, None if causal else seen)
        return marker.expand(1, 1, tokens, tokens)

    def _plan(self, kind: int, groups: int, dtype: torch.dtype) -> Plan:
        """The plan of a kind of layers, made by the first of them."""
        if kind not in self._plans:
            self._plans[kind] = make_plan(
                self._spans, self._starts, self._positions, self._kinds[kind][1], groups=groups, dtype=dtype
            )
        return self._plans[kind]

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Any
    ) -> torch.Tensor:
        """See ``FlatAttention``."""
        known = mask is not None and mask.data_ptr() in self._kinds
        if mask is None or not known or self._latest is None or key.data_ptr() != self._latest.data_ptr():
            raise UnsupportedModelError(f"{_NOT_FLAT}.")
        heads, width = self._lm.recipes.kv_heads, query.shape[3]
        if key.shape[1] != heads or query.shape[1] % heads:
            raise UnsupportedModelError(f"{_NOT_FLAT}: {query.shape[1]} heads of queries, {key.shape[1]} of keys.")
        plan = self._plan(mask.data_ptr(), query.shape[1] // heads, query.dtype)
        scaling = options.get("scaling")
        scale = float(scaling) if scaling is not None else width**-0.5
        softcap = options.get("softcap")
        # [kv_heads, tokens, groups, dim]
        tokens = query.reshape(heads, plan.groups, -1, width).transpose(1, 2)
        rows = tokens.index_select(1, plan.rows)
        if plan.turned:
            turned = self._turner.turn(self._layer, rows[:, : plan.turned], plan.tables(self._turner))
            rows = torch.cat([turned, rows[:, plan.turned :]], dim=1)
        results, sums = [], []
        for call in plan.calls:
            part = rows[:, call.begin : call.end]
            asked = part.transpose(0, 1) if call.lanes > 1 else part.reshape(1, heads, -1, width)
            keys, values = call.context(self._layer)
            if call.hidden is None:
                result, logs = attend_part(asked, keys, values, call.mask, scale=scale, softcap=softcap)
            else:
                visible = call.hidden(self._layer)
                result, logs = attend_seen(asked, keys, values, visible, scale=scale, softcap=softcap)
            if call.lanes > 1:
                results.append(result.transpose(0, 1))
                sums.append(logs.transpose(0, 1))
            else:
                results.append(result.reshape(heads, -1, plan.groups, result.shape[-1]))
                sums.append(logs.reshape(heads, -1, plan.groups))
        sinks = options.get("s_aux")
        merged = merge_parts(
            results[0] if len(results) == 1 else torch.cat(results, dim=1),
            sums[0] if len(sums) == 1 else torch.cat(sums, dim=1),
            plan.table,
            plan.there,
            None if sinks is None else sinks.view(heads, plan.groups),
        )
        return merged.transpose(0, 1).reshape(1, -1, heads * plan.groups, merged.shape[-1])

    def keep(self, layer: int, keys: torch.Tensor, values: torch.Tensor, unrotated: torch.Tensor) -> None:
        """Write a layer's ``[1, kv_heads, tokens, dim]`` into the slots; ``unrotated`` are its keys before RoPE."""
        self._layer, self._latest = layer, keys
        for write in self._writes:
            write(layer, keys[0], values[0], unrotated[0])


@dataclass(frozen=True, slots=True)
class _Write:
    """Where keys and values of tokens ``begin..end-1`` of the pass go: those of one span, or one token of each lane.

    ``lanes`` is a number and ``slots`` a slice or a tensor, or both are tensors.
    """

    memory: Slots
    begin: int
    end: int
    lanes: Any
    slots: Any
    unrotated: torch.Tensor | None = None

    def positions(self, positions: torch.Tensor) -> None:
        self.memory.positions[self.lanes, self.slots] = positions[self.begin : self.end]

    def __call__(self, layer: int, keys: torch.Tensor, values: torch.Tensor, unrotated: torch.Tensor) -> None:
        for memory, new in ((self.memory.keys, keys), (self.memory.values, values)):
            part = new[:, self.begin : self.end]
            if isinstance(self.lanes, int):
                memory[layer, self.lanes][:, self.slots] = part
            else:
                memory[layer][self.lanes, :, self.slots] = part.transpose(0, 1)
        if self.unrotated is not None:
            self.unrotated[layer][:, self.slots] = unrotated[:, self.begin : self.end]


def _writes(spans: Sequence[Span], starts: Sequence[int], device: torch.device) -> list[_Write]:
    writes = []
    singles: dict[int, list[tuple[Span, int]]] = {}
    for span, start in zip(spans, starts, strict=True):
        first, count = span.slots[0], len(span.slots)
        if count == 1 and span.unrotated is None:
            singles.setdefault(id(span.memory), []).append((span, start))
            continue
        contiguous = span.slots[-1] - first + 1 == count
        slots: Any = slice(first, first + count) if contiguous else torch.tensor(span.slots, device=device)
        writes.append(_Write(span.memory, start, start + count, span.lane, slots, span.unrotated))
    for together in singles.values():
        lanes = torch.tensor([span.lane for span, _ in together], device=device)
        slots = torch.tensor([span.slots[0] for span, _ in together], device=device)
        writes.append(_Write(together[0][0].memory, together[0][1], together[-1][1] + 1, lanes, slots))
    return writes


class _FlatCache(Recorder):
    """What the model sees of a pass: takes new keys and values, gives them back as they are."""

    def __init__(self, attention: FlatPass) -> None:
        super().__init__()
        self._pass = attention
        self._recipes = attention._lm.recipes

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with the keys and values of the computed tokens."""
        layer = self._recipes.numbers.index(layer_idx)
        calls, self.calls = self.calls, []
        recipe = self._recipes.layers[layer]
        unrotated = recipe.unrotated(calls, key_states) if recipe is not None and calls else key_states
        self._pass.keep(layer, key_states, value_states, unrotated)
        return key_states, value_states
