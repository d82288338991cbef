"""Between what travels (``wire``) and what the core takes: requests, documents, log probabilities."""

from __future__ import annotations

from dataclasses import asdict

from kvlink_core.engine import SamplingParams, TokenLogprobs
from kvlink_core.prompt import PromptLayout
from kvlink_core.session import AnswerRequest
from kvlink_core.types import Document, DocumentRef, Message, check_document_id
from serve.wire import EngineRequest, WireDocument, WireLogprob


def core_request(request: EngineRequest, linker: str | None) -> AnswerRequest:
    """A request for a session; ``linker`` for one that names none. Raises ``InputError``."""
    return AnswerRequest(
        messages=[Message(m.role, m.content, [_core_document(d) for d in m.documents]) for m in request.messages],
        documents=[_core_document(d) for d in request.documents],
        linker=request.linker or linker,
        sampling=SamplingParams(**asdict(request.sampling), logprobs=request.logprobs),
    )


def _core_document(document: WireDocument) -> Document | DocumentRef:
    if document.id is not None:
        check_document_id(document.id)
    if document.text is None:
        assert document.id is not None, "the schema asks for an id or a text"
        return DocumentRef(document.id)
    return Document(document.id or "", document.text, document.title)


def wire_logprob(layout: PromptLayout, found: TokenLogprobs) -> WireLogprob:
    """Token ids as the text that each is alone; part of a character shows as U+FFFD."""

    def named(token_id: int, logprob: float, top: tuple[WireLogprob, ...] = ()) -> WireLogprob:
        text = layout.decode([token_id])
        return WireLogprob(text, logprob, tuple(text.encode()), top)

    return named(found.token_id, found.logprob, tuple(named(token_id, value) for token_id, value in found.top))
