"""Runs each request by itself, over a linked cache of its own: for models whose attention is not ours to arrange."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine.documents import SharedDocument
from kvlink_core.engine.memory import Budget
from kvlink_core.engine.requests import Encoded, Encoding, Task, Work
from kvlink_core.linking import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache

#: ``SlotMemory`` lends a quarter more than it is asked for.
_LENT = 1.25


@dataclass(slots=True)
class _Opening:
    """A request that is not linked yet: its documents without a cache, and those of them that are encoded."""

    cold: list[tuple[int, ...]]
    made: dict[tuple[int, ...], DocumentCache] = field(default_factory=dict)


class SoloRunner:
    """Requests share steps and memory, and no forward pass; nothing of a document is shared.

    A document that has no cache is encoded whole, one of a request's documents in each step before it begins.

    Args:
        model: the model.
        budget: of its memory.
    """

    def __init__(self, model: LoadedModel, budget: Budget) -> None:
        self._model = model
        self._budget = budget
        self._encoder = DocumentEncoder(model)

    def needs(self, task: Task) -> int:
        """Bytes that a task takes: the whole answer's slots are reserved."""
        shapes = self._model.recipes.shapes(task.prompt.length + task.request.sampling.max_tokens)
        return int(_LENT * sum(torch.Size(shape).numel() for shape in shapes) * self._model.dtype.itemsize) + 1

    def open(self, task: Task) -> bool:
        """Take the memory that a task needs; false where there is not enough."""
        if not self._budget.take(self.needs(task)):
            return False
        task.context = _Opening(self._cold(task))
        return True

    def _cold(self, task: Task) -> list[tuple[int, ...]]:
        request = task.request
        if not request.linker.uses_caches:
            return []
        segments = task.prompt.documents
        given = list(request.caches) or [None] * len(segments)
        return list(dict.fromkeys(s.token_ids for s, cache in zip(segments, given, strict=True) if cache is None))

    def close(self, task: Task) -> None:
        """Give everything back."""
        task.context = None
        self._budget.give(self.needs(task))

    def ready(self, task: Task) -> bool:
        """Whether a task's own tokens can be computed; encodes a document, or links, of one that was opened.

        Raises:
            KVLinkError: its linker refuses the prompt.
        """
        opening = task.context
        if not isinstance(opening, _Opening):
            return True
        token_ids = next((t for t in opening.cold if t not in opening.made), None)
        if token_ids is not None:
            (opening.made[token_ids],) = self._encoder.encode([list(token_ids)])
        if len(opening.made) < len(opening.cold):
            return False
        task.context = self._link(task, opening)
        return True

    def _link(self, task: Task, opening: _Opening) -> LinkedCache:
        request, caches = task.request, []
        if request.linker.uses_caches:
            segments = task.prompt.documents
            given = list(request.caches) or [None] * len(segments)
            caches = [cache or opening.made[s.token_ids] for s, cache in zip(segments, given, strict=True)]
        since = time.perf_counter()
        linked = request.linker.link(self._model, task.prompt, caches, reserve=request.sampling.max_tokens)
        task.handle.linked(since)
        pending = linked.pending.tolist()
        task.begin(linked.token_ids[linked.pending].tolist(), pending, pending)
        if not task.handle.preemptions:
            task.handle.computed_tokens = linked.computed_tokens + sum(map(len, opening.cold))
        return linked

    def room(self, task: Task) -> bool:
        """Always: slots were reserved."""
        return True

    def encoding(self) -> list[SharedDocument]:
        """None: see ``ready``."""
        return []

    def encoding_needs(self, tokens: int) -> int:
        """As ``FlatRunner.encoding_needs``."""
        shapes = self._model.recipes.shapes(tokens)
        return sum(torch.Size(shape).numel() for shape in shapes) * self._model.dtype.itemsize

    def begin(self, encoding: Encoding) -> bool:
        """As ``FlatRunner.begin``, but that it will be encoded whole."""
        return self._budget.take(self.encoding_needs(len(encoding.token_ids)))

    def finish(self, encoding: Encoding) -> DocumentCache | None:
        """Encode the document, and give its memory back."""
        (cache,) = self._encoder.encode([encoding.token_ids])
        self.abandon(encoding)
        return cache

    def abandon(self, encoding: Encoding) -> None:
        """As ``FlatRunner.abandon``."""
        self._budget.give(self.encoding_needs(len(encoding.token_ids)))

    def run(
        self, works: Sequence[Work], chunks: Sequence[tuple[SharedDocument, int]]
    ) -> tuple[torch.Tensor, list[Encoded]]:
        """As ``FlatRunner.run``."""
        assert not chunks
        rows = []
        for work in works:
            task, completes = work.task, work.completes
            at = slice(task.done, task.done + work.count)
            logits = task.context.compute(torch.tensor(task.token_ids[at]), torch.tensor(task.positions[at]))
            task.done += work.count
            if completes:
                rows.append(logits)
        return torch.stack(rows) if rows else torch.empty(0), []
