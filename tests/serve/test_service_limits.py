"""What the running service refuses, and what it does when it is full or a client leaves."""

from __future__ import annotations

import contextlib
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from running_service import CHAT, MAX_RUNNING, MAX_WAITING, QUESTION, Service, add_document

from kvlink_core.store import DocumentStore

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "code", "said"),
    [
        ({"documents": [{"id": "harbour"}, {"id": "nope"}]}, 404, "document_not_found", "'nope'"),
        ({"documents": [{"id": 512 * "ä"}]}, 404, "document_not_found", "no such document"),
        ({"documents": [{"id": 512 * "ä" + "b"}]}, 400, "invalid_request", "1025 bytes; 1 to 1024"),
        ({"documents": [{"id": 512 * "ä" + "b", "text": "x"}]}, 400, "invalid_request", "1025 bytes; 1 to 1024"),
        ({"documents": [{"id": "a", "text": " "}]}, 400, "empty_document", "no text"),
        (
            {"documents": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]},
            400,
            "duplicate_document",
            "two different texts",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty_question", "ask something"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request", "'user'"),
        ({"model": "gpt-4"}, 404, "model_not_found", "'gpt-4'"),
        ({"linker": "glue"}, 400, "unknown_linker", "'glue'"),
        ({"documents": [{"text": "long " * 500}]}, 400, "context_length_exceeded", "2048"),
        ({"temperature": -0.5}, 400, "invalid_value", "temperature"),
        ({"temperature": 2.5}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"top_k": -1}, 400, "invalid_value", "top_k"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**12}, 400, "invalid_value", "max_tokens is 1000000000000, and at most 4096"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, 400, "invalid_value", "surrogate"),
        ({"documents": [{"text": "x", "title": "\ud800"}]}, 400, "invalid_value", "surrogate"),
        ({"documents": [{"id": "\ud800"}]}, 400, "invalid_value", "surrogate"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"stop": list("abcde")}, 400, "invalid_value", "stop"),
        ({"n": 3}, 400, "unsupported_parameter", "n:"),
        ({"beam_width": 3}, 400, "unknown_parameter", "beam_width"),
        ({"user": "x" * 200_000}, 413, "body_too_large", "100000"),
    ],
)
def test_bad_input_has_its_status_before_any_stream(
    service: Service, fields: dict[str, Any], status: int, code: str, said: str, stream: bool
) -> None:
    response = service.ask(**({"documents": [{"id": "harbour"}], "stream": stream} | fields))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_context_error_says_both_numbers(service: Service) -> None:
    error = service.ask({"text": "long " * 500}).json()["error"]
    numbers = [int(word) for word in error["message"].replace(".", " ").split() if word.isdigit()]
    assert 2048 in numbers
    assert any(2500 < number < 2700 for number in numbers)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", CHAT, b'{"model": "tiny", ', 400),
        ("POST", CHAT, b'{"model": "tiny", "messages": [], "temperature": Infinity}', 400),
        ("DELETE", CHAT, b"", 405),
        ("GET", "/v1/nothing", b"", 404),
    ],
)
def test_bad_http(service: Service, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.request(method, service.url + path, content=content, headers=headers, timeout=60)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_request_ids_are_echoed_once(service: Service) -> None:
    given = httpx.get(service.url + "/healthz", headers={"x-request-id": "mine-1"}, timeout=60)
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert len(httpx.get(service.url + "/healthz", timeout=60).headers["x-request-id"]) > 8


def test_too_many_requests_get_503_and_are_told_to_come_back(service: Service) -> None:
    count = 3 * (MAX_RUNNING + MAX_WAITING)
    with ThreadPoolExecutor(count) as pool:
        responses = list(pool.map(lambda _: service.ask({"id": "harbour"}, max_tokens=40), range(count)))
    refused = [r for r in responses if r.status_code != 200]
    assert refused
    assert len(refused) < count
    for response in refused:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
    assert httpx.get(service.url + "/healthz", timeout=60).status_code == 200


def test_documents_are_fetched_for_a_request_that_waits_its_turn(service: Service) -> None:
    def ask_when_known() -> httpx.Response:  # replicas look for what is new once a second
        while (response := service.ask({"id": "ahead"}, max_tokens=1)).status_code == 404:
            time.sleep(0.1)
        return response

    store = DocumentStore.open(str(service.store), fingerprint=service.model.fingerprint)
    add_document(service.model, store, "ahead", "The ferry to Arlen runs in summer only.")
    with contextlib.ExitStack() as streams:
        long = {"model": "tiny", "messages": QUESTION, "max_tokens": 1900, "stream": True}
        for _ in range(MAX_RUNNING):
            running = streams.enter_context(httpx.stream("POST", service.url + CHAT, json=long, timeout=60))
            assert running.status_code == 200  # known from its first token on
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ask_when_known)
            tiers, deadline = None, time.monotonic() + 30
            while tiers != ["host", "store"]:
                assert time.monotonic() < deadline, tiers
                tiers = httpx.get(f"{service.url}/v1/documents/ahead", timeout=60).json().get("tiers")
            assert not waiting.done()
            streams.close()
            assert waiting.result().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_clients_that_leave_stop_their_requests(service: Service, stream: bool) -> None:
    started = time.monotonic()
    assert service.ask(max_tokens=20).json()["usage"]["completion_tokens"] == 20
    per_token = (time.monotonic() - started) / 20
    tokens = 1900
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": tokens, "stream": stream}
    patience = httpx.Timeout(60, read=2)  # those that wait for a place, or for a whole answer, leave by themselves
    full = threading.Event()

    def leave_when_full() -> None:
        with (
            contextlib.suppress(httpx.ReadTimeout),
            client.stream("POST", service.url + CHAT, json=body) as response,
        ):
            if response.status_code == 503:
                full.set()
            assert full.wait(60)

    count = 3 * (MAX_RUNNING + MAX_WAITING)
    # One client for all: made one by one, they would come so slowly that those in the queue leave before it is full.
    unlimited = httpx.Limits(max_connections=None)
    with httpx.Client(timeout=patience, limits=unlimited) as client, ThreadPoolExecutor(count) as pool:
        clients = [pool.submit(leave_when_full) for _ in range(count)]
    left = time.monotonic()
    for client in clients:
        client.result()
    assert full.is_set()
    while service.ask(max_tokens=1).status_code == 503:
        time.sleep(0.02)
    # Not stopped, they would keep every place until one thread has computed all of their tokens.
    assert time.monotonic() - left < 0.25 * MAX_RUNNING * tokens * per_token
