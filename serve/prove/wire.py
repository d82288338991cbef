"""A wire to a server on loopback that can be cut, fall silent or be slow."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

State = Literal["sound", "refusing", "silent"]


class Wire:
    """Passes bytes on between its own port and another one, in a thread of its own. Made by ``wire``.

    Attributes:
        port: where it listens.
        connections: that were made so far.
    """

    def __init__(self, target: int) -> None:
        self._target = target
        self._state: State = "sound"
        self._delay_s = 0.0
        self._open: set[asyncio.StreamWriter] = set()
        self._sound = asyncio.Event()
        self._loop = asyncio.new_event_loop()
        self.port = 0
        self.connections = 0

    def be(self, state: State, *, delay_s: float = 0.0) -> None:
        """Change how it is, from any thread.

        ``refusing``: connections are torn down, and new ones as soon as they are made. ``silent``: they stay, and
        nothing passes. ``delay_s``: what each request waits before it is passed on.
        """
        asyncio.run_coroutine_threadsafe(self._change(state, delay_s), self._loop).result()

    async def _change(self, state: State, delay_s: float) -> None:
        self._state, self._delay_s = state, delay_s
        if state == "sound":
            self._sound.set()
        else:
            self._sound.clear()
        if state == "refusing":
            for writer in list(self._open):
                writer.transport.abort()

    async def _serve(self, started: threading.Event, ended: asyncio.Event) -> None:
        self._sound.set()
        server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        started.set()
        await ended.wait()
        server.close()
        for writer in list(self._open):
            writer.transport.abort()
        passing = asyncio.all_tasks() - {asyncio.current_task()}
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._open.add(writer)
        try:
            if self._state == "refusing":
                return
            await self._sound.wait()
            there, back = await asyncio.open_connection("127.0.0.1", self._target)
            self._open.add(back)
            answered = asyncio.Event()  # what comes after an answer is a new request
            answered.set()
            try:
                done = [
                    asyncio.ensure_future(self._pass(reader, back, answered, request=True)),
                    asyncio.ensure_future(self._pass(there, writer, answered, request=False)),
                ]
                await asyncio.wait(done, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.cancel()
                await asyncio.gather(*done, return_exceptions=True)
            finally:
                self._open.discard(back)
                back.transport.abort()
        except OSError:
            pass  # the client sees it as it is: torn down
        finally:
            self._open.discard(writer)
            writer.transport.abort()

    async def _pass(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, answered: asyncio.Event, *, request: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while data := await source.read(2**16):
                if request and answered.is_set():
                    answered.clear()
                    await asyncio.sleep(self._delay_s)
                elif not request:
                    answered.set()
                await self._sound.wait()
                sink.write(data)
                await sink.drain()
            # Half closed is closed: neither side of an S3 connection goes on alone.
            await sink.drain()


@contextmanager
def wire(target: int) -> Iterator[Wire]:
    """A sound wire to a port of the loopback, until the block ends."""
    made = Wire(target)
    started, ended = threading.Event(), asyncio.Event()
    thread = threading.Thread(target=lambda: made._loop.run_until_complete(made._serve(started, ended)), daemon=True)
    thread.start()
    started.wait()
    try:
        yield made
    finally:
        made._loop.call_soon_threadsafe(ended.set)
        thread.join()
        made._loop.close()
