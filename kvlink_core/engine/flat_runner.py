"""Runs all requests of a step in one forward pass; documents are read where they lie (``models.flat``)."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.engine.documents import Key, SharedDocument, SharedDocuments
from kvlink_core.engine.memory import Budget, Lane, Lanes
from kvlink_core.engine.requests import Encoded, Encoding, GenerationRequest, Task, Work
from kvlink_core.errors import PrunedCacheError
from kvlink_core.fingerprint import digest_of_tokens
from kvlink_core.linking.base import DocumentsAt, documents_at
from kvlink_core.linking.linked_cache import PRUNED_REMEDY
from kvlink_core.models import LoadedModel
from kvlink_core.models.decode import Decoder
from kvlink_core.models.flat import FlatPass
from kvlink_core.models.flat_parts import Reading, Span
from kvlink_core.models.turning import QueryTurner
from kvlink_core.template import FIRST_WRAP_ID
from kvlink_core.types import DocumentCache

#: Above the number of any request.
_LAST = 1 << 62

#: A document's key in ``SharedDocuments``, its tokens, and the cache it comes from, if any.
_Wanted = tuple[Key, Sequence[int], DocumentCache | None]


@dataclass(slots=True)
class _Context:
    """What an admitted task holds."""

    lane: Lane
    documents: list[SharedDocument]
    started: bool = False
    readings: list[Reading] = field(default_factory=list)


class FlatRunner:
    """For models that attend as ours does.

    Args:
        model: the model.
        budget: of its memory.
        turner: turns queries back.
        shares: whether documents may be read in place; where not, they are copied into each request's slots.
    """

    def __init__(self, model: LoadedModel, budget: Budget, turner: QueryTurner, *, shares: bool) -> None:
        self._model = model
        self._turner = turner
        self._shares = shares
        self.lanes = Lanes(model, budget)
        self.documents = SharedDocuments(model, budget)
        self.decoder = Decoder(model.lm, turner) if model.device.type == "cuda" else None

    def needs(self, task: Task) -> int:
        """Bytes that a task takes at most, its documents included. To be asked first."""
        request = task.request
        task.wanted = self._wanted(request)
        own = self._own(task)
        nbytes = self.lanes.most_bytes(own + 1, own + request.sampling.max_tokens)
        return nbytes + sum(
            self.documents.nbytes(len(token_ids), cache)
            for token_ids, cache in {key: (t, c) for key, t, c in task.wanted}.values()
        )

    def _wanted(self, request: GenerationRequest) -> list[_Wanted]:
        """The documents that the engine has to hold for a request."""
        where = self._where(request)
        if where == "computed":
            return []
        segments = request.prompt.documents
        caches: Sequence[DocumentCache | None] = request.caches or [None] * len(segments)
        assert len(caches) == len(segments), "a cache, or None, for each document"
        pairs = [(segment.token_ids, cache) for segment, cache in zip(segments, caches, strict=True)]
        if where is None:
            pairs = [(token_ids, cache) for token_ids, cache in pairs if cache is None]
        space, copied = request.namespace, where is None
        return [(self.documents.key(space, tokens, cache, copied=copied), tokens, cache) for tokens, cache in pairs]

    def _where(self, request: GenerationRequest) -> DocumentsAt | None:
        """Where documents are read; ``None`` for a copy of each."""
        where = documents_at(request.linker)
        return where if self._shares or where == "computed" else None

    def _own(self, task: Task) -> int:
        """Slots that a task's prompt takes."""
        shared = self._where(task.request) in ("prompt", "local")
        return task.prompt.length - (sum(s.end - s.start for s in task.prompt.documents) if shared else 0)

    def open(self, task: Task) -> bool:
        """Take the memory that a task needs to begin; false, and nothing taken, where there is not enough.

        Raises:
            KVLinkError: a document cannot be read by this model; nothing taken.
        """
        documents: list[SharedDocument] = []
        lane = None
        try:
            for key, token_ids, cache in task.wanted:
                document = self.documents.open(key, token_ids, cache, task.number)
                if document is None:
                    break
                documents.append(document)
            else:
                lane = self.lanes.take(self._own(task) + len(task.transcript.token_ids) + 1)
        finally:
            if lane is None:
                for document in documents:
                    self.documents.close(document)
        if lane is None:
            return False
        task.context = _Context(lane, documents)
        mine = {document.key: len(document.token_ids) for document in documents if document.number == task.number}
        if not task.handle.preemptions:
            task.handle.computed_tokens = sum(tokens for (*_, kind), tokens in mine.items() if kind != "given")
        return True

    def close(self, task: Task) -> None:
        """Give everything back."""
        context: _Context = task.context
        task.context = None
        self.lanes.give(context.lane)
        for document in context.documents:
            self.documents.close(document)

    def ready(self, task: Task) -> bool:
        """Whether a task's own tokens can be computed: its documents are there.

        Raises:
            KVLinkError: its linker refuses the prompt.
        """
        context: _Context = task.context
        if not context.started and all(document.ready for document in context.documents):
            since = time.perf_counter()
            computed = self._begin(task, context)
            task.handle.linked(since)
            context.started = True
            if not task.handle.preemptions:
                task.handle.computed_tokens += computed
        return context.started

    def _begin(self, task: Task, context: _Context) -> int:
        """List what is to be computed; returns how many tokens of the prompt that makes."""
        where = self._where(task.request)
        if where is None:
            return self._copy(task, context)
        segments = task.prompt.segments
        if where != "computed":
            places = [segment.start for segment in task.prompt.documents]
            context.readings = [
                Reading(document.segment, start, start if where == "prompt" else 0)
                for document, start in zip(context.documents, places, strict=True)
            ]
            segments = tuple(segment for segment in segments if segment.kind != "document")
        token_ids = [token for segment in segments for token in segment.token_ids]
        positions = [at for segment in segments for at in range(segment.start, segment.end)]
        task.begin(token_ids, positions, range(len(positions)))
        return len(positions)

    @torch.inference_mode()
    def _copy(self, task: Task, context: _Context) -> int:
        """Link into the task's own slots."""
        made = iter(context.documents)
        caches = []
        for cache in task.request.caches or [None] * len(task.prompt.documents):
            own = cache if cache is not None else next(made).cache
            assert own is not None
            if own.kept is not None:
                raise PrunedCacheError(
                    f"linker {task.request.linker.name!r} copies documents into a request's slots, of which pruned "
                    f"caches have too few; {PRUNED_REMEDY}",
                    param="linker",
                )
            caches.append(own)
        linked = task.request.linker.link(self._model, task.prompt, caches, reserve=0)
        length, lane = linked.prompt.length, context.lane
        # What is pending there may be anything, even not a number.
        placed = torch.ones(length, dtype=torch.bool)
        placed[linked.pending] = False
        at = torch.nonzero(placed).flatten().to(self._model.device)
        lane.slots.keys[:, lane.index].index_copy_(2, at, linked.keys.index_select(2, at))
        lane.slots.values[:, lane.index].index_copy_(2, at, linked.values.index_select(2, at))
        lane.slots.positions[lane.index, :length] = torch.arange(length, device=self._model.device)
        pending = linked.pending.tolist()
        task.begin(linked.token_ids[linked.pending].tolist(), pending, pending)
        return linked.computed_tokens

    def room(self, task: Task) -> bool:
        """See to a slot for the task's next token; false where there is no memory for it."""
        context: _Context = task.context
        slot = task.slots[task.done]
        if slot < context.lane.capacity:
            return True
        larger = self.lanes.take(slot + 1)
        if larger is None:
            return False
        larger.copy_from(context.lane, slot)
        self.lanes.give(context.lane)
        context.lane = larger
        return True

    def encoding(self) -> list[SharedDocument]:
        """Documents that are being encoded."""
        return self.documents.encoding()

    def encoding_needs(self, tokens: int) -> int:
        """Bytes that a document takes that is encoded for its cache alone."""
        return self.documents.nbytes(tokens, None)

    def begin(self, encoding: Encoding) -> bool:
        """Encode a document from now on, a chunk in each step; false, and nothing taken, where there is no memory."""
        # Its number puts it behind all that somebody waits for.
        encoding.document = self.documents.open(
            ("", digest_of_tokens(encoding.token_ids), "added"), encoding.token_ids, None, _LAST + encoding.number
        )
        return encoding.document is not None

    def finish(self, encoding: Encoding) -> DocumentCache | None:
        """The cache of a document that was begun, and its memory given back; ``None`` while some of it is missing."""
        document: SharedDocument = encoding.document
        if not document.ready:
            return None
        cache = document.cache
        self.abandon(encoding)
        return cache

    def abandon(self, encoding: Encoding) -> None:
        """Give back the memory of a document that was begun."""
        self.documents.close(encoding.document)
        encoding.document = None

    def run(
        self, works: Sequence[Work], chunks: Sequence[tuple[SharedDocument, int]]
    ) -> tuple[torch.Tensor, list[Encoded]]:
        """Compute tokens of tasks and of documents.

        Returns:
            Float32 logits ``[tasks that now have their next token, vocabulary]``, and documents that are now complete.
        """
        spans = [self._span(work) for work in works] + [document.span(count) for document, count in chunks]
        embed = self._embedding(spans)
        logits = self._decoded(spans, embed) if not chunks else None
        if logits is None:
            logits = FlatPass(self._model.lm, self._turner, spans, embed=embed).forward()
        for work in works:
            work.task.done += work.count
        made = [(document.key, self.documents.advance(document, count)) for document, count in chunks]
        asked = [(space, cache) for (space, _, kind), cache in made if cache is not None and kind != "added"]
        return logits, [Encoded(cache, namespace) for namespace, cache in asked]

    def _decoded(
        self, spans: Sequence[Span], embed: Callable[[torch.Tensor], torch.Tensor] | None
    ) -> torch.Tensor | None:
        """A step that only decodes, on an accelerator; ``None`` for any other."""
        if not self.decoder or embed is not None or not all(s.wants_logits and len(s.slots) == 1 for s in spans):
            return None
        return self.decoder.step(spans, lambda: FlatPass(self._model.lm, self._turner, spans).forward())

    def _span(self, work: Work) -> Span:
        task = work.task
        context: _Context = task.context
        at = slice(task.done, task.done + work.count)
        return Span(
            task.token_ids[at],
            task.positions[at],
            task.slots[at],
            context.lane.slots,
            context.lane.index,
            context.readings,
            wants_logits=work.completes,
        )

    def _embedding(self, spans: Sequence[Span]) -> Callable[[torch.Tensor], torch.Tensor] | None:
        wrap = self._model.description.soft_wrap
        if wrap is None or all(token < FIRST_WRAP_ID for span in spans for token in span.token_ids):
            return None
        table = self._model.network.get_input_embeddings()
        return lambda token_ids: wrap.embed(table, token_ids)
