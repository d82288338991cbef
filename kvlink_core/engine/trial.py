"""Try on a few tokens how a model can be run: what it computes must be what it computes over a linked cache."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import UnsupportedModelError
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.models.flat import FlatPass
from kvlink_core.models.flat_parts import Reading, Segment, Slots, Span
from kvlink_core.models.turning import QueryTurner
from kvlink_core.prompt import Prompt
from kvlink_core.prompt import Segment as Piece
from kvlink_core.text import first_line

logger = logging.getLogger(__name__)

#: All requests in one pass, documents read in place; the same with documents copied; or each request by itself.
Mode = Literal["shared", "copied", "solo"]

#: Largest difference of logits, relative to the largest. A fault of method is far above the rounding of any dtype.
_TOLERANCE, _ROUGH_TOLERANCE = 1e-3, 0.06

#: What models do that were made for other caches than the one they are given.
_FAULTS = (UnsupportedModelError, LookupError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError)


@torch.inference_mode()
def find_mode(model: LoadedModel, turner: QueryTurner) -> Mode:
    """The best way in which the model's logits are right."""
    if model.lm.masking != "asked":
        return "solo"
    trial = _Trial(model, turner)
    if not trial.agrees(trial.copied, share=False):
        return "solo"
    if not turner.composes or not trial.agrees(trial.shared, share=True):
        return "copied"
    return "shared"


class _Trial:
    """A prompt with two documents, run in the ways that there are."""

    def __init__(self, model: LoadedModel, turner: QueryTurner) -> None:
        self._model = model
        self._turner = turner
        pieces: list[Piece] = []
        for kind, count, place in (("prefix", 2, None), ("document", 6, 0), ("document", 5, 1), ("suffix", 4, None)):
            start = pieces[-1].end if pieces else 0
            token_ids = tuple((7 * at + 1) % min(model.spec.vocab_size, 90) for at in range(start, start + count))
            pieces.append(Piece(kind, token_ids, start, place))  # type: ignore[arg-type]
        self._prompt = Prompt(tuple(pieces))
        self._caches = DocumentEncoder(model).encode([list(s.token_ids) for s in self._prompt.documents])

    def agrees(self, run: Callable[[], torch.Tensor], *, share: bool) -> bool:
        """Whether ``run`` gives what a linked cache gives, its documents placed or, unless ``share``, computed."""
        linked = LinkedCache(self._model, self._prompt, reserve=0)
        if share:
            tables = self._model.rotary.tables(torch.arange(self._prompt.length, device=self._model.device))
            linked.place_all(self._caches, tables)
            linked.seal()
        expected = linked.compute(linked.token_ids[linked.pending], linked.pending)
        try:
            logits = run()
        except _FAULTS as error:
            logger.info("not run with other requests (%s: %s)", type(error).__name__, first_line(error))
            return False
        tolerance = _TOLERANCE if self._model.dtype == torch.float32 else _ROUGH_TOLERANCE
        return float((logits - expected).abs().max()) <= tolerance * float(expected.abs().max())

    def copied(self) -> torch.Tensor:
        """All tokens computed, beside another prompt, in three passes."""
        memory = self._slots(lanes=2)
        tokens = self._prompt.token_ids().tolist()
        for begin, end in ((0, 7), (7, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
            at = range(begin, end)
            spans = [
                Span(ids[begin:end], at, at, memory, lane) for lane, ids in enumerate((tokens, list(reversed(tokens))))
            ]
            logits = FlatPass(self._model.lm, self._turner, spans).forward()
        return logits[0]

    def shared(self) -> torch.Tensor:
        """The documents read in place, the last token alone, and a prompt with the documents exchanged beside it."""
        model = self._model
        readings = []
        for cache, segment in zip(self._caches, self._prompt.documents, strict=True):
            keys, values = torch.empty_like(cache.keys), torch.empty_like(cache.values)
            tables = model.rotary.tables(torch.arange(cache.tokens, device=model.device))
            model.rotary.place(cache.keys, cache.values, tables, keys, values)
            readings.append(Reading(Segment(keys, values), segment.start, segment.start))
        first, second = readings
        start = first.start + second.segment.slots
        exchanged = [Reading(second.segment, first.start, first.start), Reading(first.segment, start, start)]
        own = [s for s in self._prompt.segments if s.kind != "document"]
        tokens = [token for s in own for token in s.token_ids]
        positions = [at for s in own for at in range(s.start, s.end)]
        memory = self._slots(lanes=2)
        for begin, end in ((0, len(tokens) - 1), (len(tokens) - 1, len(tokens))):
            spans = [
                Span(tokens[begin:end], positions[begin:end], range(begin, end), memory, lane, each)
                for lane, each in enumerate((readings, exchanged))
            ]
            logits = FlatPass(model.lm, self._turner, spans).forward()
        return logits[0]

    def _slots(self, *, lanes: int) -> Slots:
        model, length = self._model, self._prompt.length
        (layers, heads, _, key_dim), (*_, value_dim) = model.recipes.shapes(1)
        keys, values = (
            torch.zeros(layers, lanes, heads, length, dim, dtype=model.dtype, device=model.device)
            for dim in (key_dim, value_dim)
        )
        return Slots(keys, values, torch.zeros(lanes, length, dtype=torch.int64, device=model.device))
