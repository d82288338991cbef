"""The HTTP application on an engine that follows a script; no Ray."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from serve.config import IngressSettings, SamplingDefaults
from serve.ingress import create_app
from serve.keys import KeyRing, create_key
from serve.wire import (
    ApiError,
    ApiException,
    DocumentReport,
    EngineRequest,
    Event,
    Failed,
    ModelCard,
    Piece,
    Report,
    WireDocument,
    WireLogprob,
    WireMessage,
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


LOGPROBS = (
    WireLogprob("In", -0.5, (73, 110), (WireLogprob("In", -0.5, (73, 110)), WireLogprob("At", -1.5, (65, 116)))),
    WireLogprob(" Oslo", -0.25, (32, 79), ()),
)
LIKELY: list[Event] = [Piece("In", logprobs=LOGPROBS[:1]), Piece(" Oslo", "stop", REPORT, LOGPROBS[1:])]
CONTENT = [
    {
        "token": "In",
        "logprob": -0.5,
        "bytes": [73, 110],
        "top_logprobs": [
            {"token": "In", "logprob": -0.5, "bytes": [73, 110]},
            {"token": "At", "logprob": -1.5, "bytes": [65, 116]},
        ],
    },
    {"token": " Oslo", "logprob": -0.25, "bytes": [32, 79], "top_logprobs": []},
]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(stream: bool) -> None:
    engine = ScriptedEngine(LIKELY)
    response = send(engine, CHAT, json=ASK | {"logprobs": True, "top_logprobs": 2, "stream": stream})
    if stream:
        choices = [c["choices"][0] for c in events(response)[:-1]]
        found = [entry for c in choices if c.get("logprobs") for entry in c["logprobs"]["content"]]
    else:
        found = response.json()["choices"][0]["logprobs"]["content"]
    assert found == CONTENT
    assert engine.asked[0].logprobs == 2
    assert send(engine, CHAT, json=ASK | {"logprobs": True}).status_code == 200
    assert engine.asked[1].logprobs == 0
    assert send(engine, CHAT, json=ASK | {"top_logprobs": 2}).status_code == 400


TEXT = "/v1/completions"
CONTINUE = {"model": "m", "prompt": "Where"}


def test_text_completion() -> None:
    engine = ScriptedEngine(LIKELY)
    body = send(engine, TEXT, json=CONTINUE | {"logprobs": 2, "documents": [{"id": "a"}], "stop": "x"}).json()
    assert body["object"] == "text_completion"
    assert body["choices"] == [
        {
            "index": 0,
            "text": "In Oslo",
            "logprobs": {
                "tokens": ["In", " Oslo"],
                "token_logprobs": [-0.5, -0.25],
                "top_logprobs": [{"In": -0.5, "At": -1.5}, {}],
                "text_offset": [0, 2],
            },
            "finish_reason": "stop",
        }
    ]
    (asked,) = engine.asked
    assert (asked.messages, asked.documents) == ((WireMessage("prompt", "Where"),), (WireDocument("a"),))
    assert (asked.sampling.stop, asked.logprobs) == (("x",), 2)


def test_a_stream_of_text() -> None:
    response = send(ScriptedEngine(), TEXT, json=CONTINUE | {"stream": True, "stream_options": {"include_usage": True}})
    *chunks, done = events(response)
    assert done == "[DONE]"
    assert [c["choices"][0]["text"] for c in chunks if c["choices"]] == ["In ", "Oslo.", ""]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-1]["usage"]["total_tokens"] == 32


@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"prompt": ""}, "empty_question", "prompt"),
        ({"prompt": ["a", "b"]}, "invalid_value", "prompt"),
        ({"prompt": [1, 2]}, "invalid_value", "prompt"),
        ({"prompt": 7}, "invalid_value", "prompt"),
        ({"echo": True}, "unsupported_parameter", "echo"),
        ({"best_of": 2}, "unsupported_parameter", "best_of"),
        ({"suffix": "x"}, "unsupported_parameter", "suffix"),
        ({"logprobs": 6}, "invalid_value", "logprobs"),
        ({"messages": []}, "unknown_parameter", "messages"),
        ({"max_tokens": 10**9}, "invalid_value", "max_tokens"),
    ],
)
def test_text_completions_that_are_refused(fields: dict[str, Any], code: str, param: str) -> None:
    error = send(ScriptedEngine(), TEXT, json=CONTINUE | fields).json()["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(stream: bool) -> None:
    engine = ScriptedEngine()
    engine.slow_s = 0.2
    late = send(engine, CHAT, json=ASK | {"stream": stream}, limits={"request_timeout_s": 0.05})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "request_timeout")
    assert engine.closed == 1
    late = send(engine, CHAT, json=ASK | {"stream": stream}, limits={"request_timeout_s": 0.3})
    if stream:
        assert late.status_code == 200
        assert events(late)[-1]["error"]["code"] == "request_timeout"
        assert "[DONE]" not in late.text
    else:
        assert late.status_code == 504
    assert engine.closed == 2


def test_request_ids_go_to_the_engine_and_back() -> None:
    engine = ScriptedEngine()
    assert send(engine, CHAT, json=ASK, headers={"x-request-id": "mine-1"}).headers["x-request-id"] == "mine-1"
    refused = send(engine, CHAT, json={}, headers={"x-request-id": "mine-2"})
    assert (refused.status_code, refused.headers["x-request-id"]) == (400, "mine-2")
    made = send(engine, CHAT, json=ASK).headers["x-request-id"]
    assert [r.request_id for r in engine.asked] == ["mine-1", made]
    assert send(engine, CHAT, json=ASK, headers={"x-request-id": "%s/ {}"}).headers["x-request-id"] == "s"


def test_pages_of_other_origins_are_let_in_only_if_named() -> None:
    asked = {"origin": "https://app.example", "access-control-request-method": "POST"}
    closed = send(ScriptedEngine(), CHAT, method="OPTIONS", headers=asked)
    assert "access-control-allow-origin" not in closed.headers
    allowed = {"cors_origins": ["https://app.example"]}
    opened = send(ScriptedEngine(), CHAT, method="OPTIONS", headers=asked, limits=allowed)
    assert opened.headers["access-control-allow-origin"] == "https://app.example"
    other = send(ScriptedEngine(), CHAT, method="OPTIONS", headers=asked | {"origin": "https://x.y"}, limits=allowed)
    assert "access-control-allow-origin" not in other.headers


def test_one_key_cannot_take_every_place(tmp_path: Path) -> None:
    keys = {name: create_key(tmp_path / "keys.json", namespace=name, role="user")[1] for name in ("a", "b")}

    async def go() -> list[int]:
        engine = ScriptedEngine()
        engine.slow_s = 0.05
        limits = IngressSettings(max_ongoing_per_key=2)
        app = create_app(engine, limits, SamplingDefaults(), keys=KeyRing(tmp_path / "keys.json"))
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://service") as client:

            async def ask(who: str) -> httpx.Response:
                return await client.post(CHAT, json=ASK, headers={"authorization": f"Bearer {keys[who]}"})

            replies = await asyncio.gather(*(ask(who) for who in "aaaab"))
            full = [r for r in replies if r.status_code == 429]
            assert all(r.headers["retry-after"] == "1" for r in full)
            assert all(r.json()["error"]["code"] == "rate_limit_exceeded" for r in full)
            assert (await ask("a")).status_code == 200  # places are given back
            return [r.status_code for r in replies]

    statuses = asyncio.run(go())
    assert sorted(statuses[:4]) == [200, 200, 429, 429]
    assert statuses[4] == 200


def test_without_a_store_documents_cannot_be_kept() -> None:
    response = send(ScriptedEngine(), "/v1/documents", json={"documents": [{"id": "a", "text": "x"}]})
    assert (response.status_code, response.json()["error"]["code"]) == (400, "no_store")


@pytest.mark.parametrize("path", ["/v1/models", "/v1/documents", "//v1/models", "/v1/../v1/models", "/V1/models"])
@pytest.mark.parametrize("root", ["", "/below"])
def test_no_way_to_write_a_path_gets_around_the_keys(path: str, root: str, tmp_path: Path) -> None:
    create_key(tmp_path / "keys.json", namespace="a", role="user")

    async def go() -> int:
        app = create_app(ScriptedEngine(), IngressSettings(), SamplingDefaults(), keys=KeyRing(tmp_path / "keys.json"))
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": b"", "more_body": False}

        async def send(message: Any) -> None:
            sent.append(message)

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "GET", "scheme": "http",
            "path": root + path, "raw_path": (root + path).encode(), "query_string": b"", "root_path": root,
            "headers": [],
        }  # fmt: skip
        await app(scope, receive, send)
        return int(sent[0]["status"])

    assert asyncio.run(go()) == (401 if path.startswith("/v1/") else 404)
