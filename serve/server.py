"""The engine replica: it holds the model and the store, and turns a request into events.

Looking up, reading from the store and laying out a prompt happen in a few threads of their own; all computing happens
in one (``engine_loop``), which steps the engine: requests join between steps and share each of them. The event loop
stays free: health checks are answered while a step runs.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict

import torch

from kvlink_core.engine import Encoded, Engine, SamplingParams
from kvlink_core.errors import KVLinkError
from kvlink_core.session import AnswerRequest, Prepared, Session
from kvlink_core.store.tiers import TIERS
from kvlink_core.types import Document, DocumentRef, Message, check_document_id
from serve.config import ServiceConfig
from serve.engine_loop import EngineLoop, Steps, Stream
from serve.loading import engine_settings, model_card, open_session
from serve.metrics import Metrics, PrometheusMetrics
from serve.wire import (
    ApiError,
    DocumentReport,
    EngineRequest,
    Event,
    Failed,
    ModelCard,
    Piece,
    Report,
    WireDocument,
    api_error,
)

logger = logging.getLogger("ray.serve")

#: Requests that are looked up and loaded at the same time: enough to hide what a store waits for.
_LOADING_THREADS = 4


class EngineServer:
    """Answers requests with one model over one store.

    Args:
        session: looks requests up.
        engine: computes; touched by nobody else from now on.
        card: what is served.
        metrics: where to report.
        stuck_after_s: a step older than this fails the health check.
        linker: for requests that name none; ``None`` for the model's own.
    """

    def __init__(
        self,
        session: Session,
        engine: Steps,
        card: ModelCard,
        metrics: Metrics,
        *,
        stuck_after_s: float,
        linker: str | None = None,
    ) -> None:
        self._session = session
        self._card = card
        self._metrics = metrics
        self._stuck_after_s = stuck_after_s
        self._linker = linker
        self._loading = ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="load")
        self._engine = EngineLoop(engine, metrics.engine, self._keep)
        self._running = 0
        self._counting = threading.Lock()
        self._counted = session.counters.as_dict()

    def close(self) -> None:
        """End the threads; requests that run are dropped."""
        self._engine.close()
        self._loading.shutdown()

    async def card(self) -> ModelCard:
        """What is served."""
        return self._card

    async def ping(self) -> str:
        """Answers when the replica does."""
        await self.check_health()
        return "ok"

    async def check_health(self) -> None:
        """Raise when the computing thread is stuck; Serve then replaces the replica."""
        if self._engine.busy_s > self._stuck_after_s:
            raise RuntimeError(f"one engine step has been running for {self._engine.busy_s:.0f} s")

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """Answer one request. Closing or cancelling the generator frees all it holds before the next step.

        Never raises for a request: a fault is a last event ``Failed``.
        """
        arrived = time.monotonic()
        stream: Stream | None = None
        self._running += 1
        self._metrics.running(self._running)
        try:
            loading = self._loading.submit(self._prepare, request)
            prepared = await asyncio.wrap_future(loading)
            stream = self._engine.submit(prepared.request)
            held, ttft_s = "", None
            async for event in stream:
                if ttft_s is None:
                    ttft_s = time.monotonic() - arrived
                    self._metrics.first_token(prepared.linker, ttft_s)
                    sent = False
                held += event.text
                if event.finish_reason is not None:
                    report = self._report(request, prepared, stream, ttft_s, time.monotonic() - arrived)
                    stream = None
                    yield Piece(held, event.finish_reason, report)
                    return
                if request.stream and (held or not sent):
                    # The first event goes out even without text: with it the HTTP status is decided.
                    yield Piece(held)
                    held, sent = "", True
        except Exception as error:  # raised, it would reach the client as Ray's traceback, or as a cut stream
            yield Failed(self._fault(request, error))
        finally:
            self._running -= 1
            self._metrics.running(self._running)
            if stream is not None:
                self._engine.leave(stream)

    def _prepare(self, request: EngineRequest) -> Prepared:
        """On a loading thread: everything but computing."""
        try:
            prepared = self._session.prepare(self._core_request(request))
        finally:
            with self._counting:
                before, self._counted = self._counted, self._session.counters.as_dict()
                changes = {name: now - before[name] for name, now in self._counted.items()}
            self._metrics.lookup(
                requested_tokens=changes["requested_tokens"],
                hit_tokens={tier: changes[f"hit_tokens_{tier}"] for tier in TIERS},
                corrupt_payloads=changes["corrupt_payloads"],
            )
            if (stats := self._session.tier_stats) is not None:
                self._metrics.tiers(stats)
        for document in prepared.documents:
            if document.origin == "reencoded-corrupt":
                _log("corrupt_payload", logging.WARNING, request.request_id, document_id=document.id)
        return prepared

    def _keep(self, encoded: Encoded) -> None:
        """On the engine's thread: what was encoded for one request is there for the next. Kept by another thread."""
        self._loading.submit(self._session.keep, encoded.cache)

    def _core_request(self, request: EngineRequest) -> AnswerRequest:
        return AnswerRequest(
            messages=[Message(m.role, m.content, [_core_document(d) for d in m.documents]) for m in request.messages],
            documents=[_core_document(d) for d in request.documents],
            linker=request.linker or self._linker,
            sampling=SamplingParams(**asdict(request.sampling)),
        )

    def _report(
        self, request: EngineRequest, prepared: Prepared, stream: Stream, ttft_s: float, seconds: float
    ) -> Report:
        """What the finished answer cost; counted and logged."""
        handle = stream.handle
        assert handle is not None
        assert handle.admitted is not None
        assert handle.first_token is not None
        report = Report(
            linker=prepared.linker,
            prompt_tokens=handle.prompt_tokens,
            completion_tokens=handle.completion_tokens,
            cached_tokens=prepared.cached_tokens,
            computed_tokens=handle.computed_tokens,
            ttft_s=ttft_s,
            phases_s=(
                ("lookup", prepared.lookup_s),
                ("load", prepared.load_s),
                ("queue", handle.admitted - handle.submitted),
                ("prefill", handle.first_token - handle.admitted),
            ),
            documents=tuple(DocumentReport(d.id, d.tokens, d.origin) for d in prepared.documents),
        )
        self._metrics.finished(report, seconds)
        _log(
            "answered",
            logging.INFO,
            request.request_id,
            linker=report.linker,
            prompt_tokens=report.prompt_tokens,
            cached_tokens=report.cached_tokens,
            completion_tokens=report.completion_tokens,
            ttft_ms=round(ttft_s * 1000, 1),
            total_ms=round(seconds * 1000, 1),
        )
        return report

    def _fault(self, request: EngineRequest, error: Exception) -> ApiError:
        fault = api_error(error)
        self._metrics.failed(fault.code)
        level = logging.INFO if fault.status < 500 else logging.ERROR
        _log("refused" if fault.status < 500 else "failed", level, request.request_id, code=fault.code)
        if fault.status >= 500:
            logger.error("request %s", request.request_id, exc_info=error)
        return fault


class EngineReplica(EngineServer):
    """The deployment: ``EngineServer`` on a model and a store that it loads itself.

    Args:
        config: the service's settings, as ``ServiceConfig`` dumps them.
    """

    def __init__(self, config: dict[str, object]) -> None:
        settings = ServiceConfig.model_validate(config)
        torch.set_num_threads(settings.engine.torch_threads or max(1, int(settings.engine.num_cpus)))
        try:
            session = open_session(settings)
            engine = Engine(session.model, engine_settings(settings))
        except KVLinkError as error:
            # The text of this reaches `serve status` and the console; the class would only add noise.
            raise RuntimeError(f"KVLink cannot start: {error}") from None
        super().__init__(
            session,
            engine,
            model_card(session, settings),
            PrometheusMetrics(),
            stuck_after_s=settings.engine.stuck_after_s,
            linker=settings.linker,
        )


def _core_document(document: WireDocument) -> Document | DocumentRef:
    if document.id is not None:
        check_document_id(document.id)
    if document.text is None:
        assert document.id is not None, "the schema asks for an id or a text"
        return DocumentRef(document.id)
    return Document(document.id or "", document.text, document.title)


def _log(event: str, level: int, request_id: str, **fields: object) -> None:
    """One line per event: readable as text, and as fields where Serve logs JSON."""
    text = " ".join(f"{name}={value!r}" for name, value in fields.items())
    logger.log(level, "%s request_id=%s %s", event, request_id, text, extra={"kvlink": {"event": event, **fields}})
