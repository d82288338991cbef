"""From messages and documents to segments of tokens, laid out as DESIGN section 3 says.

    prefix | mem_start | doc_1 | link_1 x k | ... | doc_n | link_n x k | mem_end | suffix

The chat template is rendered once with a marker where the documents go; what stands before the marker is the
prefix, what stands after it the suffix. Nobody guesses at the strings of a template. Text that comes from outside
(documents, messages) can never become a control token: it is tokenised with those switched off.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from kvlink_core.errors import EmptyDocumentError, EmptyQuestionError, InputError, ModelError
from kvlink_core.template import DocumentTemplate, LinkTokens
from kvlink_core.text import is_unicode
from kvlink_core.types import Document, Message

#: For models that bring no chat template of their own (base models).
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

SegmentKind = Literal["prefix", "mem_start", "document", "link", "mem_end", "suffix"]


@dataclass(frozen=True, slots=True)
class Segment:
    """A run of tokens of the prompt. ``document`` is the document's index for documents and their links."""

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


@dataclass(frozen=True, slots=True)
class Frame:
    """Token ids of a conversation before and after the place of its documents."""

    prefix: Sequence[int]
    suffix: Sequence[int]


class PromptLayout:
    """How one model's prompts are laid out.

    Args:
        tokenizer: the model's fast Hugging Face tokenizer; brings the chat template.
        documents_in: whether documents stand at the end of the system turn or at the start of the last user turn.
        template: how a document becomes text.
        mem_start, mem_end: token ids around all documents; may be empty.
        link_tokens: the trained link tokens, or ``None`` when the model has none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        documents_in: Literal["system", "user"] = "user",
        template: DocumentTemplate | None = None,
        mem_start: tuple[int, ...] = (),
        mem_end: tuple[int, ...] = (),
        link_tokens: LinkTokens | None = None,
    ) -> None:
        self.template = template or DocumentTemplate()
        self.documents_in = documents_in
        self.mem_start = mem_start
        self.mem_end = mem_end
        self.link_tokens = link_tokens
        self._chat = tokenizer
        self.end_id: int | None = tokenizer.eos_token_id
        self._chat_template = str(tokenizer.chat_template or PLAIN_CHAT_TEMPLATE)
        # Two tokenizers of our own: one that reads control tokens as plain text, one that knows them. Setting the
        # switch on a shared one around each call would be a race between threads.
        definition = json.loads(tokenizer.backend_tokenizer.to_str())
        self._knowing = Tokenizer.from_str(json.dumps(definition))
        links = link_tokens.ids if link_tokens else ()
        # Not every control token is marked special: "<think>" of some chat templates is an ordinary added token.
        control = [
            token
            for token in definition["added_tokens"]
            if token["special"]
            or token["content"] in self._chat_template
            or token["id"] in (*mem_start, *mem_end, *links)
        ]
        for token in control:
            token["special"] = True
        self._control = tuple(token["content"] for token in control)
        self._plain = Tokenizer.from_str(json.dumps(definition))
        self._plain.encode_special_tokens = True
        for each in (self._knowing, self._plain):
            each.no_truncation()
            each.no_padding()

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated tokens, control tokens left out; incomplete UTF-8 shows as U+FFFD."""
        return str(self._knowing.decode(list(token_ids), skip_special_tokens=True))

    def decode_stream(self) -> Callable[[int], str | None]:
        """A decoder for one answer: called with each token, returns text once it is whole characters."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._knowing, token_id)

    def plain_tokens(self, text: str) -> list[int]:
        """Token ids of text from outside; control tokens in it stay text.

        Raises:
            InputError: the text is not Unicode (it has half of a surrogate pair).
        """
        if not is_unicode(text):
            raise InputError("a text has half of a surrogate pair in it; send whole Unicode characters.")
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def document_tokens(self, document: Document) -> list[int]:
        """Token ids of a rendered document.

        Raises:
            EmptyDocumentError: the text is empty or only white space.
        """
        if not document.text.strip():
            raise EmptyDocumentError(
                f"document {document.id!r} has no text; leave it out or send its text.", param="documents"
            )
        return self.plain_tokens(self.template.render(document))

    def build(
        self, messages: Sequence[Message], documents: Sequence[Sequence[int]], *, links: LinkTokens | None
    ) -> Prompt:
        """Lay out a prompt: ``frame`` and ``assemble`` in one."""
        return self.assemble(self.frame(messages, with_documents=bool(documents)), documents, links=links)

    def frame(self, messages: Sequence[Message], *, with_documents: bool) -> Frame:
        """Render and tokenise the conversation, all but the documents.

        Args:
            messages: the conversation; the last one is the question and must come from the user.
            with_documents: whether there will be documents.

        Raises:
            EmptyQuestionError: no message, or the last one has no text.
            InputError: roles that the chat template refuses.
        """
        if not messages or not messages[-1].content.strip():
            raise EmptyQuestionError("the last message has no text; ask something.", param="messages")
        if not all(is_unicode(m.content) for m in messages):
            raise InputError("a message has half of a surrogate pair in it; send whole Unicode characters.")
        if messages[-1].role != "user":
            raise InputError("the last message must have the role 'user'.", param="messages")
        return Frame(*self._surroundings(messages, with_documents=with_documents))

    def assemble(self, frame: Frame, documents: Sequence[Sequence[int]], *, links: LinkTokens | None) -> Prompt:
        """Put documents into a frame.

        Args:
            frame: made with ``with_documents`` exactly when there are documents.
            documents: token ids of each document, in order; may be empty.
            links: the link tokens to put after each document, or ``None`` for none.

        Raises:
            InputError: more documents than the model has link tokens for.
        """
        runs: list[tuple[SegmentKind, Sequence[int], int | None]] = [("prefix", frame.prefix, None)]
        if documents:
            runs.append(("mem_start", self.mem_start, None))
            for i, token_ids in enumerate(documents):
                assert token_ids, "empty documents are refused before"
                runs.append(("document", token_ids, i))
                if links is not None:
                    runs.append(("link", links.after(i), i))
            runs.append(("mem_end", self.mem_end, None))
        runs.append(("suffix", frame.suffix, None))
        segments, at = [], 0
        for kind, token_ids, document in runs:
            if token_ids:
                segments.append(Segment(kind, tuple(token_ids), at, document))
                at += len(token_ids)
        return Prompt(tuple(segments))

    def _surroundings(self, messages: Sequence[Message], *, with_documents: bool) -> tuple[list[int], list[int]]:
        """Token ids before and after the place of the documents."""
        marker = f"\u2063{uuid.uuid4().hex}\u2063"
        turns = [{"role": m.role, "content": m.content} for m in messages]
        # Content that spells a control token is cut out, and put back as plain text after tokenising the rest.
        held: dict[str, str] = {}
        for turn in turns:
            if any(control in turn["content"] for control in self._control):
                stand_in = f"\u2063{uuid.uuid4().hex}\u2063"
                held[stand_in] = turn["content"]
                turn["content"] = stand_in
        if with_documents and self.documents_in == "user":
            turns[-1]["content"] = marker + turns[-1]["content"]
        elif with_documents:
            if turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": ""})
            turns[0]["content"] += marker
        rendered = self._render(turns)
        if not with_documents:
            return [], self._mixed_tokens(rendered, held)
        before, found, after = rendered.partition(marker)
        if not found or marker in after:
            raise ModelError(
                "the model's chat template drops or repeats the turn that holds the documents; "
                f"set documents_in in its kvlink.json (now {self.documents_in!r})."
            )
        return self._mixed_tokens(before, held), self._mixed_tokens(after, held)

    def _render(self, turns: list[dict[str, str]]) -> str:
        try:
            return str(
                self._chat.apply_chat_template(
                    turns, chat_template=self._chat_template, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateError as error:
            raise InputError(f"the model's chat template refuses these messages: {error}", param="messages") from error

    def _mixed_tokens(self, rendered: str, held: dict[str, str]) -> list[int]:
        """Tokenise a rendered template, with held-back contents as plain text in their places."""
        for stand_in, content in held.items():
            before, found, after = rendered.partition(stand_in)
            if found:
                return [
                    *self._mixed_tokens(before, held),
                    *self.plain_tokens(content),
                    *self._mixed_tokens(after, held),
                ]
        return list(self._knowing.encode(rendered, add_special_tokens=False).ids)
