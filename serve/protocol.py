"""``POST /v1/chat/completions``: the request, as OpenAI has it, plus ``documents`` (of the request, of a message),
``linker`` and ``top_k``.

Three kinds of fields: those that work; those that change nothing here and are accepted; and those that would
change the answer and are not supported, which are refused unless they hold the value that means "off".
Anything else is unknown and refused. Types are strict: ``"0.5"`` is not a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, JsonValue, Tag, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from serve.config import SamplingDefaults
from serve.fields import (
    AskBody,
    Body,
    DocumentParam,
    Text,
    TextPart,
    check_documents,
    one_or_many,
    only_off,
    parameter_name,
    refused,
    validation_error,
    wire_documents,
)
from serve.settings import IngressSettings
from serve.wire import DEFAULT_NAMESPACE, EngineRequest, WireMessage

__all__ = ["NEUTRAL", "ChatCompletionRequest", "engine_request", "parameter_name", "validation_error"]

#: Not supported, and the values that ask for nothing. ``None`` always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "verbosity": ("medium",),
    "web_search_options": (),
}


class ChatMessage(Body):
    """One turn. Fields of replies are accepted when empty, so that a reply can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("(one)")] | Annotated[list[TextPart], Tag("(many)")],
        Discriminator(
            one_or_many,
            custom_error_type="content_type",
            custom_error_message="must be a string or a list of text parts",
        ),
    ]
    documents: list[DocumentParam] | None = Field(
        default=None, description="Documents added in this turn, which must be a user's; they stand before its content."
    )
    name: None = None
    refusal: None = None
    annotations: list[JsonValue] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[JsonValue] | None = Field(default=None, max_length=0)

    @field_validator("documents")
    @classmethod
    def _of_a_user(cls, value: list[DocumentParam] | None, info: ValidationInfo) -> list[DocumentParam] | None:
        if value and info.data.get("role", "user") != "user":
            raise PydanticCustomError("misplaced_documents", "only a message of the role 'user' can have documents")
        return value

    @property
    def text(self) -> str:
        """The content as one string."""
        if isinstance(self.content, str):
            return self.content
        return "\n".join(part.text for part in self.content)


class ChatCompletionRequest(AskBody):
    """The body of ``POST /v1/chat/completions``."""

    model_config = ConfigDict(json_schema_extra=only_off(NEUTRAL))

    NEUTRAL = NEUTRAL

    messages: list[ChatMessage] = Field(min_length=1)
    documents: list[DocumentParam] | None = Field(
        default=None,
        description="Documents to answer from, in this order, where the model's layout puts them; cached ones cost "
        "next to nothing.",
    )
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    # Accepted; nothing here depends on them.
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Refused unless off: see NEUTRAL.
    audio: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    modalities: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prediction: JsonValue = None
    reasoning_effort: JsonValue = None
    response_format: JsonValue = None
    service_tier: JsonValue = None
    store: JsonValue = None
    tool_choice: JsonValue = None
    tools: JsonValue = None
    verbosity: JsonValue = None
    web_search_options: JsonValue = None

    @model_validator(mode="after")
    def _agree(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("invalid_value", "max_tokens and max_completion_tokens differ; send one of them")
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("invalid_value", "top_logprobs needs logprobs to be true")
        return self


def engine_request(
    body: ChatCompletionRequest,
    *,
    request_id: str,
    limits: IngressSettings,
    defaults: SamplingDefaults,
    namespace: str = DEFAULT_NAMESPACE,
    traceparent: str | None = None,
) -> EngineRequest:
    """What the engine is asked, defaults filled in.

    Raises:
        ApiException: more documents, messages or tokens than allowed, or nothing asked.
    """
    documents = [*(body.documents or ()), *(d for m in body.messages for d in m.documents or ())]
    check_documents(documents, most=limits.max_documents, most_bytes=limits.max_document_bytes)
    if len(body.messages) > limits.max_messages:
        raise refused(f"{len(body.messages)} messages, and at most {limits.max_messages} are allowed.", "messages")
    if not body.messages[-1].text.strip():
        raise refused("the last message has no text; ask something.", "messages", "empty_question")
    name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    return EngineRequest(
        request_id=request_id,
        messages=tuple(
            WireMessage("system" if m.role == "developer" else m.role, m.text, wire_documents(m.documents))
            for m in body.messages
        ),
        documents=wire_documents(body.documents),
        linker=body.linker,
        sampling=body.sampling(limits, defaults, most=body.max_completion_tokens, name=name),
        stream=bool(body.stream),
        namespace=namespace,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        traceparent=traceparent,
    )
