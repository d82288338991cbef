"""``POST /v1/chat/completions``: the request, as OpenAI has it, plus ``documents`` (of the request, of a message),
``linker`` and ``top_k``.

Three kinds of fields: those that work; those that change nothing here and are accepted; and those that would
change the answer and are not supported, which are refused unless they hold the value that means "off".
Anything else is unknown and refused. Types are strict: ``"0.5"`` is not a number.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from serve.config import IngressSettings, SamplingDefaults
from serve.wire import ApiError, ApiException, EngineRequest, WireDocument, WireMessage, WireSampling

#: Names of union branches; they stand in the location of an error and mean nothing to a client.
BRANCHES = frozenset({"(one)", "(many)"})

#: Not supported, and the values that ask for nothing. ``None`` always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "frequency_penalty": (0,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
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
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}


def _one_or_many(value: Any) -> str | None:
    if isinstance(value, str):
        return "(one)"
    return "(many)" if isinstance(value, list) else None


def _encodable(text: str) -> str:
    """JSON can spell half of a surrogate pair, which no encoding and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("not_unicode", "is not valid Unicode: it holds half of a surrogate pair") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class DocumentParam(_Body):
    """A document: its ``id`` alone when the store has it, or its ``text``, with or without an id."""

    model_config = ConfigDict(json_schema_extra={"anyOf": [{"required": ["id"]}, {"required": ["text"]}]})

    id: Text | None = Field(default=None, min_length=1)  # the core's rule for ids is the engine's to apply
    text: Text | None = None
    title: Text | None = Field(default=None, max_length=4096)

    @field_validator("text")
    @classmethod
    def _not_empty(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise PydanticCustomError("empty_document", "the document has no text; leave it out or send its text")
        return text

    @model_validator(mode="after")
    def _has_something(self) -> Self:
        if self.text is None and self.id is None:
            raise PydanticCustomError("missing_parameter", "a document needs an id, a text, or both")
        if self.title is not None and self.text is None:
            raise PydanticCustomError("invalid_value", "a title needs the text that it belongs to")
        return self


class ChatMessage(_Body):
    """One turn. Fields of replies are accepted when empty, so that a reply can be sent back as it came."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("(one)")] | Annotated[list[TextPart], Tag("(many)")],
        Discriminator(
            _one_or_many,
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


class StreamOptions(_Body):
    """What a stream also carries."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatCompletionRequest(_Body):
    """The body of ``POST /v1/chat/completions``."""

    model: Text = Field(min_length=1)
    messages: list[ChatMessage] = Field(min_length=1)
    documents: list[DocumentParam] | None = Field(
        default=None,
        description="Documents to answer from, in this order, where the model's layout puts them; cached ones cost "
        "next to nothing.",
    )
    linker: Text | None = Field(default=None, description="How cached documents are linked; default: the service's.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="0: all tokens.")
    max_tokens: int | None = Field(default=None, ge=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: (
        Annotated[
            Annotated[Text, Field(min_length=1, max_length=512), Tag("(one)")]
            | Annotated[list[Annotated[Text, Field(min_length=1, max_length=512)]], Field(max_length=4), Tag("(many)")],
            Discriminator(
                _one_or_many,
                custom_error_type="stop_type",
                custom_error_message="must be a string or a list of at most 4 strings",
            ),
        ]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted; nothing here depends on them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    # Refused unless off: see NEUTRAL.
    audio: JsonValue = None
    frequency_penalty: JsonValue = None
    function_call: JsonValue = None
    functions: JsonValue = None
    logit_bias: JsonValue = None
    logprobs: JsonValue = None
    modalities: JsonValue = None
    n: JsonValue = None
    parallel_tool_calls: JsonValue = None
    prediction: JsonValue = None
    presence_penalty: JsonValue = None
    reasoning_effort: JsonValue = None
    response_format: JsonValue = None
    service_tier: JsonValue = None
    store: JsonValue = None
    tool_choice: JsonValue = None
    tools: JsonValue = None
    top_logprobs: JsonValue = None
    verbosity: JsonValue = None
    web_search_options: JsonValue = None

    @field_validator(*NEUTRAL)
    @classmethod
    def _off(cls, value: JsonValue, info: ValidationInfo) -> JsonValue:
        assert info.field_name is not None
        neutral = NEUTRAL[info.field_name]
        if value is None or value in neutral:
            return value
        allowed = f" or send {neutral[0]!r}" if neutral else ""
        raise PydanticCustomError(
            "unsupported_parameter", "is not supported here; leave it out{allowed}", {"allowed": allowed}
        )

    @model_validator(mode="after")
    def _agree(self) -> Self:
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise PydanticCustomError("invalid_value", "max_tokens and max_completion_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid_value", "stream_options needs stream to be true")
        return self


def parameter_name(location: tuple[int | str, ...]) -> str | None:
    """``("body", "messages", 0, "role")`` as ``messages[0].role``, the way OpenAI names parameters."""
    name = ""
    for part in location[1:] if location[:1] == ("body",) else location:
        if part in BRANCHES:
            continue
        name += f"[{part}]" if isinstance(part, int) else f".{part}" if name else part
    return name or None


def validation_error(faults: list[dict[str, Any]]) -> ApiError:
    """The first fault of a request that does not fit the schema, as a 400."""
    fault = faults[0]
    kind, param = fault["type"], parameter_name(tuple(fault["loc"]))
    if kind == "json_invalid" or (kind == "model_attributes_type" and param is None):
        detail = fault.get("ctx", {}).get("error", "the body must be one JSON object, sent as application/json")
        return ApiError(400, f"the body is not a JSON object: {detail}", "invalid_json")
    if kind == "extra_forbidden":
        return ApiError(400, f"unknown parameter: {param}", "unknown_parameter", param)
    if kind == "missing":
        missing = f"missing parameter: {param}" if param else "the body is missing"
        return ApiError(400, missing, "missing_parameter", param)
    named = {"empty_document", "misplaced_documents", "missing_parameter", "unsupported_parameter"}
    message = f"{param}: {fault['msg']}" if param else str(fault["msg"])
    return ApiError(400, message, kind if kind in named else "invalid_value", param)


def engine_request(
    body: ChatCompletionRequest, *, request_id: str, limits: IngressSettings, defaults: SamplingDefaults
) -> EngineRequest:
    """What the engine is asked, defaults filled in.

    Raises:
        ApiException: more documents, messages or tokens than allowed, or nothing asked.
    """
    count = len(body.documents or ()) + sum(len(m.documents or ()) for m in body.messages)
    if count > limits.max_documents:
        raise _refused(f"{count} documents, and at most {limits.max_documents} are allowed.", "documents")
    if len(body.messages) > limits.max_messages:
        raise _refused(f"{len(body.messages)} messages, and at most {limits.max_messages} are allowed.", "messages")
    if not body.messages[-1].text.strip():
        raise _refused("the last message has no text; ask something.", "messages", "empty_question")
    max_tokens = body.max_completion_tokens or body.max_tokens or defaults.max_tokens
    if max_tokens > limits.max_tokens:
        name = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
        raise _refused(f"{name} is {max_tokens}, and at most {limits.max_tokens} is allowed.", name)
    stop = body.stop or ()
    return EngineRequest(
        request_id=request_id,
        messages=tuple(
            WireMessage("system" if m.role == "developer" else m.role, m.text, _wire(m.documents))
            for m in body.messages
        ),
        documents=_wire(body.documents),
        linker=body.linker,
        sampling=WireSampling(
            temperature=defaults.temperature if body.temperature is None else body.temperature,
            top_p=defaults.top_p if body.top_p is None else body.top_p,
            top_k=defaults.top_k if body.top_k is None else body.top_k,
            seed=body.seed,
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        ),
        stream=bool(body.stream),
    )


def _wire(documents: list[DocumentParam] | None) -> tuple[WireDocument, ...]:
    return tuple(WireDocument(d.id, d.text, d.title) for d in documents or ())


def _refused(message: str, param: str, code: str = "invalid_value") -> ApiException:
    return ApiException(ApiError(400, message, code, param))
