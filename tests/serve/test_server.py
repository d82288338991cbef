"""The engine replica on a session that follows a script: turns, cancellation, faults, what is counted. No Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest

from kvlink_core.engine import TokenEvent
from kvlink_core.errors import KVLinkError, StoreUnavailableError, UnknownDocumentError
from kvlink_core.session import AnswerRequest, Timings, Usage
from kvlink_core.store.resolver import Counters, ResolvedDocument
from kvlink_core.store.tiers import CacheStats
from kvlink_core.types import Document, DocumentRef
from serve.namespaces import Namespaces, Opened
from serve.server import EngineServer
from serve.wire import (
    EngineRequest,
    Event,
    Failed,
    ModelCard,
    Piece,
    Report,
    WireDocument,
    WireMessage,
    WireSampling,
)

CARD = ModelCard("m", 0, 100, "ab", ("full",), "full")


def request(name: str, *, documents: tuple[WireDocument, ...] = (), stream: bool = True) -> EngineRequest:
    sampling = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=4, stop=())
    return EngineRequest(name, (WireMessage("user", name),), documents, None, sampling, stream)


class ScriptedAnswer:
    linker = "full"
    timings = Timings(0.1, 0.2, 0.3, 0.4, 1.0)
    usage = Usage(prompt_tokens=9, cached_tokens=5, computed_tokens=4, completion_tokens=3)

    def __init__(self, session: ScriptedSession, name: str) -> None:
        self.session = session
        self.name = name
        self.documents = session.documents
        self.closed = threading.Event()

    def __iter__(self) -> Iterator[TokenEvent]:
        for i in range(3):
            self.session.step(f"{self.name}{i}")
            yield TokenEvent(f"{self.name}{i} ", (i,), "stop" if i == 2 else None)

    def close(self) -> None:
        self.closed.set()


class ScriptedSession:
    """Records on which thread each step ran, and can be held up or made to fail."""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.threads: set[str] = set()
        self.requests: list[AnswerRequest] = []
        self.answers: list[ScriptedAnswer] = []
        self.counters = Counters()
        self.tier_stats: CacheStats | None = None
        self.prefetched: list[AnswerRequest] = []
        self.documents: list[ResolvedDocument] = []
        self.on_step: Callable[[str], None] = lambda name: None

    def step(self, name: str) -> None:
        self.steps.append(name)
        self.threads.add(threading.current_thread().name)
        self.on_step(name)

    def prefetch(self, asked: AnswerRequest) -> None:
        self.prefetched.append(asked)

    def start(self, asked: AnswerRequest) -> ScriptedAnswer:
        self.requests.append(asked)
        self.step(asked.messages[-1].content)
        self.counters.add(
            requested_tokens=sum(d.tokens for d in self.documents),
            hit_tokens_store=sum(d.tokens for d in self.documents if d.origin == "store"),
            hit_tokens_host=sum(d.tokens for d in self.documents if d.origin == "host"),
            corrupt_payloads=sum(d.origin == "reencoded-corrupt" for d in self.documents),
        )
        self.answers.append(ScriptedAnswer(self, asked.messages[-1].content))
        return self.answers[-1]


class RecordedMetrics:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def running(self, count: int) -> None:
        self.seen.append(("running", count))

    def first_token(self, linker: str, seconds: float) -> None:
        self.seen.append(("first_token", linker))

    def lookup(self, *, requested_tokens: int, hit_tokens: Mapping[str, int], corrupt_payloads: int) -> None:
        by_tier = {tier: tokens for tier, tokens in hit_tokens.items() if tokens}
        self.seen.append(("lookup", requested_tokens, by_tier, corrupt_payloads))

    def tiers(self, stats: CacheStats) -> None:
        self.seen.append(("tiers", stats.circuit))

    def finished(self, report: Report, seconds: float) -> None:
        self.seen.append(("finished", report.linker))

    def failed(self, code: str) -> None:
        self.seen.append(("failed", code))


def serving(session: ScriptedSession, **options: Any) -> tuple[EngineServer, RecordedMetrics]:
    metrics = RecordedMetrics()
    opened: Any = session
    namespaces = Namespaces(lambda name: Opened(opened, None, lambda: None), most=1)
    with namespaces.use("default"):
        pass
    return EngineServer(namespaces, CARD, metrics, **({"stuck_after_s": 60.0} | options)), metrics


async def collect(server: EngineServer, asked: EngineRequest) -> list[Event]:
    return [event async for event in server.generate(asked)]


def test_an_answer_and_its_report() -> None:
    session = ScriptedSession()
    server, metrics = serving(session, linker="reposition")
    documents = (WireDocument("a"), WireDocument(None, "text", "title"))
    events = asyncio.run(collect(server, request("q", documents=documents)))
    assert events[:2] == [Piece("q0 "), Piece("q1 ")]
    last = events[2]
    assert isinstance(last, Piece)
    assert last.report is not None
    assert (last.text, last.finish_reason) == ("q2 ", "stop")
    assert (last.report.prompt_tokens, last.report.cached_tokens, last.report.computed_tokens) == (9, 5, 4)
    assert last.report.phases_s == (("lookup", 0.1), ("load", 0.2), ("link", 0.3), ("prefill", 0.4))
    asked = session.requests[0]
    assert asked.linker == "reposition"
    assert list(asked.documents) == [DocumentRef("a"), Document("", "text", "title")]
    assert metrics.seen == [
        ("running", 1),
        ("lookup", 0, {}, 0),
        ("first_token", "full"),
        ("finished", "full"),
        ("running", 0),
    ]


def test_documents_of_messages_reach_the_core() -> None:
    session = ScriptedSession()
    server, _ = serving(session)
    sampling = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=4, stop=())
    turns = (WireMessage("user", "q", (WireDocument("a"), WireDocument("b", "text"))), WireMessage("user", "r"))
    asyncio.run(collect(server, EngineRequest("r", turns, (), None, sampling, True)))
    assert [list(m.documents) for m in session.requests[0].messages] == [[DocumentRef("a"), Document("b", "text")], []]


@pytest.mark.parametrize("text", [None, "text"])
def test_the_rule_for_document_ids_is_the_store_s(text: str | None) -> None:
    session = ScriptedSession()
    server, _ = serving(session)
    (refused,) = asyncio.run(collect(server, request("q", documents=(WireDocument("i" * 1025, text),))))
    assert isinstance(refused, Failed)
    assert refused.error.status == 400
    assert "1025 bytes" in refused.error.message
    assert session.requests == []
    assert isinstance(asyncio.run(collect(server, request("q", documents=(WireDocument("i" * 1024, text),))))[0], Piece)


def test_without_streaming_the_answer_is_one_piece() -> None:
    server, _ = serving(ScriptedSession())
    (only,) = asyncio.run(collect(server, request("q", stream=False)))
    assert isinstance(only, Piece)
    assert (only.text, only.finish_reason) == ("q0 q1 q2 ", "stop")


def test_concurrent_requests_take_turns_on_one_thread() -> None:
    session = ScriptedSession()
    server, _ = serving(session)

    async def go() -> None:
        await asyncio.gather(*(collect(server, request(name)) for name in "ab"))

    asyncio.run(go())
    assert session.steps == ["a", "b", "a0", "b0", "a1", "b1", "a2", "b2"]
    assert len(session.threads) == 1


def test_health_is_answered_while_a_step_runs_and_fails_when_it_is_stuck() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()

    def hold(name: str) -> None:
        entered.set()
        assert release.wait(30)

    session.on_step = hold

    async def go() -> None:
        server, _ = serving(session)
        impatient, _ = serving(session, stuck_after_s=0.0)
        working = asyncio.create_task(collect(server, request("q")))
        stuck = asyncio.create_task(collect(impatient, request("q")))
        await asyncio.to_thread(entered.wait, 30)
        while len(session.steps) < 2:
            await asyncio.sleep(0.01)
        try:
            assert await server.ping() == "ok"
            with pytest.raises(RuntimeError, match="one engine step has been running"):
                await impatient.check_health()
        finally:
            release.set()
        await asyncio.gather(working, stuck)
        assert await impatient.ping() == "ok"

    asyncio.run(go())


@pytest.mark.parametrize("at", ["q", "q1"])
def test_a_cancelled_request_stops_after_the_step_at_hand_and_is_freed(at: str) -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == at:
            entered.set()
            assert release.wait(30)

    session.on_step = hold

    async def go() -> None:
        server, metrics = serving(session)
        first = asyncio.create_task(collect(server, request("q")))
        await asyncio.to_thread(entered.wait, 30)
        queued = asyncio.create_task(collect(server, request("never")))
        await asyncio.sleep(0.01)
        for task in (first, queued):
            task.cancel()
        await asyncio.gather(first, queued, return_exceptions=True)
        release.set()
        await collect(server, request("r"))
        assert metrics.seen[-1] == ("running", 0)

    asyncio.run(go())
    assert session.answers[0].closed.is_set()
    assert "never" not in session.steps
    assert session.steps[session.steps.index(at) + 1] == "r"


def test_a_closed_generator_frees_its_answer() -> None:
    session = ScriptedSession()

    async def go() -> None:
        server, _ = serving(session)
        events = server.generate(request("q"))
        assert await anext(events) == Piece("q0 ")
        await events.aclose()

    asyncio.run(go())
    assert session.answers[0].closed.is_set()
    assert session.steps == ["q", "q0"]


@pytest.mark.parametrize(
    ("error", "status", "code", "said"),
    [
        (UnknownDocumentError(["x"]), 404, "document_not_found", "'x'"),
        (StoreUnavailableError("/secret is away"), 503, "store_unavailable", "try again"),
        (KVLinkError("/secret"), 500, "kvlink_error", "x-request-id"),
        (RuntimeError("/secret"), 500, "internal_error", "x-request-id"),
    ],
)
@pytest.mark.parametrize("at", ["q", "q1"])
def test_faults_are_data(error: Exception, status: int, code: str, said: str, at: str) -> None:
    session = ScriptedSession()

    def fail(name: str) -> None:
        if name == at:
            raise error

    session.on_step = fail
    server, metrics = serving(session)
    last = asyncio.run(collect(server, request("q")))[-1]
    assert isinstance(last, Failed)
    assert (last.error.status, last.error.code) == (status, code)
    assert said in last.error.message
    assert "secret" not in last.error.message
    assert metrics.seen[-2:] == [("failed", code), ("running", 0)]


def test_a_refused_payload_is_counted_and_logged_with_its_document(caplog: pytest.LogCaptureFixture) -> None:
    session = ScriptedSession()
    session.documents = [ResolvedDocument("good", 7, "store"), ResolvedDocument("bad", 5, "reencoded-corrupt")]
    server, metrics = serving(session)
    with caplog.at_level(logging.INFO, "ray.serve"):
        logging.getLogger("ray.serve").addHandler(caplog.handler)
        try:
            asyncio.run(collect(server, request("q")))
            asyncio.run(collect(server, request("q")))
        finally:
            logging.getLogger("ray.serve").removeHandler(caplog.handler)
    assert [m for m in metrics.seen if m[0] == "lookup"] == [("lookup", 12, {"store": 7}, 1)] * 2
    warnings = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert warnings
    assert all("corrupt_payload" in w and "request_id=q" in w and "document_id='bad'" in w for w in warnings)


def test_tiers_are_reported_and_documents_of_those_who_wait_are_fetched_ahead() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()
    session.documents = [ResolvedDocument("near", 5, "host"), ResolvedDocument("far", 7, "store")]
    session.tier_stats = CacheStats({}, {}, computed=0, late=0, failures=3, circuit="open", circuit_opened=1)

    def hold(name: str) -> None:
        entered.set()
        assert release.wait(30)

    session.on_step = hold

    async def go() -> RecordedMetrics:
        server, metrics = serving(session)
        first = asyncio.create_task(collect(server, request("first")))
        await asyncio.to_thread(entered.wait, 30)
        second = asyncio.create_task(collect(server, request("second")))
        while not session.prefetched:
            await asyncio.sleep(0.005)
        assert session.steps == ["first"]
        release.set()
        await asyncio.gather(first, second)
        return metrics

    metrics = asyncio.run(go())
    assert [r.messages[-1].content for r in session.prefetched] == ["second"]
    assert [m for m in metrics.seen if m[0] == "lookup"] == [("lookup", 12, {"host": 5, "store": 7}, 0)] * 2
    assert metrics.seen.count(("tiers", "open")) == 2
