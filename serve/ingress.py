"""The HTTP application. It validates, asks the engine, and writes what comes back; it never computes.

Every fault that is known before the first token is a proper HTTP status: the first event of the engine is
awaited before a streamed response begins. What fails later is an explicit error event, after which the stream
ends without ``[DONE]``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import kvlink_core
from serve.client import EngineClient
from serve.config import IngressSettings, SamplingDefaults
from serve.protocol import ChatCompletionRequest, engine_request, validation_error
from serve.replies import (
    AnswerMessage,
    ChatCompletion,
    Choice,
    ChunkWriter,
    ErrorReply,
    Health,
    ModelList,
    ModelOut,
    extension_of,
    model_of,
    sse,
    system_fingerprint,
    usage_of,
)
from serve.wire import ApiError, ApiException, EngineRequest, Event, Failed, ModelCard, Piece, api_error

logger = logging.getLogger("ray.serve")

HEALTH_TIMEOUT_S = 5.0
EVENTS = "`data: {chat.completion.chunk}` each, the last with `usage` if asked for, then `data: [DONE]`."
_ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorReply, "description": "An error object; 503 comes with Retry-After."}
}


def create_app(engine: EngineClient, limits: IngressSettings, defaults: SamplingDefaults) -> FastAPI:
    """The FastAPI application, on any engine client."""
    app = FastAPI(
        title="KVLink",
        version=kvlink_core.__version__,
        description="OpenAI chat completions whose documents are linked from stored KV caches.",
        docs_url=None,  # the pages load their scripts from elsewhere; /openapi.json is enough
        redoc_url=None,
    )
    app.add_middleware(_Guard, max_body_bytes=limits.max_body_bytes)
    app.add_exception_handler(ApiException, _on_api_exception)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_exception)

    @app.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses={
            200: {
                "description": "The completion; with `stream` true, chunks as server-sent events.",
                "content": {"text/event-stream": {"schema": {"type": "string", "description": EVENTS}}},
            },
            **_ERRORS,
        },
    )
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation from documents."""
        card = await served_model(body.model)
        asked = engine_request(body, request_id=request_id(request.scope), limits=limits, defaults=defaults)
        completion_id, created = f"chatcmpl-{uuid.uuid4().hex}", int(time.time())
        events = engine.generate(asked)
        first = await _first_piece(events)
        if not body.stream:
            return JSONResponse(await _completion(completion_id, created, card, first, events))
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        writer = ChunkWriter(completion_id, created, card, include_usage=usage)
        return StreamingResponse(
            _stream(writer, first, events, asked),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    @app.get("/v1/models", response_model=ModelList, responses=_ERRORS)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[model_of(await engine.card())])

    @app.get("/v1/models/{model_id:path}", response_model=ModelOut, responses=_ERRORS)
    async def model(model_id: str) -> ModelOut:
        """One model."""
        return model_of(await served_model(model_id))

    @app.get("/healthz", response_model=Health, responses=_ERRORS)
    async def healthz() -> Health:
        """200 when an engine answers."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await engine.health()
                return Health(model=(await engine.card()).id)
        except TimeoutError:
            late = f"no engine answered within {HEALTH_TIMEOUT_S:g} s."
            raise ApiException(ApiError(503, late, "engine_unavailable", retry_after_s=5.0)) from None

    async def served_model(name: str) -> ModelCard:
        card = await engine.card()
        if name != card.id:
            message = f"no such model: {name!r}; this service has {card.id!r}."
            raise ApiException(ApiError(404, message, "model_not_found", "model"))
        return card

    return app


async def _first_piece(events: AsyncGenerator[Event, None]) -> Piece:
    first = await anext(events, None)
    if isinstance(first, Failed):
        raise ApiException(first.error)
    assert first is not None, "an engine answers with at least one event"
    return first


async def _completion(
    completion_id: str, created: int, card: ModelCard, first: Piece, events: AsyncGenerator[Event, None]
) -> dict[str, Any]:
    """Collect the whole answer."""
    texts, last = [first.text], first
    async for event in events:
        if isinstance(event, Failed):
            raise ApiException(event.error)
        texts.append(event.text)
        last = event
    assert last.finish_reason is not None
    assert last.report is not None
    return ChatCompletion(
        id=completion_id,
        created=created,
        model=card.id,
        system_fingerprint=system_fingerprint(card),
        choices=[Choice(message=AnswerMessage(content="".join(texts)), finish_reason=last.finish_reason)],
        usage=usage_of(last.report),
        kvlink=extension_of(last.report),
    ).model_dump()


async def _stream(
    writer: ChunkWriter, first: Piece, events: AsyncGenerator[Event, None], asked: EngineRequest
) -> AsyncGenerator[bytes, None]:
    """Role, content, finish, usage, ``[DONE]``; or, after a fault, an error event and nothing more."""
    async with aclosing(events) as rest:
        try:
            yield writer.role()
            piece = first
            while True:
                if piece.text:
                    yield writer.content(piece.text)
                if piece.finish_reason is not None:
                    assert piece.report is not None
                    yield writer.finish(piece.finish_reason, piece.report) + sse("[DONE]")
                    return
                event = await anext(rest)
                if isinstance(event, Failed):
                    raise ApiException(event.error)
                piece = event
        except Exception as error:  # the status is sent: only an event can still say that the answer is not whole
            if not isinstance(error, ApiException):
                logger.exception("request %s broke off", asked.request_id)
            yield sse(json.dumps(api_error(error).body()))


class _Guard:
    """Outermost: limits the body, names the request, and turns what nobody caught into a plain 500."""

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0
        started = False

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes.")
            return message

        async def watching_send(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, limited_receive, watching_send)
        except Exception as error:  # outermost: beyond it stands only Serve, which answers with a traceback
            logger.exception("request %s failed", request_id(scope))
            if not started:
                await _response(api_error(error))(scope, receive, send)


def request_id(scope: Scope) -> str:
    """The caller's ``x-request-id`` as far as it fits a log line; Serve's proxy adds one where none came."""
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return "".join(c for c in value.decode("latin-1")[:128] if c.isalnum() or c in "-_.:")
    return uuid.uuid4().hex


def _response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    # Escaped to ASCII: what is quoted from a request need not be encodable.
    body = json.dumps(error.body())
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


async def _on_api_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiException)
    return _response(error.error)


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _response(validation_error([dict(fault) for fault in error.errors()]))


async def _on_http_exception(request: Request, error: Exception) -> Response:
    """Starlette's own refusals: no such path, wrong method, unreadable body."""
    assert isinstance(error, HTTPException)
    path, method = request.url.path, request.method
    known = {
        400: ApiError(400, "the body is not readable JSON.", "invalid_json"),
        404: ApiError(404, f"no such path: {path}.", "not_found"),
        405: ApiError(405, f"{method} is not allowed for {path}.", "method_not_allowed"),
        413: ApiError(413, str(error.detail), "body_too_large"),
    }
    found = known.get(error.status_code, ApiError(error.status_code, str(error.detail), "http_error"))
    return _response(found, dict(error.headers or {}))
