"""What travels between the ingress and the engine replica: plain frozen values, and errors as data.

An exception that crosses Ray arrives wrapped, with its class rebuilt from a pickle; a field that says
``status: 404`` arrives as it was sent. So a replica never raises for a request: it answers ``Failed``.
Nothing here imports torch, so that the ingress stays light.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kvlink_core.errors import (
    DocumentLostError,
    InputError,
    KVLinkError,
    StoreUnavailableError,
    UnknownDocumentError,
)

ErrorType = Literal[
    "invalid_request_error", "authentication_error", "permission_error", "server_error", "overloaded_error"
]

#: Whose documents a service without keys serves.
DEFAULT_NAMESPACE = "default"

#: The role of a message that is the prompt itself, as ``kvlink_core.prompt`` has it (which brings torch).
PROMPT_ROLE = "prompt"

#: Text of every error whose cause is ours: the log has the details, the client the request id.
INTERNAL_MESSAGE = "the service failed to answer; the log holds the cause under this response's x-request-id."


@dataclass(frozen=True, slots=True)
class ApiError:
    """One error as OpenAI's clients expect it, with its HTTP status."""

    status: int
    message: str
    code: str
    param: str | None = None
    retry_after_s: float | None = None

    @property
    def type(self) -> ErrorType:
        """OpenAI's coarse class of the error."""
        if self.status in (429, 503):
            return "overloaded_error"
        if self.status == 401:
            return "authentication_error"
        if self.status == 403:
            return "permission_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    def body(self) -> dict[str, dict[str, str | None]]:
        """The JSON body: ``{"error": {"message", "type", "param", "code"}}``."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}


class ApiException(Exception):
    """Carries an ``ApiError`` to the place that writes the response. Never crosses a process."""

    def __init__(self, error: ApiError) -> None:
        super().__init__(error.message)
        self.error = error


def api_error(error: BaseException) -> ApiError:
    """The response for an exception: input errors in their own words, everything else without details.

    Store and model errors name paths, so their text stays in the log.
    """
    if isinstance(error, ApiException):
        return error.error
    if isinstance(error, InputError):
        status = 404 if isinstance(error, UnknownDocumentError) else 400
        return ApiError(status, str(error), error.code, error.param)
    if isinstance(error, StoreUnavailableError):
        return ApiError(503, "the document store does not answer; try again.", error.code, retry_after_s=5.0)
    if isinstance(error, DocumentLostError):
        return ApiError(500, str(error), error.code, error.param)
    if isinstance(error, KVLinkError):
        return ApiError(500, INTERNAL_MESSAGE, error.code)
    return ApiError(500, INTERNAL_MESSAGE, "internal_error")


@dataclass(frozen=True, slots=True)
class WireDocument:
    """A document by its id, its text, or both."""

    id: str | None
    text: str | None = None
    title: str | None = None


@dataclass(frozen=True, slots=True)
class WireMessage:
    """One turn of the conversation, with the documents that were added in it."""

    role: str
    content: str
    documents: tuple[WireDocument, ...] = ()


@dataclass(frozen=True, slots=True)
class WireSampling:
    """Sampling parameters, defaults already filled in."""

    temperature: float
    top_p: float
    top_k: int
    seed: int | None
    max_tokens: int
    stop: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class EngineRequest:
    """One validated request. Without ``stream`` the whole answer comes as one piece.

    Attributes:
        namespace: whose documents it may use; the caller's key says so, never the request.
        logprobs: report each token's log probability and those of this many most likely ones; ``None`` for neither.
        traceparent: W3C trace context of the caller, if it sent one.
    """

    request_id: str
    messages: tuple[WireMessage, ...]
    documents: tuple[WireDocument, ...]
    linker: str | None
    sampling: WireSampling
    stream: bool
    namespace: str = DEFAULT_NAMESPACE
    logprobs: int | None = None
    traceparent: str | None = None

    @property
    def document_names(self) -> tuple[str, ...]:
        """What tells its documents apart without tokenising them: ids, and texts where there is none."""
        added = (d for message in self.messages for d in message.documents)
        return tuple(d.id if d.id is not None else f"{d.title}\0{d.text}" for d in (*added, *self.documents))


@dataclass(frozen=True, slots=True)
class DocumentReport:
    """Where one document's cache came from; ``origin`` is ``None`` where no cache was used (linker ``full``).

    Reports stand in the order of the prompt.
    """

    id: str | None
    tokens: int
    origin: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """What a request cost, sent with its last event.

    Attributes:
        prompt_tokens: all tokens of the prompt, documents included.
        completion_tokens: tokens generated.
        cached_tokens: prompt tokens whose keys and values came from the store.
        computed_tokens: prompt tokens computed for this request.
        ttft_s: from the request's arrival at the engine to its first token, waiting included.
        phases_s: seconds spent in each phase before the first token.
    """

    linker: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    computed_tokens: int
    ttft_s: float
    phases_s: tuple[tuple[str, float], ...]
    documents: tuple[DocumentReport, ...]


@dataclass(frozen=True, slots=True)
class WireLogprob:
    """A token and the natural logarithm of its probability; ``bytes`` are its UTF-8, which may be part of a character.

    ``top`` has the most likely tokens at its place, the most likely first; theirs are empty.
    """

    token: str
    logprob: float
    bytes: tuple[int, ...]
    top: tuple[WireLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the answer; ``finish_reason`` and ``report`` are set on the last one.

    ``logprobs``: one entry for each token since the last piece, where the request asked for them.
    """

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    report: Report | None = None
    logprobs: tuple[WireLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class Failed:
    """The request failed; nothing follows."""

    error: ApiError


Event = Piece | Failed


@dataclass(frozen=True, slots=True)
class ModelCard:
    """What an engine replica serves. ``by_place``: caches are tied to a document's place in the prompt."""

    id: str
    created: int
    context_length: int
    fingerprint: str
    linkers: tuple[str, ...]
    default_linker: str
    by_place: bool = False


@dataclass(frozen=True, slots=True)
class NewDocument:
    """A document to be stored."""

    id: str
    text: str
    title: str | None = None


@dataclass(frozen=True, slots=True)
class StoredPart:
    """What was stored of a document: itself, one of its chunks, or its copy for a place of a prompt."""

    id: str
    tokens: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class DocumentEntry:
    """A stored document as its namespace sees it: all its parts together.

    Attributes:
        tokens, nbytes: of all parts; of a document tied to places, of its copy for the first of them.
        chunks: how many it was cut into; its id is then ``id#0`` and so on in a request.
        places: for how many places of a prompt it is stored; ``None`` where it fits any.
        created_at: seconds since 1970.
        tiers: where its caches are now, the fastest first; ``None`` where that is not known.
    """

    id: str
    tokens: int
    nbytes: int
    chunks: int
    places: int | None
    created_at: int
    tiers: tuple[str, ...] | None = None


@dataclass(frozen=True, slots=True)
class DocumentPage:
    """Documents sorted by id, and whether more follow."""

    documents: tuple[DocumentEntry, ...]
    has_more: bool


JobStatus = Literal["queued", "running", "done", "failed"]


@dataclass(frozen=True, slots=True)
class JobDocument:
    """How far one document of a job is; ``error`` says why it failed, ``parts`` what was stored."""

    id: str
    status: JobStatus
    parts: tuple[StoredPart, ...] = ()
    error: ApiError | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """Documents that are being stored. ``status`` is ``failed`` when one of them failed and none is left to do."""

    id: str
    status: JobStatus
    created_at: int
    finished_at: int | None
    documents: tuple[JobDocument, ...]
