"""The way from the ingress to the engine, on a handle that follows a script: what is asked again, and what is not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import pytest
from ray.exceptions import ActorUnavailableError

from serve.client import RayEngine
from serve.wire import EngineRequest, Event, Failed, Piece, WireMessage, WireSampling

SAMPLING = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=4, stop=())
REQUEST = EngineRequest("r", (WireMessage("user", "q"),), (), None, SAMPLING, True)


class Handle:
    """Answers the n-th call with the n-th list of events; an exception among them is raised."""

    def __init__(self, *answers: list[Event | Exception]) -> None:
        self.answers = list(answers)
        self.cancelled = 0

    def options(self, **options: Any) -> Handle:
        return self

    @property
    def generate(self) -> Handle:
        return self

    def remote(self, request: EngineRequest) -> Handle:
        self.current = self.answers.pop(0)
        return self

    def cancel(self) -> None:
        self.cancelled += 1

    async def __aiter__(self) -> AsyncIterator[Event]:
        for event in self.current:
            if isinstance(event, Exception):
                raise event
            yield event


def transport(code: grpc.StatusCode) -> Exception:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(), details="the socket is closed")


def events(handle: Handle) -> list[Event]:
    async def go() -> list[Event]:
        return [event async for event in RayEngine(handle, retry_after_s=1.0).generate(REQUEST)]

    return asyncio.run(go())


LOST = [
    ActorUnavailableError("gone", None),
    transport(grpc.StatusCode.UNAVAILABLE),
    transport(grpc.StatusCode.CANCELLED),
]


@pytest.mark.parametrize("error", LOST, ids=["actor", "unavailable", "cancelled"])
def test_a_replica_that_is_lost_before_its_first_event_is_passed_over(error: Exception) -> None:
    answer: list[Event | Exception] = [Piece("a"), Piece("b", "stop")]
    handle = Handle([error], [error], answer)
    assert events(handle) == answer
    assert not handle.answers


@pytest.mark.parametrize("error", LOST, ids=["actor", "unavailable", "cancelled"])
def test_one_that_is_lost_later_ends_the_stream_with_an_error(error: Exception) -> None:
    handle = Handle([Piece("a"), error], [Piece("never asked", "stop")])
    first, last = events(handle)
    assert first == Piece("a")
    assert isinstance(last, Failed)
    assert (last.error.status, last.error.code) == (503, "engine_unavailable")
    assert len(handle.answers) == 1


def test_a_request_is_not_sent_to_every_replica_in_turn() -> None:
    handle = Handle(*[[LOST[0]] for _ in range(5)])
    (last,) = events(handle)
    assert isinstance(last, Failed)
    assert len(handle.answers) == 2


def test_other_faults_are_not_tried_again() -> None:
    handle = Handle([transport(grpc.StatusCode.RESOURCE_EXHAUSTED)], [Piece("never asked", "stop")])
    (last,) = events(handle)
    assert isinstance(last, Failed)
    assert (last.error.status, last.error.code) == (500, "internal_error")
    assert len(handle.answers) == 1


def test_a_client_that_leaves_cancels_the_call() -> None:
    handle = Handle([Piece("a"), Piece("b", "stop")])

    async def go() -> None:
        stream = RayEngine(handle, retry_after_s=1.0).generate(REQUEST)
        assert await anext(stream) == Piece("a")
        await stream.aclose()

    asyncio.run(go())
    assert handle.cancelled == 1
