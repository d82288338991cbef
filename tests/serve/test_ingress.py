"""The HTTP application on an engine that follows a script: chat, faults, refusals, what it says of itself; no Ray."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from scripted_engine import ASK, CHAT, JSON, ScriptedEngine, events, send

from serve.config import IngressSettings, SamplingDefaults
from serve.ingress import create_app
from serve.wire import (
    ApiError,
    Event,
    Failed,
    Piece,
)


def test_completion() -> None:
    engine = ScriptedEngine()
    response = send(engine, CHAT, json=ASK, headers={"x-request-id": "abc\t!1"})
    body = response.json()
    assert response.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "In Oslo.", "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == {
        "prompt_tokens": 30,
        "completion_tokens": 2,
        "total_tokens": 32,
        "prompt_tokens_details": {"cached_tokens": 20},
    }
    assert body["kvlink"] == {
        "linker": "reposition",
        "computed_tokens": 10,
        "ttft_ms": 12.3,
        "phases_ms": {"prefill": 10.0},
        "documents": [{"id": "a", "tokens": 20, "origin": "store"}],
    }
    assert engine.asked[0].request_id == "abc1"
    assert engine.closed == 1


@pytest.mark.parametrize("include_usage", [False, True])
def test_stream(include_usage: bool) -> None:
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    response = send(ScriptedEngine(), CHAT, json=ASK | {"stream": True} | options)
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert {c["object"] for c in chunks} == {"chat.completion.chunk"}
    assert len({c["id"] for c in chunks}) == 1
    deltas = [c["choices"][0]["delta"] for c in chunks if c["choices"]]
    assert deltas == [{"role": "assistant", "content": ""}, {"content": "In "}, {"content": "Oslo."}, {}]
    reasons = [c["choices"][0]["finish_reason"] for c in chunks if c["choices"]]
    assert reasons == [None, None, None, "stop"]
    assert chunks[-1]["kvlink"]["documents"][0]["origin"] == "store"
    if include_usage:
        assert chunks[-1]["choices"] == []
        assert chunks[-1]["usage"]["prompt_tokens_details"] == {"cached_tokens": 20}
        assert all(c["usage"] is None for c in chunks[:-1])
    else:
        assert all("usage" not in c for c in chunks)


@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_before_the_first_token_is_a_status(stream: bool) -> None:
    missing = ApiError(404, "no such document: 'x'", "document_not_found", "documents")
    response = send(ScriptedEngine([Failed(missing)]), CHAT, json=ASK | {"stream": stream})
    assert response.status_code == 404
    assert response.json() == {
        "error": {
            "message": "no such document: 'x'",
            "type": "invalid_request_error",
            "param": "documents",
            "code": "document_not_found",
        }
    }


@pytest.mark.parametrize("fault", [Failed(ApiError(503, "gone", "engine_unavailable")), RuntimeError("/secret/path")])
def test_a_fault_after_the_first_token_ends_a_stream_with_an_error_event(fault: Event | Exception) -> None:
    engine = ScriptedEngine([Piece("In "), fault])
    response = send(engine, CHAT, json=ASK | {"stream": True})
    assert response.status_code == 200
    received = events(response)
    assert set(received[-1]) == {"error"}
    assert "[DONE]" not in received
    assert "secret" not in response.text
    assert engine.closed == 1


def test_a_fault_after_the_first_token_fails_a_whole_answer() -> None:
    engine = ScriptedEngine([Piece("In "), Failed(ApiError(503, "gone", "engine_unavailable", retry_after_s=1.5))])
    response = send(engine, CHAT, json=ASK)
    assert response.status_code == 503
    assert response.headers["retry-after"] == "2"
    assert response.json()["error"]["type"] == "overloaded_error"


def test_an_unexpected_exception_is_a_plain_500() -> None:
    response = send(ScriptedEngine([RuntimeError("/secret/path")]), CHAT, json=ASK)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "internal_error"
    assert "secret" not in response.text
    assert "Traceback" not in response.text


def test_an_abandoned_stream_closes_the_engine_s_events() -> None:
    async def go(engine: ScriptedEngine) -> None:
        app = create_app(engine, IngressSettings(), SamplingDefaults())
        body = json.dumps(ASK | {"stream": True}).encode()
        scope = {
            "type": "http", "asgi": {"version": "3.0", "spec_version": "2.4"}, "http_version": "1.1", "method": "POST",
            "scheme": "http", "path": CHAT, "raw_path": CHAT.encode(), "query_string": b"", "root_path": "",
            "headers": [(b"content-type", b"application/json")],
        }  # fmt: skip
        sent = asyncio.Event()

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def blocked_send(message: Any) -> None:
            if message["type"] == "http.response.body":
                sent.set()
                await asyncio.Event().wait()

        call = asyncio.create_task(app(scope, receive, blocked_send))
        await sent.wait()
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call

    engine = ScriptedEngine()
    asyncio.run(go(engine))
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("path", "request_", "status", "code"),
    [
        (CHAT, {"content": b'{"model": ', "headers": JSON}, 400, "invalid_json"),
        (CHAT, {"content": b"\xff\xfe", "headers": JSON}, 400, "invalid_json"),
        (CHAT, {"content": b"[" * 100_000, "headers": JSON}, 400, "invalid_json"),
        (CHAT, {"content": b"[1]", "headers": JSON}, 400, "invalid_json"),
        (CHAT, {"content": b"", "headers": JSON}, 400, "missing_parameter"),
        (CHAT, {"data": {"model": "m"}}, 400, "invalid_json"),
        (CHAT, {"json": {"model": "m"}}, 400, "missing_parameter"),
        (CHAT, {"json": ASK | {"model": "gpt-4"}}, 404, "model_not_found"),
        (CHAT, {"json": ASK | {"temperature": -1}}, 400, "invalid_value"),
        (CHAT, {"content": b'{"temperature": NaN}', "headers": JSON}, 400, None),
        (
            CHAT,
            {"content": b'{"a": 1' + b"0" * 5000 + b"}", "headers": JSON},
            400,
            None,
        ),
        (CHAT, {"content": json.dumps(ASK | {"half \ud800": 1}), "headers": JSON}, 400, None),
        (CHAT, {"json": ASK | {"user": "x" * 2**20}}, 413, "body_too_large"),
        (CHAT, {"method": "GET"}, 405, "method_not_allowed"),
        ("/v1/models/gpt-4", {"method": "GET"}, 404, "model_not_found"),
        ("/v2", {"method": "GET"}, 404, "not_found"),
    ],
)
def test_bad_requests_are_openai_errors(path: str, request_: dict[str, Any], status: int, code: str | None) -> None:
    engine = ScriptedEngine()
    response = send(engine, path, **request_)
    assert response.status_code == status
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    if code is not None:
        assert error["code"] == code
    assert engine.asked == []


HALF = "half a surrogate pair: \ud800"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": [{"role": "user", "content": HALF}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": HALF}]}]},
        {"documents": [{"text": HALF}]},
        {"documents": [{"text": "x", "title": HALF}]},
        {"documents": [{"id": HALF}]},
        {"stop": HALF},
        {"stop": ["a", HALF]},
        {"linker": HALF},
        {"model": HALF},
    ],
)
def test_text_that_no_encoding_takes_is_refused(fields: dict[str, Any]) -> None:
    engine = ScriptedEngine()
    response = send(engine, CHAT, content=json.dumps(ASK | fields), headers=JSON)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_value")
    assert response.json()["error"]["param"].startswith(next(iter(fields)))
    assert engine.asked == []


def test_models_and_health() -> None:
    engine = ScriptedEngine()
    listed = send(engine, "/v1/models", method="GET").json()
    assert [m["id"] for m in listed["data"]] == ["m"]
    assert send(engine, "/v1/models/m", method="GET").json() == listed["data"][0]
    assert send(engine, "/healthz", method="GET").json() == {"status": "ok", "model": "m"}
    engine.away = ApiError(503, "away", "engine_unavailable", retry_after_s=1)
    away = send(engine, "/healthz", method="GET")
    assert (away.status_code, away.headers["retry-after"]) == (503, "1")


def test_openapi_tells_what_happens() -> None:
    page = send(ScriptedEngine(), "/openapi.json", method="GET").json()
    chat = page["paths"][CHAT]["post"]
    assert set(chat["responses"]) == {"200", "default"}
    assert set(chat["responses"]["200"]["content"]) == {"application/json", "text/event-stream"}
    request_schema = page["components"]["schemas"]["ChatCompletionRequest"]
    assert {"documents", "linker", "top_k"} <= set(request_schema["properties"])
    assert request_schema["additionalProperties"] is False
    text = json.dumps(page)
    for reference in {part.split('"')[0] for part in text.split('"$ref": "#')[1:]}:
        place: Any = page
        for name in reference.strip("/").split("/"):
            place = place[name]
