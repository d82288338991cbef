"""What stands before every route: names the request, lets callers in, limits what they send, words the errors."""

from __future__ import annotations

import asyncio
import json
import logging
import math
import time
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve import logs
from serve.fields import validation_error
from serve.http_metrics import HttpMetrics
from serve.keys import Caller, KeyRing
from serve.settings import IngressSettings
from serve.wire import ApiError, ApiException, api_error

logger = logging.getLogger("ray.serve")

#: What needs a key, where there are keys. The rest says nothing of anybody's documents.
GUARDED = "/v1/"

_GRACE_S = 30.0


class Guard:
    """Outermost. Turns what nobody caught into a plain 500: beyond it stands only Serve, which shows tracebacks.

    Args:
        app: what it guards.
        limits: of requests.
        keys: who may ask; ``None`` lets everybody in as ``anonymous``.
        anonymous: who they then are.
        metrics: where to report.
        echo_ids: whether to say the request's id in the response; Serve's proxy does it itself.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: IngressSettings,
        keys: KeyRing | None,
        anonymous: Caller,
        metrics: HttpMetrics,
        echo_ids: bool = True,
    ) -> None:
        self._app = app
        self._max_body_bytes = limits.max_body_bytes
        self._max_ongoing = limits.max_ongoing_per_key
        # Beyond the time for an answer only a client that does not read is left.
        self._longest_s = limits.request_timeout_s + _GRACE_S
        self._keys = keys
        self._anonymous = anonymous
        self._metrics = metrics
        self._echo_ids = echo_ids
        self._ongoing: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        name = request_id(scope)
        logs.REQUEST_ID.set(name)
        arrived = time.monotonic()
        received = status = 0

        async def limited_receive() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes.")
            return message

        async def watching_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    *_headers(name if self._echo_ids else None, message.get("headers", ())),
                ]
            await send(message)

        try:
            async with asyncio.timeout(self._longest_s):
                with self._let_in(scope) as caller:
                    scope["state"]["caller"] = caller
                    await self._app(scope, limited_receive, watching_send)
        except Exception as error:
            if not isinstance(error, ApiException):
                logger.exception("request failed")
            if not status:
                await response(api_error(error))(scope, receive, watching_send)
        finally:
            route = getattr(scope.get("route"), "path", "none")
            self._metrics.answered(route, status, time.monotonic() - arrived)

    @contextmanager
    def _let_in(self, scope: Scope) -> Iterator[Caller]:
        """Who asks, counted while they do. Before the body is read: strangers cost nothing.

        Raises ``ApiException``.
        """
        # A browser asks without its key whether it may ask.
        # Below a route prefix, Serve says the prefix twice: alone, and at the beginning of the path.
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if self._keys is None or not path.startswith(GUARDED) or scope["method"] == "OPTIONS":
            yield self._anonymous
            return
        headers = dict(scope["headers"])
        caller = self._keys.find(headers.get(b"authorization", b"").decode("latin-1"))
        if caller is None:
            message = "no valid API key: send 'Authorization: Bearer KEY'."
            raise ApiException(ApiError(401, message, "invalid_api_key"))
        if self._ongoing[caller.key_id] >= self._max_ongoing:
            message = f"this key has {self._max_ongoing} requests under way; try again when one is answered."
            raise ApiException(ApiError(429, message, "rate_limit_exceeded", retry_after_s=1.0))
        self._ongoing[caller.key_id] += 1
        try:
            yield caller
        finally:
            self._ongoing[caller.key_id] -= 1
            if not self._ongoing[caller.key_id]:
                del self._ongoing[caller.key_id]


def caller_of(request: Request) -> Caller:
    """Who asks."""
    caller: Caller = request.state.caller
    return caller


def admin_of(request: Request) -> Caller:
    """Who asks, if they may change documents. Raises ``ApiException``, whatever it is they would change."""
    caller = caller_of(request)
    if not caller.admin:
        raise ApiException(ApiError(403, "this needs an admin key.", "forbidden"))
    return caller


def request_id(scope: Scope) -> str:
    """The caller's ``x-request-id`` as far as it fits a log line; Serve's proxy adds one where none came."""
    state = scope.setdefault("state", {})
    if "request_id" not in state:
        given = next((value for name, value in scope["headers"] if name == b"x-request-id"), b"").decode("latin-1")
        kept = "".join(c for c in given[:128] if c.isascii() and (c.isalnum() or c in "-_.:"))
        state["request_id"] = kept or uuid.uuid4().hex
    return str(state["request_id"])


def _headers(request_id: str | None, given: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
    """The request's id, unless it stands there already, and that browsers must not guess at types."""
    present = {key.lower() for key, _ in given}
    ours = [(b"x-content-type-options", b"nosniff")]
    if request_id is not None:
        ours.append((b"x-request-id", request_id.encode()))
    return [(key, value) for key, value in ours if key not in present]


def response(error: ApiError, headers: dict[str, str] | None = None) -> Response:
    """An error as OpenAI's clients expect it."""
    headers = dict(headers or {})
    if error.retry_after_s is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after_s))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    # Escaped to ASCII: what is quoted from a request need not be encodable.
    body = json.dumps(error.body())
    return Response(body, status_code=error.status, headers=headers, media_type="application/json")


async def on_api_exception(request: Request, error: Exception) -> Response:
    """Errors of ours."""
    assert isinstance(error, ApiException)
    return response(error.error)


async def on_invalid(request: Request, error: Exception) -> Response:
    """Requests that do not fit the schema."""
    assert isinstance(error, RequestValidationError)
    return response(validation_error([dict(fault) for fault in error.errors()]))


async def on_http_exception(request: Request, error: Exception) -> Response:
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
    return response(found, dict(error.headers or {}))
