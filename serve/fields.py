"""What requests have in common: strict types, documents, stop strings, faults in OpenAI's words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

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

from serve.config import SamplingDefaults
from serve.settings import IngressSettings
from serve.wire import ApiError, ApiException, WireDocument, WireSampling

#: Names of union branches; they stand in the location of an error and mean nothing to a client.
BRANCHES = frozenset({"(one)", "(many)"})


def one_or_many(value: Any) -> str | None:
    """Which branch of a union of a string and a list is meant."""
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


class Body(BaseModel):
    """Strict, and closed to unknown fields."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(Body):
    """A part of a message; only text is supported."""

    type: Literal["text"]
    text: Text


class DocumentParam(Body):
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


class StreamOptions(Body):
    """What a stream also carries."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


_StopText = Annotated[Text, Field(min_length=1, max_length=512)]
Stop = Annotated[
    Annotated[_StopText, Tag("(one)")] | Annotated[list[_StopText], Field(max_length=4), Tag("(many)")],
    Discriminator(
        one_or_many,
        custom_error_type="stop_type",
        custom_error_message="must be a string or a list of at most 4 strings",
    ),
]


def check_off(value: JsonValue, neutral: tuple[Any, ...]) -> JsonValue:
    """``value`` of a field that is not supported, if it asks for nothing; ``None`` always does."""
    if value is None or value in neutral:
        return value
    allowed = f" or send {neutral[0]!r}" if neutral else ""
    raise PydanticCustomError(
        "unsupported_parameter", "is not supported here; leave it out{allowed}", {"allowed": allowed}
    )


def only_off(neutral: dict[str, tuple[Any, ...]]) -> Callable[[dict[str, Any]], None]:
    """For a model's JSON schema: that its unsupported fields take only what means "off"."""

    def change(schema: dict[str, Any]) -> None:
        for name, values in neutral.items():
            schema["properties"][name] = {"enum": [*values, None], "description": "Not supported: leave it out."}

    return change


class AskBody(Body):
    """What both kinds of completions take. ``NEUTRAL``: not supported, and the values that ask for nothing."""

    NEUTRAL: ClassVar[dict[str, tuple[Any, ...]]] = {}

    model: Text = Field(min_length=1)
    linker: Text | None = Field(default=None, description="How cached documents are linked; default: the service's.")
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1, description="0: all tokens.")
    max_tokens: int | None = Field(default=None, ge=1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    stop: Stop | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Accepted; nothing here depends on it.
    user: str | None = None

    # Refused unless off: see NEUTRAL.
    frequency_penalty: JsonValue = None
    logit_bias: JsonValue = None
    n: JsonValue = None
    presence_penalty: JsonValue = None

    @field_validator("*")
    @classmethod
    def _off(cls, value: Any, info: ValidationInfo) -> Any:
        neutral = cls.NEUTRAL.get(info.field_name or "")
        return value if neutral is None else check_off(value, neutral)

    @model_validator(mode="after")
    def _streams(self) -> Self:
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("invalid_value", "stream_options needs stream to be true")
        return self

    def sampling(
        self, limits: IngressSettings, defaults: SamplingDefaults, *, most: int | None = None, name: str = "max_tokens"
    ) -> WireSampling:
        """Sampling parameters, defaults filled in; ``most`` is what the body calls ``name`` in place of ``max_tokens``.

        Raises:
            ApiException: a longer answer than allowed.
        """
        max_tokens = most or self.max_tokens or defaults.max_tokens
        if max_tokens > limits.max_tokens:
            raise refused(f"{name} is {max_tokens}, and at most {limits.max_tokens} is allowed.", name)
        stop = self.stop or ()
        return WireSampling(
            temperature=defaults.temperature if self.temperature is None else self.temperature,
            top_p=defaults.top_p if self.top_p is None else self.top_p,
            top_k=defaults.top_k if self.top_k is None else self.top_k,
            seed=self.seed,
            max_tokens=max_tokens,
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )


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
    named = {
        "duplicate_document",
        "empty_document",
        "misplaced_documents",
        "missing_parameter",
        "unsupported_parameter",
    }
    message = f"{param}: {fault['msg']}" if param else str(fault["msg"])
    return ApiError(400, message, kind if kind in named else "invalid_value", param)


def wire_documents(documents: list[DocumentParam] | None) -> tuple[WireDocument, ...]:
    """For the engine."""
    return tuple(WireDocument(d.id, d.text, d.title) for d in documents or ())


def check_documents(documents: list[DocumentParam], *, most: int, most_bytes: int) -> None:
    """Refuse more documents, or longer ones, than are allowed. Raises ``ApiException``."""
    if len(documents) > most:
        raise refused(f"{len(documents)} documents, and at most {most} are allowed.", "documents")
    for document in documents:
        size = len((document.text or "").encode())
        if size > most_bytes:
            raise refused(f"a document has {size} bytes, and at most {most_bytes} are allowed.", "documents")


def refused(message: str, param: str, code: str = "invalid_value") -> ApiException:
    """A 400 that names the parameter."""
    return ApiException(ApiError(400, message, code, param))
