"""The engine replica on a session that follows a script: turns, cancellation, faults, what is counted. No Ray."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from kvlink_core.engine import EngineEvent, EngineStats, Generated, Handle, TokenEvent
from kvlink_core.engine import Failed as EngineFailed
from kvlink_core.errors import KVLinkError, StoreUnavailableError, UnknownDocumentError
from kvlink_core.session import AnswerRequest, Prepared
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


class ScriptedSession:
    """Records what happened on which thread, and can be held up or made to fail; ``engine`` is its engine."""

    namespace = ""

    def __init__(self) -> None:
        self.steps: list[str] = []
        self.threads: set[str] = set()
        self.requests: list[AnswerRequest] = []
        self.counters = Counters()
        self.tier_stats: CacheStats | None = None
        self.documents: list[ResolvedDocument] = []
        self.on_step: Callable[[str], None] = lambda name: None
        self.engine = ScriptedEngine(self)

    def prepare(self, asked: AnswerRequest) -> Prepared:
        self.requests.append(asked)
        name = asked.messages[-1].content
        self.steps.append(name)
        self.on_step(name)
        self.counters.add(
            requested_tokens=sum(d.tokens for d in self.documents),
            hit_tokens_store=sum(d.tokens for d in self.documents if d.origin == "store"),
            hit_tokens_host=sum(d.tokens for d in self.documents if d.origin == "host"),
            corrupt_payloads=sum(d.origin == "reencoded-corrupt" for d in self.documents),
        )
        return Prepared(name, "full", self.documents, 5, 0.1, 0.2, 0.0625)  # type: ignore[arg-type]


class ScriptedEngine:
    """Three steps for each request, ``q0`` to ``q2`` of a request ``q``."""

    def __init__(self, session: ScriptedSession) -> None:
        self.session = session
        self.live: dict[Handle, tuple[str, int]] = {}
        self.cancelled: list[str] = []

    @property
    def busy(self) -> bool:
        return bool(self.live)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(len(self.live), 0, 9, 0, 0, 0, 0, 0, 0)

    def submit(self, name: Any) -> Handle:
        handle = Handle(9, submitted=1.0, admitted=1.5, computed_tokens=4, link_s=0.125)
        self.live[handle] = (name, 0)
        return handle

    def cancel(self, handle: Handle) -> None:
        if handle in self.live:
            self.cancelled.append(self.live.pop(handle)[0])

    def cancel_all(self) -> list[Handle]:
        handles = list(self.live)
        self.live.clear()
        return handles

    def step(self) -> list[EngineEvent]:
        self.session.threads.add(threading.current_thread().name)
        events: list[EngineEvent] = []
        for handle, (name, i) in list(self.live.items()):
            self.session.steps.append(f"{name}{i}")
            try:
                self.session.on_step(f"{name}{i}")
            except KVLinkError as error:
                del self.live[handle]
                events.append(EngineFailed(handle, error))
                continue
            handle.first_token = handle.first_token or 2.25
            handle.completion_tokens = i + 1
            self.live[handle] = (name, i + 1)
            if i == 2:
                del self.live[handle]
            events.append(Generated(handle, TokenEvent(f"{name}{i} ", (i,), "stop" if i == 2 else None)))
        return events


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

    def engine(self, stats: EngineStats) -> None:
        self.loaded = stats


def serving(session: ScriptedSession, **options: Any) -> tuple[EngineServer, RecordedMetrics]:
    metrics = RecordedMetrics()
    how = {"stuck_after_s": 60.0} | options
    opened: Any = session
    namespaces = Namespaces(lambda name: Opened(opened, None, lambda: None), most=1)
    with namespaces.use("default"):
        pass
    return EngineServer(namespaces, session.engine, CARD, metrics, **how), metrics  # type: ignore[arg-type]


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
    assert last.report.phases_s == (
        ("lookup", 0.1),
        ("load", 0.2),
        ("queue", 0.5),
        ("link", 0.1875),
        ("prefill", 0.625),
    )
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


def test_concurrent_requests_share_steps_on_one_thread() -> None:
    session = ScriptedSession()
    server, metrics = serving(session)

    async def go() -> list[list[Event]]:
        return await asyncio.gather(*(collect(server, request(name)) for name in "ab"))

    a, b = asyncio.run(go())
    assert [p.text for p in a if isinstance(p, Piece)] == ["a0 ", "a1 ", "a2 "]
    assert [p.text for p in b if isinstance(p, Piece)] == ["b0 ", "b1 ", "b2 "]
    assert session.threads == {"engine"}
    server.close()
    assert metrics.loaded.running == 0


def test_a_request_joins_between_two_steps() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "a1":
            entered.set()
            assert release.wait(30)

    session.on_step = hold

    async def go() -> None:
        server, _ = serving(session)
        first = asyncio.create_task(collect(server, request("a")))
        await asyncio.to_thread(entered.wait, 30)
        second = asyncio.create_task(collect(server, request("b")))
        while "b" not in session.steps:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        release.set()
        await asyncio.gather(first, second)

    asyncio.run(go())
    assert session.steps == ["a", "a0", "a1", "b", "a2", "b0", "b1", "b2"]


def test_health_is_answered_while_a_step_runs_and_fails_when_it_is_stuck() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "q0":
            entered.set()
            assert release.wait(30)

    session.on_step = hold

    async def go() -> None:
        server, _ = serving(session)
        working = asyncio.create_task(collect(server, request("q")))
        await asyncio.to_thread(entered.wait, 30)
        assert await server.ping() == "ok"
        server._stuck_after_s = 0.0
        with pytest.raises(RuntimeError, match="one engine step has been running"):
            await server.check_health()
        release.set()
        await working
        while server._engine.busy_s:
            await asyncio.sleep(0.001)
        assert await server.ping() == "ok"

    asyncio.run(go())


def test_a_cancelled_request_is_freed_before_the_next_step() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()

    def hold(name: str) -> None:
        if name == "q1":
            entered.set()
            assert release.wait(30)

    session.on_step = hold

    async def go() -> None:
        server, metrics = serving(session)
        first = asyncio.create_task(collect(server, request("q")))
        await asyncio.to_thread(entered.wait, 30)
        queued = asyncio.create_task(collect(server, request("never")))
        while "never" not in session.steps:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.05)
        for task in (first, queued):
            task.cancel()
        await asyncio.gather(first, queued, return_exceptions=True)
        release.set()
        await collect(server, request("r"))
        assert metrics.seen[-1] == ("running", 0)

    asyncio.run(go())
    assert session.engine.cancelled == ["q"]
    assert "never0" not in session.steps
    assert session.steps[session.steps.index("q1") + 1 :] == ["never", "r", "r0", "r1", "r2"]


def test_a_closed_generator_frees_its_answer() -> None:
    session, release = ScriptedSession(), threading.Event()
    session.on_step = lambda name: None if name != "q1" else [release.wait(30), None][1]

    async def go() -> None:
        server, _ = serving(session)
        events = server.generate(request("q"))
        assert await anext(events) == Piece("q0 ")
        await events.aclose()
        release.set()
        await collect(server, request("r"))

    asyncio.run(go())
    assert session.engine.cancelled == ["q"]
    assert "q2" not in session.steps


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


def test_tiers_are_reported_and_documents_of_those_who_wait_are_loaded_beside_a_step() -> None:
    session, release, entered = ScriptedSession(), threading.Event(), threading.Event()
    session.documents = [ResolvedDocument("near", 5, "host"), ResolvedDocument("far", 7, "store")]
    session.tier_stats = CacheStats({}, {}, computed=0, late=0, failures=3, circuit="open", circuit_opened=1)

    def hold(name: str) -> None:
        if name == "first0":
            entered.set()
            assert release.wait(30)

    session.on_step = hold

    async def go() -> RecordedMetrics:
        server, metrics = serving(session)
        first = asyncio.create_task(collect(server, request("first")))
        await asyncio.to_thread(entered.wait, 30)
        second = asyncio.create_task(collect(server, request("second")))
        while session.steps[-1] != "second":
            await asyncio.sleep(0.005)
        assert session.steps == ["first", "first0", "second"]
        release.set()
        await asyncio.gather(first, second)
        return metrics

    metrics = asyncio.run(go())
    assert [m for m in metrics.seen if m[0] == "lookup"] == [("lookup", 12, {"host": 5, "store": 7}, 0)] * 2
    assert metrics.seen.count(("tiers", "open")) == 2
