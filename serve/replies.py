"""What the service sends back: completions, chunks of a stream, models, errors; also what OpenAPI shows."""

from __future__ import annotations

from dataclasses import asdict
from typing import Literal

from pydantic import BaseModel

from serve.wire import ErrorType, ModelCard, Report, WireLogprob

FinishReason = Literal["stop", "length"]


class PromptTokensDetails(BaseModel):
    """Part of the prompt that was not computed."""

    cached_tokens: int


class Usage(BaseModel):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class DocumentOut(BaseModel):
    """Where a document's cache came from; null where none was used (linker ``full``)."""

    id: str | None
    tokens: int
    origin: Literal["device", "host", "disk", "store", "encoded", "reencoded-corrupt"] | None


class KVLinkOut(BaseModel):
    """An extension to OpenAI's schema: how the prompt was put together and what it cost."""

    linker: str
    computed_tokens: int
    ttft_ms: float
    phases_ms: dict[str, float]
    documents: list[DocumentOut]


class TopLogprob(BaseModel):
    """One of the most likely tokens at a place."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    """A token of the answer, and the most likely ones at its place."""

    top_logprobs: list[TopLogprob]


class Logprobs(BaseModel):
    """Natural logarithms of probabilities, before temperature and cuts."""

    content: list[TokenLogprob]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The answer."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class Choice(BaseModel):
    """The one answer; ``n`` is always 1."""

    index: Literal[0] = 0
    message: AnswerMessage
    logprobs: Logprobs | None = None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    """Reply without streaming."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage
    kvlink: KVLinkOut


class Delta(BaseModel):
    """What a chunk adds."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """The one answer of a chunk."""

    index: Literal[0] = 0
    delta: Delta
    logprobs: Logprobs | None = None
    finish_reason: FinishReason | None = None


class ChatCompletionChunk(BaseModel):
    """One event of a stream. ``usage`` and ``kvlink`` stand on the last chunk before ``[DONE]``."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None
    kvlink: KVLinkOut | None = None


class ErrorDetail(BaseModel):
    """OpenAI's error object."""

    message: str
    type: ErrorType
    param: str | None
    code: str


class ErrorReply(BaseModel):
    """Every reply that is not a success."""

    error: ErrorDetail


class ModelOut(BaseModel):
    """A model that is served; what follows ``owned_by`` is an extension."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["kvlink"] = "kvlink"
    context_length: int
    linkers: list[str]
    default_linker: str
    fingerprint: str


class ModelList(BaseModel):
    """``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelOut]


class Health(BaseModel):
    """``GET /healthz``."""

    status: Literal["ok"] = "ok"
    model: str


def usage_of(report: Report) -> Usage:
    """Token counts of a finished request."""
    return Usage(
        prompt_tokens=report.prompt_tokens,
        completion_tokens=report.completion_tokens,
        total_tokens=report.prompt_tokens + report.completion_tokens,
        prompt_tokens_details=PromptTokensDetails(cached_tokens=report.cached_tokens),
    )


def extension_of(report: Report) -> KVLinkOut:
    """The ``kvlink`` field of a finished request."""
    return KVLinkOut(
        linker=report.linker,
        computed_tokens=report.computed_tokens,
        ttft_ms=_ms(report.ttft_s),
        phases_ms={name: _ms(seconds) for name, seconds in report.phases_s},
        documents=[DocumentOut.model_validate(asdict(d)) for d in report.documents],
    )


def logprobs_of(logprobs: tuple[WireLogprob, ...]) -> Logprobs | None:
    """As chat completions have them; ``None`` for none."""
    if not logprobs:
        return None
    return Logprobs(
        content=[
            TokenLogprob(
                token=each.token,
                logprob=each.logprob,
                bytes=list(each.bytes),
                top_logprobs=[TopLogprob(token=t.token, logprob=t.logprob, bytes=list(t.bytes)) for t in each.top],
            )
            for each in logprobs
        ]
    )


def model_of(card: ModelCard) -> ModelOut:
    """The card as ``/v1/models`` shows it."""
    return ModelOut(
        id=card.id,
        created=card.created,
        context_length=card.context_length,
        linkers=list(card.linkers),
        default_linker=card.default_linker,
        fingerprint=card.fingerprint,
    )


class ChunkWriter:
    """Writes the chunks of one stream as server-sent events."""

    def __init__(self, completion_id: str, created: int, card: ModelCard, *, include_usage: bool) -> None:
        self._fields = {
            "id": completion_id,
            "object": "chat.completion.chunk",
            "created": created,
            "model": card.id,
            "system_fingerprint": system_fingerprint(card),
        }
        self._include_usage = include_usage

    def start(self) -> bytes:
        """The first chunk: whose turn it is."""
        return self._event([ChunkChoice(index=0, delta=Delta(role="assistant", content=""), finish_reason=None)])

    def content(self, text: str, logprobs: tuple[WireLogprob, ...] = ()) -> bytes:
        """A piece of the answer."""
        choice = ChunkChoice(index=0, delta=Delta(content=text), finish_reason=None)
        if logprobs:
            choice.logprobs = logprobs_of(logprobs)
        return self._event([choice])

    def finish(self, reason: FinishReason, report: Report) -> bytes:
        """The chunk that ends the answer, then the one with the usage if it was asked for."""
        choices = [ChunkChoice(index=0, delta=Delta(), finish_reason=reason)]
        if not self._include_usage:
            return self._event(choices, kvlink=extension_of(report))
        return self._event(choices) + self._event([], usage=usage_of(report), kvlink=extension_of(report))

    def _event(self, choices: list[ChunkChoice], usage: Usage | None = None, kvlink: KVLinkOut | None = None) -> bytes:
        chunk = ChatCompletionChunk.model_validate({**self._fields, "choices": choices})
        if self._include_usage:
            chunk.usage = usage
        if kvlink is not None:
            chunk.kvlink = kvlink
        return sse(chunk.model_dump_json(exclude_unset=True))


def sse(data: str) -> bytes:
    """One server-sent event. JSON has no line breaks, so one ``data:`` line is enough."""
    return f"data: {data}\n\n".encode()


def system_fingerprint(card: ModelCard) -> str:
    """OpenAI's field for "same fingerprint, same behaviour"."""
    return f"fp_{card.fingerprint[:12]}"


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
