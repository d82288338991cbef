"""``kvlink bench serve``: the engine under many requests, beside the bare model and beside itself, in one process."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from kvlink_core.benchmark.bare import BareBatch
from kvlink_core.benchmark.corpus import Corpus
from kvlink_core.benchmark.results import Case
from kvlink_core.benchmark.rounds import Clock, Progress, Work, alternate
from kvlink_core.engine import Engine, EngineSettings, Generated, GenerationRequest, Handle, SamplingParams
from kvlink_core.engine.flat_runner import FlatRunner
from kvlink_core.errors import ConfigError
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, Segment
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache

_NO_STOP = frozenset[int]()

#: Steps of a batch that are timed in one run.
_STEPS = 8


@dataclass(frozen=True, slots=True)
class ServingCase:
    """What is asked.

    Attributes:
        requests: in a full batch.
        documents, document_tokens: hot ones, all of which every request reads.
        query_tokens, links: tokens of a question, and link tokens after each document.
        answer_tokens: of each answer.
        own_documents: of each request, where requests share none.
        clients: that keep asking, one request each at a time, where time to first token is measured.
        cold: documents that arrive while others decode.
        repeats: runs of what is compared.
    """

    requests: int = 16
    documents: int = 10
    document_tokens: int = 500
    query_tokens: int = 32
    links: int = 5
    answer_tokens: int = 32
    own_documents: int = 2
    clients: int = 4
    cold: int = 8
    repeats: int = 7

    @property
    def context_tokens(self) -> int:
        """Document tokens of a prompt."""
        return self.documents * self.document_tokens


@dataclass(frozen=True, slots=True)
class Measured:
    """Seconds (or tokens a second) of each run, by name, and the bytes of the documents in memory."""

    decode: Mapping[str, Sequence[float]]
    throughput: Mapping[str, Sequence[float]]
    first_tokens: Mapping[str, Sequence[float]]
    gaps: Mapping[str, Sequence[float]]
    document_bytes: Mapping[str, int]


class ServingBench:
    """Measures one model on one case.

    Raises:
        ConfigError: the prompts do not fit the model, or its documents cannot be shared.
    """

    def __init__(self, model: LoadedModel, case: ServingCase, *, step_tokens: int, stretch: float | None) -> None:
        self._model = model
        self._case = case
        longest = case.context_tokens + case.documents * case.links + case.query_tokens
        if longest + 4096 > model.context_length and longest + case.answer_tokens * 8 > model.context_length:
            raise ConfigError(
                f"prompts of {longest:,} tokens and their answers exceed the model's {model.context_length:,}.",
                param="documents",
            )
        self._settings = EngineSettings(
            kv_bytes=2**40, max_running=case.requests + case.cold, step_tokens=step_tokens, stretch=stretch
        )
        engine = Engine(model, self._settings)
        if engine.mode != "shared":
            raise ConfigError("this model's documents cannot be shared between requests.", param="model")
        self._settings = replace(self._settings, mode=engine.mode)
        corpus = Corpus(model, None, "raw")
        ttft = Case(
            context_tokens=case.context_tokens,
            document_tokens=case.document_tokens,
            query_tokens=case.query_tokens,
            links=case.links,
        )
        self._caches = corpus.caches(ttft)
        self._linked = corpus.prompt(ttft, LinkTokens(tuple(range(case.links)), case.links))
        self._plain = corpus.prompt(ttft, None)
        self._draw = torch.Generator().manual_seed(7)

    def run(self, progress: Progress) -> Measured:
        """All of it."""
        case, clock = self._case, Clock(self._model.device)
        answer = (case.repeats + 1) * _STEPS + case.requests * 8
        decode: dict[str, list[float]] = {}
        shared = self._full_batch([self._request("link-tokens", answer) for _ in range(case.requests)])
        own = self._full_batch([self._own(answer) for _ in range(case.requests)])
        for what, engine, length in (("", shared, self._linked.length), (", own documents", own, self._own_length)):
            with BareBatch(self._model, batch=case.requests, length=length + answer // 2) as bare:
                runs = alternate(
                    {
                        f"engine{what}": Work(partial(_steps, engine, clock)),
                        f"bare in place{what}": Work(partial(_bare, bare, clock, grow=False)),
                        f"bare DynamicCache{what}": Work(partial(_bare, bare, clock, grow=True)),
                    },
                    case.repeats,
                    progress,
                )
            decode |= _seconds(runs)
            engine.cancel_all()
        rates = alternate(
            {
                "batch": Work(lambda: {"whole": self._rate(case.requests, case.requests)}),
                "one at a time": Work(lambda: {"whole": self._rate(1, 2)}),
            },
            max(1, case.repeats // 2),
            progress,
        )
        first: dict[str, list[float]] = {"link-tokens": [], "full": []}
        engines = {linker: Engine(self._model, replace(self._settings, max_running=case.clients)) for linker in first}
        _finish(engines["link-tokens"], [self._request("link-tokens", 1)])
        for _ in range(2):
            for linker, times in first.items():
                count = case.clients * (4 if linker != "full" else 1)
                times += self._first_tokens(engines[linker], linker, count)
        return Measured(
            decode,
            _seconds(rates),
            first,
            {"with cold documents": self._gaps(case.cold), "without": self._gaps(0)},
            {"one request": self._document_bytes(1), f"{case.requests} requests": self._document_bytes(case.requests)},
        )

    def _request(self, linker: str, answer: int) -> GenerationRequest:
        """A question of its own on the hot documents."""
        prompt = self._plain if linker == "full" else self._linked
        *before, last = prompt.segments
        question = Segment("suffix", tuple(self._tokens(len(last.token_ids))), last.start)
        return GenerationRequest(
            Prompt((*before, question)),
            get_linker(linker),
            SamplingParams(max_tokens=answer),
            self._caches if linker != "full" else (),
            _NO_STOP,
        )

    def _cold(self, answer: int) -> GenerationRequest:
        """A question on one document that nobody has seen."""
        document = tuple(self._tokens(self._case.document_tokens))
        question = tuple(self._tokens(self._case.query_tokens))
        prompt = Prompt((Segment("document", document, 0, 0), Segment("suffix", question, len(document))))
        return GenerationRequest(prompt, get_linker("reposition"), SamplingParams(max_tokens=answer), (None,), _NO_STOP)

    def _tokens(self, count: int) -> list[int]:
        return torch.randint(0, self._model.spec.vocab_size, (count,), generator=self._draw).tolist()

    def _own(self, answer: int) -> GenerationRequest:
        """A question on documents that nobody else reads: what they hold does not matter here."""
        segments: list[Segment] = []
        caches = []
        for place in range(self._case.own_documents):
            tokens = self._tokens(self._case.document_tokens)
            start = segments[-1].end if segments else 0
            segments.append(Segment("document", tuple(tokens), start, place))
            keys, values = (
                torch.randn(shape, dtype=self._model.dtype) for shape in self._model.recipes.shapes(len(tokens))
            )
            caches.append(DocumentCache(torch.tensor(tokens), keys, values))
        segments.append(Segment("suffix", tuple(self._tokens(self._case.query_tokens)), segments[-1].end))
        sampling = SamplingParams(max_tokens=answer)
        return GenerationRequest(Prompt(tuple(segments)), get_linker("reposition"), sampling, caches, _NO_STOP)

    @property
    def _own_length(self) -> int:
        return self._case.own_documents * self._case.document_tokens + self._case.query_tokens

    def _full_batch(self, requests: Sequence[GenerationRequest]) -> Engine:
        """An engine in which all requests decode."""
        engine = Engine(self._model, self._settings)
        handles = [engine.submit(request) for request in requests]
        while any(handle.first_token is None for handle in handles):
            engine.step()
        return engine

    def _rate(self, running: int, count: int) -> float:
        """Output tokens a second, from the first request's arrival to the last one's end, documents in memory."""
        engine = Engine(self._model, replace(self._settings, max_running=running))
        _finish(engine, [self._request("link-tokens", 1)])
        requests = [self._request("link-tokens", self._case.answer_tokens) for _ in range(count)]
        started = time.perf_counter()
        _finish(engine, requests)
        return count * self._case.answer_tokens / (time.perf_counter() - started)

    def _first_tokens(self, engine: Engine, linker: str, total: int) -> list[float]:
        """Times to first token with clients that ask again as soon as they are answered."""
        case = self._case
        handles: list[Handle] = []
        live: set[Handle] = set()
        steps = 0
        while len(handles) < total or live:
            # The first requests come one after the other, so that clients are not in step.
            due = min(case.clients, 1 + steps * case.clients // case.answer_tokens)
            while len(live) < due and len(handles) < total:
                handle = engine.submit(self._request(linker, case.answer_tokens))
                handles.append(handle)
                live.add(handle)
            engine.step()
            steps += 1
            live = {handle for handle in live if not handle.finished}
        return [(handle.first_token or 0.0) - handle.submitted for handle in handles]

    def _gaps(self, cold: int) -> list[float]:
        """Seconds between tokens of requests that decode while cold documents arrive one after the other."""
        answer = 100_000 if self._model.context_length > 110_000 else 512
        answer = min(answer, self._model.context_length - self._linked.length)
        engine = self._full_batch([self._request("link-tokens", answer) for _ in range(self._case.requests)])
        newcomer: Handle | None = None
        arrived = finished = 0
        last: dict[Handle, float] = {}
        gaps: list[float] = []
        own: set[Handle] = set()
        for _ in range(6):  # learn how long a step takes
            engine.step()
        while finished < cold or (not cold and len(gaps) < 20 * self._case.requests):
            if cold and (newcomer is None or newcomer.finished):
                finished = arrived
                if arrived == cold:
                    break
                newcomer = engine.submit(self._cold(2))
                own.add(newcomer)
                arrived += 1
            events = engine.step()
            now = time.perf_counter()
            for event in events:
                if isinstance(event, Generated) and event.handle not in own:
                    if event.handle in last:
                        gaps.append(now - last[event.handle])
                    last[event.handle] = now
        engine.cancel_all()
        return gaps

    def _document_bytes(self, requests: int) -> int:
        """Bytes of the documents that so many requests hold."""
        engine = Engine(self._model, replace(self._settings, max_running=requests))
        for _ in range(requests):
            engine.submit(self._request("link-tokens", 2))
        engine.step()
        assert engine.stats.running == requests
        runner = engine._runner
        assert isinstance(runner, FlatRunner)
        return runner.documents.held_bytes


def _steps(engine: Engine, clock: Clock) -> Mapping[str, float]:
    return {"whole": statistics.median(clock.time(engine.step)[0] for _ in range(_STEPS))}


def _bare(bare: BareBatch, clock: Clock, *, grow: bool) -> Mapping[str, float]:
    return {"whole": bare.step(clock, grow=grow)}


def _finish(engine: Engine, requests: Sequence[GenerationRequest]) -> None:
    for request in requests:
        engine.submit(request)
    while engine.busy:
        engine.step()


def _seconds(counted: Mapping[str, Sequence[Mapping[str, float]]]) -> dict[str, list[float]]:
    return {name: [run["whole"] for run in runs] for name, runs in counted.items()}
