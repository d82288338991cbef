"""What the HTTP application lets in, and for how long: time-outs, ids, origins, keys; no Ray."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from scripted_engine import ASK, CHAT, ScriptedEngine, events, send

from serve.config import IngressSettings, SamplingDefaults
from serve.ingress import create_app
from serve.keys import KeyRing, create_key


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
