"""From the engine's events to a reply: whole, or as server-sent events.

Every fault that is known before the first token is a proper HTTP status: the first event of the engine is awaited
before a streamed response begins. What fails later is an explicit error event, after which the stream ends without
``[DONE]``.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Protocol

from fastapi.responses import Response, StreamingResponse

from serve.http_metrics import HttpMetrics
from serve.replies import FinishReason, sse
from serve.wire import ApiError, ApiException, Event, Failed, Piece, Report, WireLogprob, api_error

logger = logging.getLogger("ray.serve")


class EventWriter(Protocol):
    """Writes the events of one stream."""

    def start(self) -> bytes:
        """What comes before all text."""
        ...

    def content(self, text: str, logprobs: tuple[WireLogprob, ...] = ()) -> bytes:
        """A piece of the answer."""
        ...

    def finish(self, reason: FinishReason, report: Report) -> bytes:
        """What ends the answer."""
        ...


class Answering:
    """One request on its way: its events, and until when it must be answered.

    Args:
        events: of the engine.
        timeout_s: for the whole answer.
        metrics: where to report.
    """

    def __init__(self, events: AsyncGenerator[Event, None], *, timeout_s: float, metrics: HttpMetrics) -> None:
        self._events = events
        self._timeout_s = timeout_s
        self._deadline = asyncio.get_running_loop().time() + timeout_s
        self._metrics = metrics
        self._began = self._last = time.monotonic()

    async def first(self) -> Piece:
        """The first piece. Raises ``ApiException``."""
        self._metrics.waiting(+1)
        try:
            piece = await self._next()
        finally:
            self._metrics.waiting(-1)
        self._last = time.monotonic()
        self._metrics.first_token(self._last - self._began)
        return piece

    async def whole(self, first: Piece) -> Piece:
        """The whole answer as one piece. Raises ``ApiException``."""
        async with aclosing(self._events):
            pieces = [first]
            while pieces[-1].finish_reason is None:
                pieces.append(await self._next())
            last = pieces[-1]
            logprobs = tuple(each for piece in pieces for each in piece.logprobs)
            return Piece("".join(piece.text for piece in pieces), last.finish_reason, last.report, logprobs)

    def stream(self, writer: EventWriter, first: Piece) -> Response:
        """The answer as it comes."""
        return StreamingResponse(
            self._written(writer, first),
            media_type="text/event-stream",
            headers={"cache-control": "no-cache", "x-accel-buffering": "no"},
        )

    async def _written(self, writer: EventWriter, piece: Piece) -> AsyncGenerator[bytes, None]:
        """Start, text, end, ``[DONE]``; or, after a fault, an error event and nothing more."""
        async with aclosing(self._events):
            try:
                out = writer.start()
                while True:
                    if piece.text or piece.logprobs:
                        out += writer.content(piece.text, piece.logprobs)
                    if piece.finish_reason is not None:
                        assert piece.report is not None
                        yield out + writer.finish(piece.finish_reason, piece.report) + sse("[DONE]")
                        return
                    if out:
                        yield out
                    out = b""
                    piece = await self._next()
                    now = time.monotonic()
                    self._metrics.between_tokens(now - self._last)
                    self._last = now
            except Exception as error:  # the status is sent: only an event can still say that the answer is not whole
                fault = api_error(error)
                if not isinstance(error, ApiException):
                    logger.exception("an answer broke off")
                self._metrics.broken(fault.code)
                yield sse(json.dumps(fault.body()))

    async def _next(self) -> Piece:
        try:
            async with asyncio.timeout_at(self._deadline):
                event = await anext(self._events, None)
        except TimeoutError:
            late = f"the request was not answered within {self._timeout_s:g} s."
            raise ApiException(ApiError(504, late, "request_timeout")) from None
        if isinstance(event, Failed):
            raise ApiException(event.error)
        assert event is not None, "the last event of an engine has a finish reason"
        return event
