"""An engine that follows a script, and the HTTP application on it: no model, no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import httpx

from serve.config import IngressSettings, SamplingDefaults
from serve.ingress import create_app
from serve.wire import (
    ApiError,
    ApiException,
    DocumentReport,
    EngineRequest,
    Event,
    ModelCard,
    Piece,
    Report,
)

CARD = ModelCard("m", 1_700_000_000, 100, "ab" * 32, ("full", "reposition"), "reposition")
REPORT = Report(
    linker="reposition",
    prompt_tokens=30,
    completion_tokens=2,
    cached_tokens=20,
    computed_tokens=10,
    ttft_s=0.0123,
    phases_s=(("prefill", 0.01),),
    documents=(DocumentReport("a", 20, "store"),),
)
ANSWER: list[Event] = [Piece("In "), Piece("Oslo."), Piece("", "stop", REPORT)]
ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
CONTINUE = {"model": "m", "prompt": "Where"}
JSON = {"content-type": "application/json"}


class ScriptedEngine:
    """Plays events; an exception among them is raised."""

    def __init__(self, script: Sequence[Event | Exception] = ANSWER) -> None:
        self.script = script
        self.asked: list[EngineRequest] = []
        self.closed = 0
        self.away: ApiError | None = None
        self.slow_s = 0.0

    async def card(self) -> ModelCard:
        return CARD

    async def health(self) -> None:
        if self.away is not None:
            raise ApiException(self.away)

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        self.asked.append(request)
        try:
            for event in self.script:
                await asyncio.sleep(self.slow_s)
                if isinstance(event, Exception):
                    raise event
                yield event
        finally:
            self.closed += 1


def send(
    engine: ScriptedEngine, path: str, *, method: str = "POST", limits: dict[str, Any] | None = None, **request: Any
) -> httpx.Response:
    async def go() -> httpx.Response:
        app = create_app(engine, IngressSettings(**({"max_body_bytes": 2**20} | (limits or {}))), SamplingDefaults())
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://service") as client:
            return await client.request(method, path, **request)

    return asyncio.run(go())


def events(response: httpx.Response) -> list[Any]:
    """The data of server-sent events; checks their framing."""
    *blocks, rest = response.text.split("\n\n")
    assert rest == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks)
    return [block[6:] if block[6:] == "[DONE]" else json.loads(block[6:]) for block in blocks]
