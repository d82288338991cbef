"""Decode steps on an accelerator: one token of each of many prompts, by kernels of our own, recorded as CUDA graphs.

A step of ``FlatPass`` launches a hundred kernels a layer, which takes a CPU several times as long as a GPU needs for
them. Here a layer's attention is three launches (``decode_triton``) that find by tables what they read, so the step can
be recorded once and replayed for other requests, documents and slots. What is not plainly causal attention over keys
rotated in halves is left to ``FlatPass``, and so is everything for a model whose results differ from it.
"""

from __future__ import annotations

import importlib.util
import logging
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.attention import flattened
from kvlink_core.models.capture import Recorder
from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.models.decode_tables import PART_FIELDS, TOKEN_FIELDS, Tables, make_tables
from kvlink_core.models.flat_parts import Span
from kvlink_core.models.graphs import TOLERANCE
from kvlink_core.models.turning import QueryTurner
from kvlink_core.text import first_line

logger = logging.getLogger(__name__)

#: Steps of more tokens are not recorded; recordings kept at most.
_MOST_TOKENS, _MOST_RECORDINGS = 64, 24


class Kernels(Protocol):
    """What ``decode_triton`` has."""

    def tile(self, dtype: torch.dtype) -> int:
        """Keys of a part at most."""
        ...

    def write(self, keys: torch.Tensor, values: torch.Tensor, table: torch.Tensor, layer: int) -> None:
        """Write a layer's ``[kv_heads, tokens, dim]`` to where ``table`` says."""
        ...

    def attend(
        self,
        query: torch.Tensor,
        parts: torch.Tensor,
        rows: torch.Tensor,
        turns: tuple[torch.Tensor, torch.Tensor] | None,
        bounds: torch.Tensor,
        order: torch.Tensor,
        layer: int,
        *,
        kv_heads: int,
        value_dim: int,
        scale: float,
    ) -> torch.Tensor:
        """``[tokens, heads, value_dim]``."""
        ...


class Decoder:
    """The decode steps of one model.

    Args:
        lm: its network.
        turner: turns queries back.
        kernels: what computes; ``None`` for those in Triton, where it is.

    Attributes:
        usable: whether it can be asked at all; becomes false where a step failed or gave other logits.
        steps, replays: that were computed here, and of these, that were replayed.
    """

    def __init__(self, lm: CausalLM, turner: QueryTurner, kernels: Kernels | None = None) -> None:
        self._lm = lm
        self._turner = turner
        self._passes: dict[tuple[int, ...], _Pass] = {}
        self._pool: Any = None
        self._graphs = lm.device.type == "cuda"
        self._kernels = kernels
        widths = [shape[-1] for shape in lm.recipes.shapes(1)]
        self.usable = all(recipe is None or recipe.halves for recipe in lm.recipes.layers)
        if kernels is None:
            known = importlib.util.find_spec("triton") is not None
            self.usable = self.usable and known and all(width >= 32 and width & (width - 1) == 0 for width in widths)
        self.steps = self.replays = 0

    @torch.inference_mode()
    def step(self, spans: Sequence[Span], otherwise: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Float32 logits ``[spans, vocabulary]``, all of which want theirs.

        Args:
            spans: one token each.
            otherwise: computes the same in another way; asked where this one cannot, and the first time that a step of
                a size comes, to compare.
        """
        if not self.usable or len(spans) > _MOST_TOKENS or any(len(span.slots) != 1 for span in spans):
            return otherwise()
        if self._kernels is None:
            from kvlink_core.models import decode_triton

            self._kernels = decode_triton
        tables = make_tables(spans, self._kernels.tile(self._lm.dtype))
        sizes = (
            _size(len(spans), 1),
            _size(len(tables.parts), 32),
            _size(len(tables.rows), 32),
            _size(len(tables.order), 64),
        )
        try:
            if sizes not in self._passes:
                expected = otherwise()
                step = _Pass(self._lm, self._turner, self._kernels, sizes)
                step.fill(tables)
                if self._agrees(step.forward(), expected):
                    self._keep(sizes, step)
                    return expected
                self._give_up()
                return otherwise()  # what was tried left other keys and values
            step = self._passes.pop(sizes)
            self._passes[sizes] = step  # the last one to be given up
            step.fill(tables)
            if step.graph is None and self._graphs:
                self._record(step)
            self.steps += 1
            if step.graph is None:
                return step.forward()[: len(spans)]
            step.graph.replay()
            self.replays += 1
            return step.logits[: len(spans)].clone()
        except UnsupportedModelError as error:
            logger.info("decode steps run without kernels of our own: %s", error)
            self._give_up()
            return otherwise()
        # Broad on purpose: what a compiler or a recording objects to comes in many ways.
        except Exception as error:
            logger.warning("decode steps run without kernels of our own: %s", first_line(error), exc_info=True)
            self._give_up()
            return otherwise()

    def _agrees(self, logits: torch.Tensor, expected: torch.Tensor) -> bool:
        off = float((logits[: expected.shape[0]] - expected).norm() / expected.norm())
        if off <= TOLERANCE[self._lm.dtype]:
            return True
        logger.warning("kernels for decoding changed logits by %.1e of their size; running without.", off)
        return False  # not a number is off, too

    def _keep(self, sizes: tuple[int, ...], step: _Pass) -> None:
        while len(self._passes) >= _MOST_RECORDINGS:
            del self._passes[next(iter(self._passes))]
        self._passes[sizes] = step

    def _record(self, step: _Pass) -> None:
        """Record a pass; where that cannot be done, run it as it is from now on."""
        expected = step.forward()
        try:
            if self._pool is None:
                self._pool = torch.cuda.graph_pool_handle()
            torch.cuda.synchronize(self._lm.device)
            graph = torch.cuda.CUDAGraph()
            # Another thread may be copying a document to this device meanwhile, which is none of this graph's business.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                logits = step.forward()
            graph.replay()
            off = float((logits - expected).norm() / expected.norm())
        # Broad on purpose, as in ``graphs``.
        except Exception as error:
            logger.info("no CUDA graphs for this model's decode steps: %s", first_line(error))
            self._graphs = False
            return
        if not off <= TOLERANCE[self._lm.dtype]:
            logger.warning("replaying a decode step changed logits by %.1e of their size; running without.", off)
            self._graphs = False
            return
        step.graph, step.logits = graph, logits

    def _give_up(self) -> None:
        self.usable = False
        self._passes.clear()


def _size(count: int, least: int) -> int:
    return max(least, 1 << max(0, count - 1).bit_length())


class _Pass(Recorder):
    """Steps of at most so many tokens, parts, rows and results. What kernels read stays where it is."""

    def __init__(self, lm: CausalLM, turner: QueryTurner, kernels: Kernels, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self._lm = lm
        self._kernels = kernels
        self._turner = turner
        tokens, parts, rows, results = sizes
        self._counts = (tokens, tokens, tokens * TOKEN_FIELDS, parts * PART_FIELDS, rows, tokens + 1, results)
        self._flat = torch.zeros(sum(self._counts), dtype=torch.int64, device=lm.device)
        split = torch.split(self._flat, list(self._counts))
        self._token_ids, self._positions, self._tokens, self._parts, self._rows, self._bounds, self._order = split
        self._parts = self._parts.view(parts, PART_FIELDS)
        dim = lm.recipes.key_dim
        self._turns = [
            (torch.ones(rows, dim, device=lm.device), torch.zeros(rows, dim, device=lm.device))
            for _ in lm.recipes.sources
        ]
        self._turned_by: list[int] = []
        self._layer = -1
        self._latest: torch.Tensor | None = None
        self.graph: Any = None
        self.logits = torch.empty(0)

    def fill(self, tables: Tables) -> None:
        """Make it this step."""
        columns = (
            tables.token_ids,
            tables.positions,
            [x for row in tables.tokens for x in row],
            [x for row in tables.parts for x in row],
            tables.rows,
            tables.bounds,
            tables.order,
        )
        flat: list[int] = []
        for number, (column, count) in enumerate(zip(columns, self._counts, strict=True)):
            # Behind the last token come such that have no results.
            flat += column + [column[-1] if number == 5 else 0] * (count - len(column))
        given = torch.tensor(flat)
        if self._flat.device.type == "cuda":
            given = given.pin_memory()
        self._flat.copy_(given, non_blocking=True)
        if tables.turns != self._turned_by:
            distances = torch.tensor(tables.turns, device=self._flat.device)
            for (cos, sin), made in zip(self._turns, self._turner.tables(distances), strict=True):
                cos[: len(tables.turns)] = made[0][0]
                sin[: len(tables.turns)] = made[1][0]
            self._turned_by = tables.turns

    def forward(self) -> torch.Tensor:
        """Float32 logits ``[tokens, vocabulary]``."""
        with flattened(self):
            output = self._lm.network(
                input_ids=self._token_ids[None],
                position_ids=self._positions[None],
                past_key_values=self,
                use_cache=True,
            )
        return output.logits[0].float()  # type: ignore[no-any-return]

    def mask(self, tokens: int, seen: Callable[..., torch.Tensor], *, causal: bool) -> torch.Tensor:
        """See ``FlatAttention``."""
        if not causal:
            raise UnsupportedModelError("this model hides more than the future.")
        return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=self._flat.device).expand(1, 1, tokens, tokens)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, options: Any
    ) -> torch.Tensor:
        """See ``FlatAttention``."""
        if self._latest is None or key.data_ptr() != self._latest.data_ptr():
            raise UnsupportedModelError("this model's attention does not attend to what its cache gave it.")
        if options.get("softcap") is not None or options.get("s_aux") is not None:
            raise UnsupportedModelError("this model's attention has more terms.")
        recipe = self._lm.recipes.layers[self._layer]
        scaling = options.get("scaling")
        return self._kernels.attend(
            query[0] if query.stride(-1) == 1 else query[0].contiguous(),
            self._parts,
            self._rows,
            None if recipe is None else self._turns[recipe.source],
            self._bounds,
            self._order,
            self._layer,
            kv_heads=key.shape[1],
            value_dim=value.shape[-1],
            scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        )[None]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Called by each attention layer with the keys and values of the computed tokens."""
        self._layer, self._latest = self._lm.recipes.numbers.index(layer_idx), key_states
        keys, values = (x[0] if x.stride(-1) == 1 else x[0].contiguous() for x in (key_states, value_states))
        self._kernels.write(keys, values, self._tokens, self._layer)
        return key_states, value_states
