"""The HTTP application. It validates, asks the engine, and writes what comes back; it never computes."""

from __future__ import annotations

import asyncio
import time
import uuid
from typing import Any

from fastapi import APIRouter, FastAPI, Request, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

import kvlink_core
from serve.answering import Answering
from serve.client import DocumentsClient, EngineClient
from serve.completions import CompletionRequest, TextCompletion, TextWriter, completion_request
from serve.config import SamplingDefaults
from serve.document_routes import add_document_routes
from serve.guard import Guard, caller_of, on_api_exception, on_http_exception, on_invalid, request_id
from serve.http_metrics import HttpMetrics, NoHttpMetrics
from serve.keys import Caller, KeyRing
from serve.page import page
from serve.protocol import ChatCompletionRequest, engine_request
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
    logprobs_of,
    model_of,
    system_fingerprint,
    usage_of,
)
from serve.settings import IngressSettings
from serve.wire import DEFAULT_NAMESPACE, ApiError, ApiException, ModelCard, Piece

HEALTH_TIMEOUT_S = 5.0
EVENTS = "`data: {%s}` each, the last with `usage` if asked for, then `data: [DONE]`; a fault is `data: {error}`."
ERRORS: dict[int | str, dict[str, Any]] = {
    "default": {"model": ErrorReply, "description": "An error object; 429 and 503 come with Retry-After."}
}


def create_app(
    engine: EngineClient,
    limits: IngressSettings,
    defaults: SamplingDefaults,
    *,
    documents: DocumentsClient | None = None,
    keys: KeyRing | None = None,
    namespace: str = DEFAULT_NAMESPACE,
    metrics: HttpMetrics | None = None,
    echo_ids: bool = True,
) -> FastAPI:
    """The FastAPI application.

    Args:
        engine: answers.
        limits: of requests.
        defaults: of sampling.
        documents: stores documents; ``None`` where there is no store.
        keys: who may ask; ``None`` lets everybody ask and change documents.
        namespace: of those without keys.
        metrics: where to report; ``None`` for nowhere.
        echo_ids: whether responses say the request's id; behind Serve's proxy, which does it, they need not.
    """
    metrics = metrics or NoHttpMetrics()
    app = FastAPI(
        title="KVLink",
        version=kvlink_core.__version__,
        description="OpenAI's completions, with documents that are linked from stored KV caches.",
        docs_url=None,  # the pages load their scripts from elsewhere; /openapi.json is enough
        redoc_url=None,
    )
    if limits.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(limits.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )
    app.add_middleware(
        Guard, limits=limits, keys=keys, anonymous=Caller(namespace, admin=True), metrics=metrics, echo_ids=echo_ids
    )
    app.add_exception_handler(ApiException, on_api_exception)
    app.add_exception_handler(RequestValidationError, on_invalid)
    app.add_exception_handler(HTTPException, on_http_exception)
    # The guard checks; this only says so in OpenAPI.
    v1 = APIRouter(prefix="/v1", dependencies=[Security(HTTPBearer(auto_error=False))], responses=ERRORS)
    _add_completions(v1, engine, limits, defaults, metrics)
    add_document_routes(v1, documents, limits)

    @v1.get("/models", response_model=ModelList)
    async def models() -> ModelList:
        """The model that is served."""
        return ModelList(data=[model_of(await engine.card())])

    @v1.get("/models/{model_id:path}", response_model=ModelOut)
    async def model(model_id: str) -> ModelOut:
        """One model."""
        return model_of(await served_model(engine, model_id))

    @app.get("/healthz", response_model=Health, responses=ERRORS)
    async def healthz() -> Health:
        """200 when an engine answers."""
        try:
            async with asyncio.timeout(HEALTH_TIMEOUT_S):
                await engine.health()
                return Health(model=(await engine.card()).id)
        except TimeoutError:
            late = f"no engine answered within {HEALTH_TIMEOUT_S:g} s."
            raise ApiException(ApiError(503, late, "engine_unavailable", retry_after_s=5.0)) from None

    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    app.include_router(v1)
    return app


def _add_completions(
    v1: APIRouter, engine: EngineClient, limits: IngressSettings, defaults: SamplingDefaults, metrics: HttpMetrics
) -> None:
    @v1.post("/chat/completions", response_model=ChatCompletion, responses=_streamed("chat.completion.chunk"))
    async def chat_completions(body: ChatCompletionRequest, request: Request) -> Response:
        """Answer a conversation from documents."""
        card = await served_model(engine, body.model)
        asked = engine_request(body, limits=limits, defaults=defaults, **_of(request))
        made = f"chatcmpl-{uuid.uuid4().hex}", int(time.time()), card
        answering = Answering(engine.generate(asked), timeout_s=limits.request_timeout_s, metrics=metrics)
        first = await answering.first()
        if not body.stream:
            return JSONResponse(_completion(*made, await answering.whole(first)))
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return answering.stream(ChunkWriter(*made, include_usage=usage), first)

    @v1.post("/completions", response_model=TextCompletion, responses=_streamed("text_completion"))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue a prompt behind documents, without a chat template."""
        card = await served_model(engine, body.model)
        asked = completion_request(body, limits=limits, defaults=defaults, **_of(request))
        usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        writer = TextWriter(f"cmpl-{uuid.uuid4().hex}", int(time.time()), card, include_usage=usage)
        answering = Answering(engine.generate(asked), timeout_s=limits.request_timeout_s, metrics=metrics)
        first = await answering.first()
        if body.stream:
            return answering.stream(writer, first)
        return JSONResponse(writer.whole(await answering.whole(first)).model_dump())


async def served_model(engine: EngineClient, name: str) -> ModelCard:
    """The card of the model that is served, if that is its name. Raises ``ApiException``."""
    card = await engine.card()
    if name != card.id:
        message = f"no such model: {name!r}; this service has {card.id!r}."
        raise ApiException(ApiError(404, message, "model_not_found", "model"))
    return card


def _of(request: Request) -> dict[str, Any]:
    """What a request says of itself outside its body."""
    trace = request.headers.get("traceparent")
    return {
        "request_id": request_id(request.scope),
        "namespace": caller_of(request).namespace,
        "traceparent": trace[:64] if trace else None,
    }


def _streamed(chunk: str) -> dict[int | str, dict[str, Any]]:
    return {
        200: {
            "description": "The completion; with `stream` true, chunks as server-sent events.",
            "content": {"text/event-stream": {"schema": {"type": "string", "description": EVENTS % chunk}}},
        }
    }


def _completion(completion_id: str, created: int, card: ModelCard, answer: Piece) -> dict[str, Any]:
    assert answer.finish_reason is not None
    assert answer.report is not None
    choice = Choice(
        message=AnswerMessage(content=answer.text),
        logprobs=logprobs_of(answer.logprobs),
        finish_reason=answer.finish_reason,
    )
    return ChatCompletion(
        id=completion_id,
        created=created,
        model=card.id,
        system_fingerprint=system_fingerprint(card),
        choices=[choice],
        usage=usage_of(answer.report),
        kvlink=extension_of(answer.report),
    ).model_dump()
