"""Clients that know the right answer, and clients that behave badly.

Every request ends as one of four things: **right** (the oracle's tokens, to the end), **wrong** (anything that the
oracle would not have said, also in a stream that broke off later), a **clear error** (an error of the API with its
code, 503 with Retry-After, or an error event at the end of a stream), or **lost**: everything else.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import socket
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import httpx

from serve.prove.material import Question

Kind = Literal["right", "wrong", "clear error", "lost"]

CHAT = "/v1/chat/completions"

#: A client's patience. What is not answered by then is lost.
_PATIENCE_S = 120.0


class Judged(Protocol):
    """What became of many requests: how many are right and wrong, the others by code, and what should not be so."""

    right: int
    wrong: int
    errors: dict[str, int]
    lost: dict[str, int]
    faults: list[str]


@dataclass(slots=True)
class Outcome:
    """What became of one request. Times by ``time.monotonic``, durations in seconds.

    Attributes:
        sent, ended: when.
        kind: see this module.
        code: ``200``, the code of the error, or why it is lost.
        status: of HTTP; 0 where there was none.
        retry_after: whether a refusal said when to come back.
        ttft_s: from sending to the first event of the stream.
        gaps_s: between the pieces of its text.
        origins: where its documents came from.
    """

    sent: float
    ended: float = 0.0
    kind: Kind = "lost"
    code: str = "no answer"
    status: int = 0
    retry_after: bool = False
    ttft_s: float | None = None
    gaps_s: list[float] = field(default_factory=list)
    origins: tuple[str | None, ...] = ()

    @property
    def total_s(self) -> float:
        """From sending to the end."""
        return self.ended - self.sent


def judge(result: Judged, outcomes: Sequence[Outcome]) -> None:
    """Fill in what became of the requests, and the two conditions that always hold: none wrong, none lost."""
    result.right = sum(o.kind == "right" for o in outcomes)
    result.wrong = sum(o.kind == "wrong" for o in outcomes)
    result.errors = dict(Counter(o.code for o in outcomes if o.kind == "clear error"))
    result.lost = dict(Counter(o.code for o in outcomes if o.kind == "lost"))
    if result.wrong:
        result.faults.append(f"{result.wrong} wrong answers")
    if result.lost:
        result.faults.append(f"{sum(result.lost.values())} requests lost without a clear error")


def body_of(question: Question, model: str, **fields: Any) -> dict[str, Any]:
    """The request that asks a question, streamed."""
    return {
        "model": model,
        "messages": [{"role": "user", "content": question.text}],
        "documents": [{"id": name} for name in question.documents],
        "max_tokens": question.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **fields,
    }


class Askers:
    """Asks questions and keeps what became of them.

    Args:
        client: of the service.
        model: its model.
        questions: drawn with equal probability.
        seed: of what is drawn and of arrivals.
    """

    def __init__(self, client: httpx.AsyncClient, model: str, questions: Sequence[Question], *, seed: int) -> None:
        self._client = client
        self._model = model
        self._questions = questions
        self._random = random.Random(seed)
        self.outcomes: list[Outcome] = []

    async def open_loop(self, rate: float, until: asyncio.Event) -> None:
        """``rate`` requests a second on average, whether or not earlier ones are answered; returns when all are."""
        async with asyncio.TaskGroup() as clients:
            due = time.monotonic()
            while not until.is_set():
                # From when the last one was due, not from when it was sent: a slow client must not lower the rate.
                due += self._random.expovariate(rate)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, due - time.monotonic())):
                        await until.wait()
                if not until.is_set():
                    clients.create_task(self.one())

    async def closed_loop(self, clients: int, seconds: float) -> float:
        """So many clients, each asking again as soon as it is answered; right answers a second.

        Counted from a fifth of the time on: the first ones find nothing hot.
        """
        ends = time.monotonic() + seconds

        async def ask_on() -> None:
            while time.monotonic() < ends:
                await self.one()

        first = len(self.outcomes)
        begins = time.monotonic() + seconds / 5
        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(ask_on())
        counted = sum(begins <= o.ended <= ends and o.kind == "right" for o in self.outcomes[first:])
        return counted / (ends - begins)

    async def each_once(self, clients: int = 4) -> None:
        """Every question once."""
        waiting = list(self._questions)

        async def ask_on() -> None:
            while waiting:
                await self.one(waiting.pop())

        async with asyncio.TaskGroup() as group:
            for _ in range(clients):
                group.create_task(ask_on())

    async def one(self, question: Question | None = None) -> Outcome:
        """Ask once."""
        question = question or self._random.choice(self._questions)
        outcome = Outcome(time.monotonic())
        self.outcomes.append(outcome)
        try:
            async with (
                asyncio.timeout(_PATIENCE_S),
                self._client.stream("POST", CHAT, json=body_of(question, self._model)) as response,
            ):
                outcome.status = response.status_code
                if response.status_code == 200:
                    await _judge(response, question, outcome)
                else:
                    outcome.retry_after = "retry-after" in response.headers
                    _refused(outcome, await response.aread())
        except (httpx.HTTPError, TimeoutError) as error:
            if outcome.kind != "wrong":
                outcome.kind, outcome.code = "lost", type(error).__name__
        outcome.ended = time.monotonic()
        return outcome


async def _judge(response: httpx.Response, question: Question, outcome: Outcome) -> None:
    """Read a stream to its end and say what it was."""
    outcome.code = "cut without an error event"
    text, tokens, last = "", -1, 0.0
    async for line in _lines(response):
        now = time.monotonic()
        if line == b"data: [DONE]":
            right = text == question.answer and tokens == question.tokens
            outcome.kind, outcome.code = ("right", "200") if right else ("wrong", "200")
            return
        event = json.loads(line.removeprefix(b"data: "))
        if "error" in event:
            outcome.kind, outcome.code = "clear error", f"event {event['error']['code']}"
            return
        if outcome.ttft_s is None:
            outcome.ttft_s = now - outcome.sent
        if usage := event.get("usage"):
            tokens = usage["completion_tokens"]
        if report := event.get("kvlink"):
            outcome.origins = tuple(document["origin"] for document in report["documents"])
        if piece := "".join(choice["delta"].get("content") or "" for choice in event["choices"]):
            text += piece
            if last:
                outcome.gaps_s.append(now - last)
            last = now
            if not question.answer.startswith(text):
                outcome.kind, outcome.code = "wrong", "200"
                return


async def _lines(response: httpx.Response) -> AsyncIterator[bytes]:
    """Lines that are not empty. httpx's own would also end one at U+2028 and others, which an answer may have."""
    rest = b""
    async for part in response.aiter_bytes():
        *lines, rest = (rest + part).split(b"\n")
        for line in lines:
            if line:
                yield line


def _refused(outcome: Outcome, content: bytes) -> None:
    """Whether an answer that is none says clearly why."""
    try:
        code = json.loads(content)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        outcome.code = f"{outcome.status} without a code"
        return
    outcome.code = f"{outcome.status} {code}"
    # 503 and 429 must say when to come back; an internal error is no clear one.
    if outcome.status in (429, 503) and not outcome.retry_after:
        outcome.code += " without Retry-After"
    elif outcome.status != 500:
        outcome.kind = "clear error"


def count(outcomes: Sequence[Outcome]) -> Counter[str]:
    """How many ended how: by kind."""
    return Counter(outcome.kind for outcome in outcomes)


async def leave_mid_stream(url: str, question: Question, model: str, *, events: int = 3) -> bool:
    """Ask, read so many events of the answer, and go without a word; false if there never was a stream."""
    async with _connected(url) as (reader, writer):
        writer.write(_request(url, body_of(question, model, max_tokens=1000)))
        await writer.drain()
        if b" 200 " not in await reader.readline():
            return False
        seen = 0
        while seen < events:
            line = await reader.readline()
            if not line:
                return False
            seen += line.startswith(b"data: ")
        return True


@contextlib.asynccontextmanager
async def never_reading(url: str, question: Question, model: str, *, tokens: int) -> Any:
    """A client that asks for a long answer and reads nothing of it, until the block ends."""
    async with _connected(url, receive_bytes=4096) as (_, writer):
        writer.write(_request(url, body_of(question, model, max_tokens=tokens)))
        await writer.drain()
        yield


@contextlib.asynccontextmanager
async def _connected(url: str, *, receive_bytes: int | None = None) -> Any:
    """A bare connection that is torn down, not closed politely, at the end; nothing is read ahead if it says so."""
    host, _, port = url.removeprefix("http://").partition(":")
    plain = socket.socket()
    plain.setblocking(False)
    if receive_bytes is not None:
        plain.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_bytes)
    await asyncio.get_running_loop().sock_connect(plain, (host, int(port)))
    reader, writer = await asyncio.open_connection(sock=plain, limit=receive_bytes or 2**16)
    if receive_bytes is not None:
        writer.transport.pause_reading()  # type: ignore[attr-defined]
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


def _request(url: str, body: dict[str, Any]) -> bytes:
    content = json.dumps(body).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nhost: {url.removeprefix('http://')}\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(content)}\r\n\r\n".encode() + content
