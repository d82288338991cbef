"""``POST /v1/completions``: the prompt is continued as it stands, behind its documents, without a chat template."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, JsonValue, Tag

from serve.config import SamplingDefaults
from serve.fields import (
    AskBody,
    DocumentParam,
    Text,
    check_documents,
    one_or_many,
    only_off,
    refused,
    wire_documents,
)
from serve.replies import FinishReason, KVLinkOut, Usage, extension_of, sse, system_fingerprint, usage_of
from serve.settings import IngressSettings
from serve.wire import PROMPT_ROLE, EngineRequest, ModelCard, Piece, Report, WireLogprob, WireMessage

#: Not supported, and the values that ask for nothing. ``None`` always does.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "best_of": (1,),
    "echo": (False,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "n": (1,),
    "presence_penalty": (0,),
    "suffix": ("",),
}


class CompletionRequest(AskBody):
    """The body of ``POST /v1/completions``."""

    model_config = ConfigDict(json_schema_extra=only_off(NEUTRAL))

    NEUTRAL = NEUTRAL

    prompt: Annotated[
        Annotated[Text, Tag("(one)")] | Annotated[list[Text], Field(min_length=1, max_length=1), Tag("(many)")],
        Discriminator(
            one_or_many,
            custom_error_type="prompt_type",
            custom_error_message="must be a string, or a list of one string; token ids are not taken",
        ),
    ]
    documents: list[DocumentParam] | None = Field(default=None, description="Documents that stand before the prompt.")
    logprobs: int | None = Field(default=None, ge=0, le=5)

    # Refused unless off: see NEUTRAL.
    best_of: JsonValue = None
    echo: JsonValue = None
    suffix: JsonValue = None


def completion_request(
    body: CompletionRequest,
    *,
    request_id: str,
    limits: IngressSettings,
    defaults: SamplingDefaults,
    namespace: str,
    traceparent: str | None = None,
) -> EngineRequest:
    """What the engine is asked, defaults filled in.

    Raises:
        ApiException: more documents or tokens than allowed, or nothing to continue.
    """
    check_documents(body.documents or [], most=limits.max_documents, most_bytes=limits.max_document_bytes)
    prompt = body.prompt if isinstance(body.prompt, str) else body.prompt[0]
    if not prompt.strip():
        raise refused("the prompt has no text.", "prompt", "empty_question")
    return EngineRequest(
        request_id=request_id,
        messages=(WireMessage(PROMPT_ROLE, prompt),),
        documents=wire_documents(body.documents),
        linker=body.linker,
        sampling=body.sampling(limits, defaults),
        stream=bool(body.stream),
        namespace=namespace,
        logprobs=body.logprobs,
        traceparent=traceparent,
    )


class TextLogprobs(BaseModel):
    """Log probabilities in the older form: parallel lists, one entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """The one answer; ``n`` is always 1."""

    index: Literal[0] = 0
    text: str
    logprobs: TextLogprobs | None = None
    finish_reason: FinishReason | None


class TextCompletion(BaseModel):
    """Reply, and every chunk of a stream; there ``usage`` and ``kvlink`` stand on the last one."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage | None = None
    kvlink: KVLinkOut | None = None


class TextWriter:
    """Writes one completion: whole, or as the events of a stream."""

    def __init__(self, completion_id: str, created: int, card: ModelCard, *, include_usage: bool) -> None:
        self._fields: dict[str, Any] = {
            "id": completion_id,
            "object": "text_completion",
            "created": created,
            "model": card.id,
            "system_fingerprint": system_fingerprint(card),
        }
        self._include_usage = include_usage
        self._offset = 0

    def whole(self, answer: Piece) -> TextCompletion:
        """The reply without streaming."""
        assert answer.report is not None
        choice = TextChoice(
            text=answer.text, logprobs=self._logprobs(answer.logprobs), finish_reason=answer.finish_reason
        )
        return TextCompletion(
            **self._fields, choices=[choice], usage=usage_of(answer.report), kvlink=extension_of(answer.report)
        )

    def start(self) -> bytes:
        """Nothing: the first event has text."""
        return b""

    def content(self, text: str, logprobs: tuple[WireLogprob, ...] = ()) -> bytes:
        """A piece of the answer."""
        return self._event([TextChoice(text=text, logprobs=self._logprobs(logprobs), finish_reason=None)])

    def finish(self, reason: FinishReason, report: Report) -> bytes:
        """The chunk that ends the answer, then the one with the usage if it was asked for."""
        choices = [TextChoice(text="", finish_reason=reason)]
        if not self._include_usage:
            return self._event(choices, kvlink=extension_of(report))
        return self._event(choices) + self._event([], usage=usage_of(report), kvlink=extension_of(report))

    def _event(self, choices: list[TextChoice], usage: Usage | None = None, kvlink: KVLinkOut | None = None) -> bytes:
        chunk = TextCompletion.model_validate({**self._fields, "choices": choices})
        if self._include_usage:
            chunk.usage = usage
        if kvlink is not None:
            chunk.kvlink = kvlink
        return sse(chunk.model_dump_json(exclude_unset=True))

    def _logprobs(self, logprobs: tuple[WireLogprob, ...]) -> TextLogprobs | None:
        if not logprobs:
            return None
        offsets = []
        for each in logprobs:
            offsets.append(self._offset)
            self._offset += len(each.token)
        return TextLogprobs(
            tokens=[each.token for each in logprobs],
            token_logprobs=[each.logprob for each in logprobs],
            top_logprobs=[{top.token: top.logprob for top in each.top} for each in logprobs],
            text_offset=offsets,
        )
