"""The request schema: what works, what is accepted, what is refused and in which words."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from serve.config import IngressSettings, SamplingDefaults
from serve.protocol import NEUTRAL, ChatCompletionRequest, engine_request, parameter_name, validation_error
from serve.wire import ApiException, EngineRequest, WireDocument, WireMessage, WireSampling

ASK: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Where?"}]}


def translate(**fields: Any) -> EngineRequest:
    body = ChatCompletionRequest.model_validate(ASK | fields)
    limits = IngressSettings(max_documents=2, max_messages=3, max_tokens=100)
    return engine_request(body, request_id="r", limits=limits, defaults=SamplingDefaults(max_tokens=77))


def refusal(fields: dict[str, Any]) -> tuple[str | None, str]:
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(ASK | fields)
    error = validation_error([dict(fault) for fault in caught.value.errors()])
    assert error.status == 400
    assert error.type == "invalid_request_error"
    return error.param, error.code


def test_everything_that_works_arrives() -> None:
    asked = translate(
        messages=[
            {"role": "developer", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "Where"}, {"type": "text", "text": "is it?"}]},
        ],
        documents=[{"id": "a"}, {"text": "It is in Oslo.", "title": "Place"}],
        linker="full",
        temperature=1,
        top_p=0.5,
        top_k=3,
        seed=-4,
        max_completion_tokens=5,
        stop="\n",
    )
    assert asked == EngineRequest(
        "r",
        (WireMessage("system", "Be brief."), WireMessage("user", "Where\nis it?")),
        (WireDocument("a"), WireDocument(None, "It is in Oslo.", "Place")),
        "full",
        WireSampling(temperature=1.0, top_p=0.5, top_k=3, seed=-4, max_tokens=5, stop=("\n",)),
        stream=False,
    )


def test_documents_of_a_message_arrive_with_it() -> None:
    asked = translate(
        messages=[
            {"role": "user", "content": "Who?", "documents": [{"id": "a"}]},
            {"role": "assistant", "content": "Maria.", "documents": None},
            *ASK["messages"],
        ],
        documents=[{"text": "It is in Oslo.", "title": "Place"}],
    )
    assert asked.messages[0] == WireMessage("user", "Who?", (WireDocument("a"),))
    assert [m.documents for m in asked.messages[1:]] == [(), ()]
    assert asked.documents == (WireDocument(None, "It is in Oslo.", "Place"),)


def test_the_longest_answer_is_allowed() -> None:
    assert translate(max_tokens=100).sampling.max_tokens == 100


def test_defaults_fill_in_what_is_left_out_or_null() -> None:
    asked = translate(temperature=None, stop=None, documents=None, stream=None)
    assert asked.sampling == WireSampling(0.0, 1.0, 0, None, 77, ())
    assert asked.documents == ()


def test_a_reply_can_be_sent_back_as_a_turn() -> None:
    from openai.types.chat import ChatCompletionMessage

    reply = ChatCompletionMessage(role="assistant", content="In Oslo.").model_dump()
    asked = translate(messages=[*ASK["messages"], reply, *ASK["messages"]])
    assert asked.messages[1] == WireMessage("assistant", "In Oslo.")


@pytest.mark.parametrize("name", sorted(NEUTRAL))
def test_unsupported_parameters_are_accepted_only_when_off(name: str) -> None:
    for value in (None, *NEUTRAL[name]):
        translate(**{name: value})
    assert refusal({name: {"something": "else"}}) == (name, "unsupported_parameter")


def test_harmless_parameters_are_accepted() -> None:
    translate(user="u", metadata={"k": "v"}, safety_identifier="s", prompt_cache_key="p")


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"best_of": 2}, "best_of", "unknown_parameter"),
        ({"documents": [{"id": "a", "body": "x"}]}, "documents[0].body", "unknown_parameter"),
        ({"n": 2}, "n", "unsupported_parameter"),
        ({"presence_penalty": 0.1}, "presence_penalty", "unsupported_parameter"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": "0.5"}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"temperature": 10**400}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": 1.01}, "top_p", "invalid_value"),
        ({"top_p": float("inf")}, "top_p", "invalid_value"),
        ({"top_k": -1}, "top_k", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_tokens": 1.5}, "max_tokens", "invalid_value"),
        ({"max_tokens": True}, "max_tokens", "invalid_value"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, None, "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop", "invalid_value"),
        ({"stop": ["a", ""]}, "stop[1]", "invalid_value"),
        ({"stop": 7}, "stop", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, None, "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages[0].role", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "missing_parameter"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].type",
            "invalid_value",
        ),
        ({"messages": [{"role": "user", "content": "half a pair: \ud800"}]}, "messages[0].content", "invalid_value"),
        ({"documents": [{"text": "half a pair: \ud800"}]}, "documents[0].text", "invalid_value"),
        ({"documents": [{"text": " \n"}]}, "documents[0].text", "empty_document"),
        ({"documents": [{}]}, "documents[0]", "missing_parameter"),
        ({"documents": [{"id": ""}]}, "documents[0].id", "invalid_value"),
        ({"documents": [{"id": "a", "title": "T"}]}, "documents[0]", "invalid_value"),
        ({"documents": "a"}, "documents", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": "x", "documents": [{}]}]},
            "messages[0].documents[0]",
            "missing_parameter",
        ),
        (
            {"messages": [{"role": "user", "content": "x", "documents": [{"text": ""}]}]},
            "messages[0].documents[0].text",
            "empty_document",
        ),
        (
            {"messages": [{"role": "system", "content": "x", "documents": [{"id": "a"}]}, *ASK["messages"]]},
            "messages[0].documents",
            "misplaced_documents",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "documents": [{"id": "a"}]}, *ASK["messages"]]},
            "messages[0].documents",
            "misplaced_documents",
        ),
        ({"model": None}, "model", "invalid_value"),
    ],
)
def test_faults_are_named(fields: dict[str, Any], param: str | None, code: str) -> None:
    assert refusal(fields) == (param, code)


@pytest.mark.parametrize(
    ("fields", "code", "said"),
    [
        ({"documents": [{"id": "a"}] * 3}, "invalid_value", "3 documents, and at most 2"),
        (
            {
                "documents": [{"id": "a"}, {"id": "a"}],
                "messages": [{"role": "user", "content": "x", "documents": [{"id": "a"}]}, *ASK["messages"]],
            },
            "invalid_value",
            "3 documents, and at most 2",
        ),
        ({"messages": ASK["messages"] * 4}, "invalid_value", "4 messages, and at most 3"),
        ({"messages": [{"role": "user", "content": "\t "}]}, "empty_question", "ask something"),
        ({"max_tokens": 101}, "invalid_value", "max_tokens is 101, and at most 100 is allowed"),
        ({"max_completion_tokens": 10**30}, "invalid_value", f"max_completion_tokens is {10**30}, and at most 100"),
    ],
)
def test_limits(fields: dict[str, Any], code: str, said: str) -> None:
    with pytest.raises(ApiException) as caught:
        translate(**fields)
    assert (caught.value.error.status, caught.value.error.code) == (400, code)
    assert said in caught.value.error.message


def test_parameter_names_look_like_openai_s() -> None:
    assert parameter_name(("body", "messages", 0, "content", "(many)", 1, "text")) == "messages[0].content[1].text"
    assert parameter_name(("body", "body")) == "body"
    assert parameter_name(("body",)) is None
