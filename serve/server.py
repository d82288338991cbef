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
from collections.abc import AsyncGenerator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from contextvars import copy_context
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from kvlink_core.engine import Encoded, Engine
from kvlink_core.errors import KVLinkError
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.session import Prepared, Session
from kvlink_core.store.tiers import TIERS
from serve import logs
from serve.adding import DocumentAdder, no_store
from serve.config import ServiceConfig
from serve.engine_loop import EngineLoop, Steps, Stream
from serve.loading import engine_settings, model_card, open_namespaces
from serve.metrics import Metrics, PrometheusMetrics
from serve.namespaces import Namespaces, Opened
from serve.tracing import NoTracer, Tracer, make_tracer
from serve.translate import core_request, wire_logprob
from serve.wire import (
    ApiError,
    DocumentReport,
    EngineRequest,
    Event,
    Failed,
    JobDocument,
    ModelCard,
    NewDocument,
    Piece,
    Report,
    WireLogprob,
    api_error,
)

logger = logging.getLogger("ray.serve")

#: Requests that are looked up and loaded at the same time. They mostly wait for the store; with this many, one whose
#: documents are in memory seldom stands behind those whose are not.
_LOADING_THREADS = 8


class EngineServer:
    """Answers requests with one model over one store.

    Args:
        namespaces: their sessions look requests up.
        engine: computes; touched by nobody else from now on.
        card: what is served.
        metrics: where to report.
        stuck_after_s: a step older than this fails the health check.
        linker: for requests that name none; ``None`` for the model's own.
        tracer: where finished requests are traced.
    """

    def __init__(
        self,
        namespaces: Namespaces,
        engine: Steps,
        card: ModelCard,
        metrics: Metrics,
        *,
        stuck_after_s: float,
        linker: str | None = None,
        tracer: Tracer | None = None,
    ) -> None:
        self._namespaces = namespaces
        self._tracer = tracer or NoTracer()
        self._adder: DocumentAdder | None = None
        self._card = card
        self._metrics = metrics
        self._stuck_after_s = stuck_after_s
        self._linker = linker
        self._loading = ThreadPoolExecutor(_LOADING_THREADS, thread_name_prefix="load")
        self._engine = EngineLoop(engine, metrics.engine, self._keep)
        self._running = 0
        self._counting = threading.Lock()
        self._counted: WeakKeyDictionary[Session, dict[str, int]] = WeakKeyDictionary()
        self._sessions: WeakValueDictionary[str, Session] = WeakValueDictionary()  # by the engine's namespace

    def takes_documents(self, model: LoadedModel, *, chunk_tokens: int, places: int) -> None:
        """From now on, documents can be added."""
        self._adder = DocumentAdder(model, self._engine, chunk_tokens=chunk_tokens, places=places)

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
        logs.REQUEST_ID.set(request.request_id)
        stream: Stream | None = None
        entered = ExitStack()
        self._running += 1
        self._metrics.running(self._running)
        try:
            session = (await self._enter(request.namespace, entered)).session
            loading = self._loading.submit(copy_context().run, self._prepare, session, request)
            prepared = await asyncio.wrap_future(loading)
            stream = self._engine.submit(prepared.request)
            held, ttft_s = "", None
            likely: tuple[WireLogprob, ...] = ()
            async for event in stream:
                if ttft_s is None:
                    ttft_s = time.monotonic() - arrived
                    self._metrics.first_token(prepared.linker, ttft_s)
                    sent = False
                held += event.text
                likely += tuple(wire_logprob(session.model.layout, each) for each in event.logprobs)
                if event.finish_reason is not None:
                    report = self._report(request, prepared, stream, ttft_s, time.monotonic() - arrived)
                    stream = None
                    yield Piece(held, event.finish_reason, report, likely)
                    return
                if request.stream and (held or likely or not sent):
                    # The first event goes out even without text: with it the HTTP status is decided.
                    yield Piece(held, logprobs=likely)
                    held, likely, sent = "", (), True
        except Exception as error:  # raised, it would reach the client as Ray's traceback, or as a cut stream
            yield Failed(self._fault(request, error))
        finally:
            self._running -= 1
            self._metrics.running(self._running)
            if stream is not None:
                self._engine.leave(stream)
            entered.close()

    async def add_documents(
        self, namespace: str, documents: Sequence[NewDocument]
    ) -> tuple[JobDocument, ...] | ApiError:
        """Encode documents and store them in a namespace; how each fared, or why none was stored."""
        try:
            with ExitStack() as entered:
                store = (await self._enter(namespace, entered)).store
                if store is None or self._adder is None:
                    raise no_store()
                return await self._adder.add(store, documents)
        except Exception as error:  # as in generate
            fault = api_error(error)
            logger.log(logging.ERROR if fault.status >= 500 else logging.INFO, "cannot add documents", exc_info=error)
            return fault

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...] | ApiError:
        """Where stored documents are, as this replica sees it: the tiers that hold all of them."""
        try:
            with ExitStack() as entered:
                session = (await self._enter(namespace, entered)).session
                return tuple(await asyncio.to_thread(session.tiers_of, ids))
        except Exception as error:  # as in generate
            return api_error(error)

    async def _enter(self, namespace: str, entered: ExitStack) -> Opened:
        """A namespace, until ``entered`` is closed. Opening one reads its catalog, which must not hold up the loop."""
        use = self._namespaces.use(namespace)
        if self._namespaces.is_open(namespace):
            return entered.enter_context(use)
        return await asyncio.to_thread(entered.enter_context, use)

    def _prepare(self, session: Session, request: EngineRequest) -> Prepared:
        """On a loading thread: everything but computing."""
        try:
            prepared = session.prepare(core_request(request, self._linker))
        finally:
            with self._counting:
                before, now = self._counted.get(session, {}), session.counters.as_dict()
                self._counted[session] = now
                changes = {name: count - before.get(name, 0) for name, count in now.items()}
            self._metrics.lookup(
                requested_tokens=changes["requested_tokens"],
                hit_tokens={tier: changes[f"hit_tokens_{tier}"] for tier in TIERS},
                corrupt_payloads=changes["corrupt_payloads"],
            )
            if (stats := session.tier_stats) is not None:
                self._metrics.tiers(stats)
        for document in prepared.documents:
            if document.origin == "reencoded-corrupt":
                _log("corrupt_payload", logging.WARNING, request.request_id, document_id=document.id)
        self._sessions[session.namespace] = session
        return prepared

    def _keep(self, encoded: Encoded) -> None:
        """On the engine's thread: what was encoded for one request is there for the next. Kept by another thread."""
        session = self._sessions.get(encoded.namespace)
        if session is not None:
            self._loading.submit(session.keep, encoded.cache)

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
                ("link", prepared.link_s + handle.link_s),
                ("prefill", handle.first_token - handle.admitted - handle.link_s),
            ),
            documents=tuple(DocumentReport(d.id, d.tokens, d.origin) for d in prepared.documents),
        )
        self._metrics.finished(report, seconds)
        self._tracer.answered(request, report, seconds)
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
        logs.install()
        torch.set_num_threads(settings.engine.torch_threads or max(1, int(settings.engine.num_cpus)))
        try:
            model = load_model(settings.model, device=settings.device, dtype=settings.dtype)
            namespaces = open_namespaces(settings, model)
            engine = Engine(model, engine_settings(settings))
            tracer = make_tracer(settings.tracing)
        except KVLinkError as error:
            # The text of this reaches `serve status` and the console; the class would only add noise.
            raise RuntimeError(f"KVLink cannot start: {error}") from None
        super().__init__(
            namespaces,
            engine,
            model_card(model, settings),
            PrometheusMetrics(),
            stuck_after_s=settings.engine.stuck_after_s,
            linker=settings.linker,
            tracer=tracer,
        )
        if settings.store is not None:
            self.takes_documents(model, chunk_tokens=settings.engine.chunk_tokens, places=settings.engine.places)


def _log(event: str, level: int, request_id: str, **fields: object) -> None:
    """One line per event: readable as text, and as fields where Serve logs JSON."""
    text = " ".join(f"{name}={value!r}" for name, value in fields.items())
    logger.log(level, "%s request_id=%s %s", event, request_id, text, extra={"kvlink": {"event": event, **fields}})
