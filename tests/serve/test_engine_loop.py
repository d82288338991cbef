"""The thread that steps a real engine: answers, clients that leave, faults, an event loop that ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator

import pytest
from engine_runs import alone, request_for

from kvlink_core.engine import Engine, EngineSettings, GenerationRequest, TokenEvent
from kvlink_core.errors import RequestTooLargeError
from kvlink_core.models import LoadedModel
from serve.engine_loop import EngineLoop, Stream


@pytest.fixture
def engine(tiny_model: LoadedModel) -> Engine:
    return Engine(tiny_model, EngineSettings(kv_bytes=2**19, mode="shared"))


@pytest.fixture
def loop(engine: Engine) -> Iterator[EngineLoop]:
    loop = EngineLoop(engine)
    yield loop
    loop.close()


async def _answer(stream: Stream) -> list[TokenEvent]:
    return [event async for event in stream]


def test_concurrent_answers_are_those_that_requests_have_alone(tiny_model: LoadedModel, loop: EngineLoop) -> None:
    requests = [request_for(tiny_model, "link-tokens", (i, 1), f"Question {i}?", cold=i == 2) for i in range(4)]

    async def go() -> list[list[TokenEvent]]:
        return await asyncio.gather(*(_answer(loop.submit(request)) for request in requests))

    for request, events in zip(requests, asyncio.run(go()), strict=True):
        assert [t for e in events for t in e.token_ids] == alone(tiny_model, request).token_ids


def test_a_client_that_leaves_frees_its_memory(tiny_model: LoadedModel, engine: Engine, loop: EngineLoop) -> None:
    async def go() -> None:
        streams = [loop.submit(request_for(tiny_model, "link-tokens", (0, 1), max_tokens=900)) for _ in range(3)]
        for stream in streams:
            assert (await anext(aiter(stream))).finish_reason is None
        for stream in streams:
            loop.leave(stream)
        never = loop.submit(request_for(tiny_model, "full", (0,), max_tokens=900))
        loop.leave(never)

    asyncio.run(go())
    deadline = time.monotonic() + 20
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy
    assert engine.stats.kv_used == engine.stats.kv_idle


def test_other_work_is_done_in_the_same_thread(loop: EngineLoop) -> None:
    assert loop.call(lambda: threading.current_thread().name).result(20) == "engine"
    with pytest.raises(ZeroDivisionError):
        loop.call(lambda: 1 / 0).result(20)


def test_a_refusal_reaches_who_asked(tiny_model: LoadedModel, loop: EngineLoop) -> None:
    async def go(request: GenerationRequest) -> list[TokenEvent]:
        return await _answer(loop.submit(request))

    with pytest.raises(RequestTooLargeError):
        asyncio.run(go(request_for(tiny_model, "full", (0, 1), max_tokens=1900)))
    assert len(asyncio.run(go(request_for(tiny_model, "full", (0, 1))))) == 6


def test_a_step_that_fails_fails_what_runs_and_nothing_after(
    tiny_model: LoadedModel, engine: Engine, loop: EngineLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def go() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(type(engine), "step", lambda self: 1 / 0)
            results = await asyncio.gather(
                *(_answer(loop.submit(request_for(tiny_model, "full", (0,)))) for _ in range(2)), return_exceptions=True
            )
            assert [type(result) for result in results] == [ZeroDivisionError] * 2
        assert len(await _answer(loop.submit(request_for(tiny_model, "full", (0,))))) == 6

    asyncio.run(go())
    assert engine.stats.kv_used == engine.stats.kv_idle


def test_an_event_loop_that_ended_drops_its_requests(tiny_model: LoadedModel, engine: Engine, loop: EngineLoop) -> None:
    async def go() -> None:
        loop.submit(request_for(tiny_model, "link-tokens", (0, 1), max_tokens=900))

    asyncio.run(go())
    deadline = time.monotonic() + 20
    while engine.busy and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not engine.busy
