"""One question, from documents to an answer: look up, load, link, prefill, decode.

This is what the command line, the evaluation and the service share. It reads as the query path of DESIGN section 5;
nothing below it calls back.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from kvlink_core.engine import Generation, GenerationRequest, SamplingParams, TokenEvent
from kvlink_core.errors import PromptTooLongError
from kvlink_core.linking import Linker, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Frame, Prompt
from kvlink_core.store import DocumentStore
from kvlink_core.store.resolver import Counters, DocumentResolver, Lookup, ResolvedDocument
from kvlink_core.store.tiers import CacheStats, Tier, TieredCache, TierSettings
from kvlink_core.types import Document, DocumentCache, DocumentRef, Message


@dataclass(frozen=True, slots=True)
class AnswerRequest:
    """A conversation, the documents it stands on, and how to answer.

    ``documents`` stand where the model's layout puts them; those of a message stand before that message's content.
    ``linker`` is written as for ``get_linker``, e.g. ``epic:k=8``; ``None`` is the model's default.
    """

    messages: Sequence[Message]
    documents: Sequence[Document | DocumentRef] = ()
    linker: str | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one answer: of the prompt, of these taken from caches, of these computed, and generated."""

    prompt_tokens: int
    cached_tokens: int
    computed_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds of each step up to the first token; ``ttft_s`` is their sum as a clock saw it."""

    lookup_s: float
    load_s: float
    link_s: float
    prefill_s: float
    ttft_s: float


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request looked up and loaded, for an engine to answer.

    Attributes:
        request: for ``Engine.submit``; documents that no store had are left for the engine to encode.
        linker: its name.
        documents: where they came from.
        cached_tokens: of the prompt, taken from caches.
        lookup_s, load_s, link_s: seconds that it took; linking is laying out the prompt here, and the engine's else.
    """

    request: GenerationRequest
    linker: str
    documents: list[ResolvedDocument]
    cached_tokens: int
    lookup_s: float
    load_s: float
    link_s: float


class Answer:
    """An answer under way: its first token is known. Iterate once for the events; ``close`` to abandon it."""

    def __init__(
        self,
        generation: Generation,
        prompt: Prompt,
        linker: str,
        computed_tokens: int,
        cached_tokens: int,
        documents: list[ResolvedDocument],
        timings: Timings,
    ) -> None:
        self._generation: Generation | None = generation
        self._prompt = prompt
        self._computed = computed_tokens
        self._cached = cached_tokens
        self._completed = 0
        self.linker = linker
        self.documents = documents
        self.timings = timings

    def __iter__(self) -> Iterator[TokenEvent]:
        """The events of the answer, one per token."""
        generation = self._generation
        for event in generation or ():
            if self._generation is not generation:
                return  # closed by the consumer between two tokens
            self._completed += len(event.token_ids)
            yield event
        self.close()

    def close(self) -> None:
        """Drop the linked cache; idempotent."""
        self._generation = None

    def text(self) -> str:
        """The whole (remaining) answer."""
        return "".join(event.text for event in self)

    @property
    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(self._prompt.length, self._cached, self._computed, self._completed)


class Session:
    """Answers questions with one model over one store. Safe to use from several threads.

    Args:
        model: the model.
        store: opened with ``model.fingerprint``, or ``None``: then documents must come as text.
        tiers: where caches are kept between requests; ``None`` keeps none. With settings, ``close`` it;
            tiers that it shares with others (``shared_tiers``) stay open.

    Attributes:
        namespace: of its requests in an engine that several sessions share.

    Raises:
        ConfigError: the memory or the directory of ``tiers`` cannot be had.
    """

    def __init__(
        self, model: LoadedModel, store: DocumentStore | None = None, tiers: TierSettings | TieredCache | None = None
    ) -> None:
        self.model = model
        self._resolver = DocumentResolver(model, store, tiers)
        # Sessions that share an engine share documents in it where they share a namespace.
        self.namespace = uuid.uuid4().hex if store is None else store.namespace

    def close(self) -> None:
        """End the tiers' threads and free their memory; the store stays open. It must not be used afterwards."""
        self._resolver.close()

    @property
    def counters(self) -> Counters:
        """What happened since start."""
        return self._resolver.counters

    @property
    def tier_stats(self) -> CacheStats | None:
        """What the tiers hold and did, if there are any."""
        return self._resolver.tier_stats

    def calibrate(self) -> None:
        """With tiers, compute a little to learn how long that takes, before the first request has to guess."""
        self._resolver.calibrate()

    def tiers_of(self, ids: Sequence[str]) -> list[Tier]:
        """Where stored documents are now: the tiers that hold all of them, the store last; none if one is unknown."""
        return self._resolver.tiers_of(ids)

    def prefetch(self, request: AnswerRequest) -> None:
        """Begin to load what ``start`` will load, and return: for a request that has to wait for its turn.

        Raises as ``start`` does for a request that cannot be answered, unless there are no tiers.
        """
        if self._resolver.tiered:
            linker, lookup, _, _ = self._plan(request)
            if linker.uses_caches:
                self._resolver.prefetch(lookup)

    def start(self, request: AnswerRequest) -> Answer:
        """Answer; returns when the first token is known.

        Raises:
            InputError: see its subclasses.
            StoreUnavailableError: the store does not answer and a document is known by its id alone.
        """
        started = time.perf_counter()
        linker, lookup, frame, max_tokens = self._plan(request)
        looked_up = time.perf_counter()
        caches: list[DocumentCache] = []
        if linker.uses_caches and lookup.ids:
            caches, resolved = self._resolver.load(lookup)
        else:
            lengths = zip(lookup.ids, lookup.lengths, strict=True)
            resolved = [ResolvedDocument(i, n, None) for i, n in lengths]
        prompt = self._prompt(frame, linker, self._resolver.fill_tokens(lookup))
        loaded = time.perf_counter()
        linked = linker.link(self.model, prompt, caches, reserve=max_tokens)
        computed_tokens = linked.computed_tokens
        linked_at = time.perf_counter()
        generation = Generation(linked, request.sampling, max_tokens=max_tokens, stop_ids=self.model.stop_ids)
        done = time.perf_counter()
        cached = sum(r.tokens for r in resolved if r.hit)
        encoded = sum(c.tokens for c in caches) - cached
        return Answer(
            generation,
            prompt,
            linker.name,
            computed_tokens + encoded,
            cached,
            resolved,
            Timings(looked_up - started, loaded - looked_up, linked_at - loaded, done - linked_at, done - started),
        )

    def prepare(self, request: AnswerRequest) -> Prepared:
        """Everything of a request that is not computing: what ``start`` does before it links. For engines.

        Raises:
            InputError, StoreUnavailableError: as ``start``.
        """
        started = time.perf_counter()
        linker, lookup, frame, max_tokens = self._plan(request)
        looked_up = time.perf_counter()
        caches: list[DocumentCache | None] = []
        if linker.uses_caches and lookup.ids:
            caches, resolved = self._resolver.find(lookup)
        else:
            lengths = zip(lookup.ids, lookup.lengths, strict=True)
            resolved = [ResolvedDocument(i, n, None) for i, n in lengths]
        tokens = self._resolver.fill_tokens(lookup)
        loaded = time.perf_counter()
        prompt = self._prompt(frame, linker, tokens)
        sampling = replace(request.sampling, max_tokens=max_tokens)
        return Prepared(
            GenerationRequest(prompt, linker, sampling, caches, namespace=self.namespace),
            linker.name,
            resolved,
            sum(r.tokens for r in resolved if r.hit),
            looked_up - started,
            loaded - looked_up,
            time.perf_counter() - loaded,
        )

    def keep(self, cache: DocumentCache) -> None:
        """Keep, with tiers, a cache that an engine encoded for a request that was prepared here."""
        self._resolver.keep(cache)

    def _plan(self, request: AnswerRequest) -> tuple[Linker, Lookup, Frame, int]:
        """Choose the linker, find the documents, and check that all of it fits, before anything is loaded."""
        request.sampling.validate()
        linker = get_linker(request.linker or self.model.default_linker)
        layout = self.model.layout
        frame = layout.frame(request.messages, documents=len(request.documents))
        lookup = self._resolver.lookup(layout.in_order(request.messages, request.documents))
        length = self._prompt(frame, linker, [[0] * n for n in lookup.lengths]).length
        room = self.model.context_length - length
        if room < 1:
            raise PromptTooLongError(length, self.model.context_length, reason=self.model.spec.context_reason)
        return linker, lookup, frame, min(room, request.sampling.max_tokens)

    def _prompt(self, frame: Frame, linker: Linker, documents: Sequence[Sequence[int]]) -> Prompt:
        layout = self.model.layout
        if layout.wrap is not None and not linker.uses_caches:
            documents = [layout.wrap.inside(d) for d in documents]
        links = linker.links(layout) if documents else None
        return layout.assemble(frame, documents, links=links)
