"""The thread that computes: it steps an engine while there is anything to compute, and hands out what comes of it.

Requests join and leave between steps. Only this thread touches the engine, so nothing in the core is entered twice;
whoever asks is on an event loop, which stays free.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from contextvars import copy_context
from typing import Protocol, TypeVar

from kvlink_core.engine import (
    Encoded,
    Encoding,
    EngineEvent,
    EngineStats,
    Failed,
    Generated,
    GenerationRequest,
    Handle,
    TokenEvent,
)
from kvlink_core.types import DocumentCache

logger = logging.getLogger("ray.serve")

T = TypeVar("T")


class Steps(Protocol):
    """What the loop needs of an engine: see ``kvlink_core.engine.Engine``."""

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        ...

    @property
    def stats(self) -> EngineStats:
        """How it is loaded."""
        ...

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request."""
        ...

    def encode(self, token_ids: Sequence[int]) -> Encoding:
        """Queue a document to be encoded."""
        ...

    def cancel(self, handle: Handle) -> None:
        """Drop a request."""
        ...

    def cancel_all(self) -> list[Handle]:
        """Drop all requests."""
        ...

    def step(self) -> list[EngineEvent]:
        """Compute."""
        ...


class Stream:
    """The events of one request, for the event loop that asked; ``handle`` is there from the first of them on."""

    def __init__(self) -> None:
        self.handle: Handle | None = None
        self.loop = asyncio.get_running_loop()
        self.left = False
        self._events: asyncio.Queue[TokenEvent | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        """One event per token.

        Raises:
            Exception: whatever submitting or computing raised.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason is not None:
                return

    def put(self, event: TokenEvent | Exception) -> None:
        """On the event loop: an event has come."""
        self._events.put_nowait(event)


class EngineLoop:
    """Steps an engine in a thread of its own.

    Args:
        engine: touched by nobody else from now on.
        on_step: told, in that thread, after each step and each change, how the engine is loaded.
        on_encoded: told, in that thread, of documents that were encoded for requests.
    """

    def __init__(
        self,
        engine: Steps,
        on_step: Callable[[EngineStats], None] = lambda stats: None,
        on_encoded: Callable[[Encoded], None] = lambda encoded: None,
    ) -> None:
        self._engine = engine
        self._on_step = on_step
        self._on_encoded = on_encoded
        self._streams: dict[int, Stream] = {}
        self._encodings: dict[int, Future[DocumentCache]] = {}
        self._commands: deque[Callable[[], None]] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self._since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: GenerationRequest) -> Stream:
        """Ask for an answer; on an event loop."""
        stream = Stream()
        self._tell(lambda: self._submit(request, stream))
        return stream

    def leave(self, stream: Stream) -> None:
        """Nobody wants the rest of an answer: what it holds is free before the next step."""
        stream.left = True
        self._tell(lambda: self._cancel(stream))

    def encode(self, token_ids: Sequence[int]) -> Future[DocumentCache]:
        """Encode a document in the steps of requests: none of them waits for it."""
        future: Future[DocumentCache] = Future()
        self._tell(lambda: self._encode(token_ids, future))
        return future

    def call(self, work: Callable[[], T]) -> Future[T]:
        """Do something else that computes, between two steps."""
        future: Future[T] = Future()
        context = copy_context()

        def do() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(context.run(work))
            except BaseException as error:
                future.set_exception(error)

        self._tell(do)
        return future

    def close(self) -> None:
        """Stop after the step at hand; requests that run are dropped."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join()

    @property
    def busy_s(self) -> float:
        """Age of the step at hand."""
        since = self._since
        return 0.0 if since is None else time.monotonic() - since

    def _tell(self, command: Callable[[], None]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._commands and not self._engine.busy and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                commands = list(self._commands)
                self._commands.clear()
            self._since = time.monotonic()
            for command in commands:
                command()
            if self._engine.busy:
                self._deliver(self._step())
            self._since = None
            self._on_step(self._engine.stats)

    def _step(self) -> list[tuple[Stream, TokenEvent | Exception]]:
        try:
            events = self._engine.step()
        except Exception as error:  # of all that run, nobody knows whose fault it was
            logger.exception("an engine step failed")
            for future in self._encodings.values():
                _settle(future, error)
            self._encodings.clear()
            streams = [self._streams.pop(id(handle), None) for handle in self._engine.cancel_all()]
            return [(stream, error) for stream in streams if stream is not None]
        delivered: list[tuple[Stream, TokenEvent | Exception]] = []
        for event in events:
            if isinstance(event, Generated):
                delivered.append((self._streams[id(event.handle)], event.event))
                if event.event.finish_reason is not None:
                    del self._streams[id(event.handle)]
            elif isinstance(event, Failed):
                delivered.append((self._streams.pop(id(event.handle)), event.error))
            elif event.encoding is not None:
                _settle(self._encodings.pop(id(event.encoding)), event.cache)
            else:
                self._on_encoded(event)
        return delivered

    def _submit(self, request: GenerationRequest, stream: Stream) -> None:
        if stream.left:
            return
        try:
            stream.handle = self._engine.submit(request)
        except Exception as error:
            self._deliver([(stream, error)])
        else:
            self._streams[id(stream.handle)] = stream

    def _encode(self, token_ids: Sequence[int], future: Future[DocumentCache]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            encoding = self._engine.encode(token_ids)
        except Exception as error:
            future.set_exception(error)
        else:
            self._encodings[id(encoding)] = future

    def _cancel(self, stream: Stream) -> None:
        if stream.handle is not None:
            self._engine.cancel(stream.handle)
            self._streams.pop(id(stream.handle), None)

    def _deliver(self, events: list[tuple[Stream, TokenEvent | Exception]]) -> None:
        """Wake each event loop once for all that came of a step."""
        for loop in {stream.loop for stream, _ in events}:
            mine = [(stream, event) for stream, event in events if stream.loop is loop]
            try:
                loop.call_soon_threadsafe(_put_all, mine)
            except RuntimeError:  # that loop is closed: nobody listens any more
                for stream, _ in mine:
                    self._cancel(stream)


def _settle(future: Future[DocumentCache], outcome: DocumentCache | Exception) -> None:
    if isinstance(outcome, Exception):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _put_all(events: list[tuple[Stream, TokenEvent | Exception]]) -> None:
    for stream, event in events:
        stream.put(event)
