"""What the tests of the engine share: requests, a run with arrivals, what was drawn from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Encoded, Engine, Failed, Generated, GenerationRequest, Handle, SamplingParams, TokenEvent
from kvlink_core.engine.generate import Generation
from kvlink_core.engine.requests import Task
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache, Message

NEVER = frozenset[int]()

TEXTS = (
    "Maria Lopez was born in Lima.",
    "She moved to Oslo in 1998, where she works at the harbour.",
    "!",
    "The harbour of Oslo closes at ten.",
    "Lima lies by the sea.",
)


@dataclass
class Outcome:
    """All that came of one request."""

    events: list[TokenEvent] = field(default_factory=list)
    logits: list[torch.Tensor] = field(default_factory=list)
    error: Exception | None = None

    @property
    def token_ids(self) -> list[int]:
        return [token for event in self.events for token in event.token_ids]

    @property
    def text(self) -> str:
        return "".join(event.text for event in self.events)


@contextmanager
def recorded_logits() -> Iterator[dict[int, list[torch.Tensor]]]:
    """The logits that each request's tokens are drawn from, by the ``id`` of its handle."""
    seen: dict[int, list[torch.Tensor]] = {}
    draw = Task.draw

    def recording(task: Task, logits: torch.Tensor, greedy: int) -> TokenEvent:
        seen.setdefault(id(task.handle), []).append(logits.clone())
        return draw(task, logits, greedy)

    with mock.patch.object(Task, "draw", recording):
        yield seen


def request_for(
    model: LoadedModel,
    linker: str,
    places: Sequence[int],
    question: str = "Where does Maria live?",
    *,
    cold: bool = False,
    **sampling: object,
) -> GenerationRequest:
    """A question on some of ``TEXTS``; ``cold``: the engine is to encode them."""
    how = get_linker(linker)
    documents = [model.layout.plain_tokens(TEXTS[place]) for place in places]
    links = how.links(model.layout) if documents else None
    prompt = model.layout.build([Message("user", question)], documents, links=links)
    caches: Sequence[DocumentCache | None] = []
    if how.uses_caches:
        caches = [None] * len(documents) if cold else cached(model, documents)
    options = {"max_tokens": 6} | sampling
    return GenerationRequest(prompt, how, SamplingParams(**options), caches, NEVER)  # type: ignore[arg-type]


def cached(model: LoadedModel, documents: Sequence[Sequence[int]]) -> list[DocumentCache]:
    """Caches, as a store would give them."""
    return DocumentEncoder(model, max_batch_tokens=256).encode([list(d) for d in documents])


def alone(model: LoadedModel, request: GenerationRequest) -> Outcome:
    """The answer of the copying path, nothing else running."""
    caches = list(request.caches)
    cold = [i for i, cache in enumerate(caches) if cache is None]
    segments = request.prompt.documents
    for i, cache in zip(cold, cached(model, [segments[i].token_ids for i in cold]), strict=True):
        caches[i] = cache
    whole = [cache for cache in caches if cache is not None]
    reserve = request.sampling.max_tokens
    linked = request.linker.link(model, request.prompt, whole, reserve=reserve)
    stop_ids = model.stop_ids if request.stop_ids is None else request.stop_ids
    outcome = Outcome()
    generation = Generation(linked, request.sampling, max_tokens=reserve, stop_ids=stop_ids)
    outcome.logits.append(generation._logits)
    for event in generation:
        outcome.events.append(event)
        if generation._logits is not outcome.logits[-1]:
            outcome.logits.append(generation._logits)
    return outcome


def run(
    engine: Engine, requests: Sequence[GenerationRequest], *, arrivals: Sequence[int] | None = None
) -> list[Outcome]:
    """Submit each request before the step of that number, and step until all are answered."""
    arrivals = arrivals or [0] * len(requests)
    outcomes = [Outcome() for _ in requests]
    waiting = sorted(range(len(requests)), key=lambda i: arrivals[i])
    handles: dict[int, Outcome] = {}
    kept: list[Handle] = []
    with recorded_logits() as logits:
        for step in range(10_000):
            while waiting and arrivals[waiting[0]] <= step:
                i = waiting.pop(0)
                handle = engine.submit(requests[i])
                kept.append(handle)
                handles[id(handle)] = outcomes[i]
            for event in engine.step():
                if isinstance(event, Generated):
                    handles[id(event.handle)].events.append(event.event)
                elif isinstance(event, Failed):
                    handles[id(event.handle)].error = event.error
                else:
                    assert isinstance(event, Encoded)
            assert engine.stats.kv_used <= engine.stats.kv_limit
            if not waiting and not engine.busy:
                break
        else:
            raise AssertionError("the engine does not come to an end")
    for handle in kept:
        handles[id(handle)].logits = logits.get(id(handle), [])
    return outcomes


def worst(ours: Outcome, truth: Sequence[torch.Tensor]) -> float:
    """The largest difference of logits over the steps, relative to the largest logit."""
    pairs = zip(ours.logits, truth, strict=True)
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in pairs)
