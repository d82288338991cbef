"""From messages and documents to segments of tokens, laid out as DESIGN section 3 says.

    prefix | mem_start | doc_1 | link_1 x k | ... | doc_n | link_n x k | mem_end | suffix

Where documents were added in several turns, each turn has its own ``mem_start | documents | mem_end``, and ``between``
stands what was said from one to the next. Places are counted over all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch

from kvlink_core.chat import ChatTemplate, Turn, chat_template_of
from kvlink_core.errors import (
    ChatTemplateError,
    ConfigError,
    EmptyDocumentError,
    EmptyQuestionError,
    InputError,
    MisplacedDocumentsError,
)
from kvlink_core.template import FIRST_WRAP_ID, DocumentTemplate, LinkTokens, WrapRows
from kvlink_core.text import is_unicode
from kvlink_core.tokens import GuardedTokenizer
from kvlink_core.types import Document, DocumentRef, Message

SegmentKind = Literal["prefix", "mem_start", "document", "link", "mem_end", "between", "suffix"]

#: Where a request's documents stand: at the end of the system turn, at the start of the last user turn, or in a turn
#: of their own before it, of the role ``DOCUMENTS_ROLE``.
DocumentsIn = Literal["system", "user", "turn"]

DOCUMENTS_ROLE = "documents"

#: The role of a message that is the prompt itself: no chat template is put around it. It must be the only one.
PROMPT_ROLE = "prompt"

D = TypeVar("D", bound=Document | DocumentRef)


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of the prompt. ``document`` is the document's place for documents and their links."""

    kind: SegmentKind
    token_ids: tuple[int, ...]
    start: int
    document: int | None = None

    @property
    def end(self) -> int:
        """First position after the segment."""
        return self.start + len(self.token_ids)


@dataclass(frozen=True, slots=True)
class Prompt:
    """Segments in order; positions are contiguous from 0 over all of them."""

    segments: tuple[Segment, ...]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.segments[-1].end

    @property
    def documents(self) -> tuple[Segment, ...]:
        """The document segments, in order."""
        return tuple(s for s in self.segments if s.kind == "document")

    def token_ids(self) -> torch.Tensor:
        """All token ids, int64 ``[length]``."""
        return torch.tensor([t for s in self.segments for t in s.token_ids], dtype=torch.int64)

    def unwrapped(self) -> Prompt:
        """The same prompt without the rows of a soft wrap."""
        return _laid_out((s.kind, [t for t in s.token_ids if t < FIRST_WRAP_ID], s.document) for s in self.segments)


@dataclass(frozen=True, slots=True)
class Frame:
    """A conversation without its documents.

    Attributes:
        pieces: token ids, cut where documents stand: one piece more than ``groups``.
        groups: how many documents stand at each cut.
    """

    pieces: tuple[Sequence[int], ...]
    groups: tuple[int, ...]


class PromptLayout:
    """How one model's prompts are laid out. Safe to use from several threads.

    Args:
        tokenizer: the model's fast Hugging Face tokenizer.
        chat_template: a Jinja template instead of the tokenizer's own.
        documents_in: where the documents of a request stand.
        template: how a document becomes text.
        mem_start, mem_end: token ids around the documents of a turn; may be empty.
        link_tokens: the trained link tokens, or ``None`` when the model has none.
        wrap: the rows of trained embeddings around every document, or ``None`` when the model has none.

    Raises:
        ChatTemplateError: the tokenizer has several chat templates, none of them the default.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat_template: str | None = None,
        documents_in: DocumentsIn = "user",
        template: DocumentTemplate | None = None,
        mem_start: tuple[int, ...] = (),
        mem_end: tuple[int, ...] = (),
        link_tokens: LinkTokens | None = None,
        wrap: WrapRows | None = None,
    ) -> None:
        self.template = template or DocumentTemplate()
        self.documents_in = documents_in
        self.mem_start = mem_start
        self.mem_end = mem_end
        self.link_tokens = link_tokens
        self.wrap = wrap
        self.end_id: int | None = tokenizer.eos_token_id
        source = chat_template or chat_template_of(tokenizer)
        links = link_tokens.ids if link_tokens else ()
        self._begin = _beginning(tokenizer)
        self._tokens = GuardedTokenizer(tokenizer, chat_template=source, control_ids=(*mem_start, *mem_end, *links))
        self._chat = ChatTemplate(tokenizer, source, self._tokens)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, control tokens left out; incomplete UTF-8 shows as U+FFFD."""
        return self._tokens.decode(token_ids)

    def decode_stream(self) -> Callable[[int], str | None]:
        """A decoder for one answer: called with each token, returns text once it is whole characters."""
        return self._tokens.decode_stream()

    def plain_tokens(self, text: str) -> list[int]:
        """Token ids of text from outside; control tokens in it stay text.

        Raises:
            InputError: the text is not Unicode (it has half of a surrogate pair).
        """
        return self._tokens.plain(text)

    def document_tokens(self, document: Document, place: int | None = None) -> list[int]:
        """Token ids of a rendered document, wrapped where the model wraps its documents.

        Args:
            document: the document.
            place: its place in the prompt, from 0; needed where ``template.by_place``.

        Raises:
            ConfigError: no place was given and the template names it.
            EmptyDocumentError: the text is empty or only white space, or comes to no token.
        """
        if place is None and self.template.by_place:
            raise ConfigError("this model's document template names the document's place; say which it is.")
        text = self.template.render(document, place or 0) if document.text.strip() else ""
        token_ids = self.plain_tokens(text)
        if not token_ids:
            raise EmptyDocumentError(
                f"document {document.id!r} has no text; leave it out or send its text.", param="documents"
            )
        return token_ids if self.wrap is None else self.wrap.around(token_ids)

    def check(self) -> None:
        """Try the chat template on one question with documents.

        Raises:
            ChatTemplateError: it is not Jinja, or cannot hold documents where ``documents_in`` puts them.
        """
        try:
            self.frame([Message("user", "?")], documents=1)
        except MisplacedDocumentsError as error:
            raise ChatTemplateError(str(error)) from error
        except InputError:
            pass  # a template that wants another conversation than this: each request will show

    def in_order(self, messages: Sequence[Message], documents: Sequence[D]) -> list[D | Document | DocumentRef]:
        """All documents as they stand in the prompt: those of the request (``documents``) and of each message."""
        added = [d for message in messages for d in message.documents]
        return [*documents, *added] if self.documents_in == "system" else [*added, *documents]

    def build(
        self, messages: Sequence[Message], documents: Sequence[Sequence[int]], *, links: LinkTokens | None
    ) -> Prompt:
        """Lay out a prompt: ``frame`` and ``assemble`` in one; documents of messages among ``documents``, in order."""
        added = sum(len(m.documents) for m in messages)
        return self.assemble(self.frame(messages, documents=len(documents) - added), documents, links=links)

    def frame(self, messages: Sequence[Message], *, documents: int) -> Frame:
        """Render and tokenise the conversation, all but the documents.

        Args:
            messages: the conversation; the last one is the question and must come from the user. Of the documents
                in it only the number counts. A message of the role ``PROMPT_ROLE`` alone is continued as it stands,
                behind what the tokenizer begins every text with and the documents.
            documents: how many documents the request has besides those of its messages.

        Raises:
            EmptyQuestionError: no message, or the last one has no text.
            MisplacedDocumentsError: documents in a turn that cannot hold them.
            InputError: an unknown role, or messages that the chat template refuses.
        """
        if not messages or not messages[-1].content.strip():
            raise EmptyQuestionError("the last message has no text; ask something.", param="messages")
        if len(messages) == 1 and messages[0].role == PROMPT_ROLE:
            return self._plain_frame(messages[0].content, documents + len(messages[0].documents))
        for index, message in enumerate(messages):
            if message.role not in ("system", "user", "assistant"):
                raise InputError(f"message {index} has the unknown role {message.role!r}.", param="messages")
            if not is_unicode(message.content):
                raise InputError("a message has half of a surrogate pair in it; send whole Unicode characters.")
            if message.documents and message.role != "user":
                raise MisplacedDocumentsError(
                    f"message {index} ({message.role}) has documents; attach them to a user's message, or to the "
                    "request.",
                    param="messages",
                )
        if messages[-1].role != "user":
            raise InputError("the last message must have the role 'user'.", param="messages")
        turns, groups = self._turns(messages, documents)
        return Frame(tuple(self._split(messages, turns)), groups)

    def _plain_frame(self, text: str, documents: int) -> Frame:
        tokens = self._tokens.plain(text)
        if documents:
            return Frame((self._begin, tokens), (documents,))
        return Frame(([*self._begin, *tokens],), ())

    def _turns(self, messages: Sequence[Message], documents: int) -> tuple[list[Turn], tuple[int, ...]]:
        """The turns to render, and how many documents each of those has that holds some."""
        counts = [len(m.documents) for m in messages]
        if documents and self.documents_in != "system":
            if counts[-1]:
                raise MisplacedDocumentsError(
                    "the request and its last message both have documents, for the same place; "
                    "send them all with one of the two.",
                    param="documents",
                )
            counts[-1] = documents
        turns = []
        for message, count in zip(messages, counts, strict=True):
            if count and self.documents_in == "turn":
                turns.append(Turn(DOCUMENTS_ROLE, "", "after"))
            in_turn = count and self.documents_in != "turn"
            turns.append(Turn(message.role, message.content, "before" if in_turn else ""))
        if documents and self.documents_in == "system":
            counts.insert(0, documents)
            system = turns.pop(0).content if turns[0].role == "system" else ""
            turns.insert(0, Turn("system", system, "after"))
        return turns, tuple(c for c in counts if c)

    def _split(self, messages: Sequence[Message], turns: Sequence[Turn]) -> list[list[int]]:
        try:
            return self._chat.split(turns)
        except MisplacedDocumentsError as error:
            reason = str(error)
        except InputError as error:
            if len(turns) == len(messages):
                raise
            # A turn was added to hold documents. Raises where it is not that turn which is refused.
            self._chat.split([Turn(m.role, m.content) for m in messages])
            reason = f"{str(error).rstrip('.')} with a turn that holds documents"
        raise MisplacedDocumentsError(
            f"{reason}; attach documents to another user turn, or change documents_in or chat_template in the model's "
            f"kvlink.json (documents_in is {self.documents_in!r}).",
            param="messages",
        )

    def assemble(self, frame: Frame, documents: Sequence[Sequence[int]], *, links: LinkTokens | None) -> Prompt:
        """Put documents into a frame.

        Args:
            frame: made for as many documents.
            documents: token ids of each document, in the order of ``in_order``.
            links: the link tokens to put after each document, or ``None`` for none.

        Raises:
            TooManyDocumentsError: more documents than the model has link tokens for.
        """
        assert sum(frame.groups) == len(documents), "a frame for other documents"
        runs: list[tuple[SegmentKind, Sequence[int], int | None]] = []
        first = 0
        for count, piece in zip(frame.groups, frame.pieces, strict=False):
            runs += [("between" if first else "prefix", piece, None), ("mem_start", self.mem_start, None)]
            for place in range(first, first + count):
                assert documents[place], "empty documents are refused before"
                runs.append(("document", documents[place], place))
                if links is not None:
                    runs.append(("link", links.after(place), place))
            first += count
            runs.append(("mem_end", self.mem_end, None))
        runs.append(("suffix", frame.pieces[-1], None))
        return _laid_out(runs)


def _beginning(tokenizer: Any) -> list[int]:
    """What a tokenizer puts before every text, if anything: for most models the token that begins one."""
    with_special = list(tokenizer("a").input_ids)
    plain = list(tokenizer("a", add_special_tokens=False).input_ids)
    for at in range(len(with_special) - len(plain) + 1):
        if with_special[at : at + len(plain)] == plain:
            return with_special[:at]
    return []


def _laid_out(runs: Iterable[tuple[SegmentKind, Sequence[int], int | None]]) -> Prompt:
    """Kind, token ids and document of each segment, one after the other; empty ones are left out."""
    segments, at = [], 0
    for kind, token_ids, document in runs:
        if token_ids:
            segments.append(Segment(kind, tuple(token_ids), at, document))
            at += len(token_ids)
    return Prompt(tuple(segments))
