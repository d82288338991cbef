"""Log probabilities, and ``/v1/completions``, on an engine that follows a script; no Ray."""

from __future__ import annotations

from typing import Any

import pytest
from scripted_engine import ASK, CHAT, CONTINUE, REPORT, TEXT, ScriptedEngine, events, send

from serve.wire import (
    Event,
    Piece,
    WireDocument,
    WireLogprob,
    WireMessage,
)

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
