"""Lines of JSONL files as laid-out examples: the prompt that serving would make, and the answer after it."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from kvlink_core.errors import ConfigError, InputError
from kvlink_core.prompt import Frame, Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.training.recipes.config import Source
from kvlink_core.types import Document, Message

#: Writes the answer that a line lacks: the token ids of a prompt -> the token ids of the answer.
WriteAnswer = Callable[[Sequence[int]], list[int]]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt with its answer.

    Attributes:
        token_ids: of both; ids from ``FIRST_WRAP_ID`` on are rows of the wrap.
        documents: for each token the number of its document, from 1, outside which it sees nothing; 0 for a token that
            sees all before it.
        target: index of the answer's first token.
    """

    token_ids: tuple[int, ...]
    documents: tuple[int, ...]
    target: int

    @staticmethod
    def of(prompt: Prompt, answer: Sequence[int], *, apart: bool) -> Example:
        """Lay the answer behind the prompt; ``apart``: documents see themselves only (DESIGN section 3)."""
        documents = [
            (s.document or 0) + 1 if apart and s.kind == "document" else 0 for s in prompt.segments for _ in s.token_ids
        ]
        token_ids = [t for s in prompt.segments for t in s.token_ids]
        return Example((*token_ids, *answer), (*documents, *([0] * len(answer))), len(token_ids))


@dataclass(frozen=True, slots=True)
class Pair:
    """What is trained on, and for a wrap the same without it under full attention: the teacher's example."""

    example: Example
    teacher: Example | None = None

    @property
    def tokens(self) -> int:
        """Room that it takes in a row."""
        return len(self.example.token_ids)


class Reader:
    """The lines of one source, laid out on demand.

    Args:
        source: the file and its kind.
        layout: of the model that is trained.
        links: link tokens after each document where ``source.attention`` is ``segments``; ``None`` for none.
        max_tokens: examples that are longer are left out.
        bos: token ids that a text without conversation begins with.
        write_answer: makes missing answers; ``None`` where they must be there.

    Raises:
        ConfigError: no such file, or it is empty.
    """

    def __init__(
        self,
        source: Source,
        layout: PromptLayout,
        links: LinkTokens | None,
        max_tokens: int,
        bos: Sequence[int],
        write_answer: WriteAnswer | None,
    ) -> None:
        self.source, self._layout, self._max = source, layout, max_tokens
        self._links = links if source.attention == "segments" else None
        self._bos, self._write_answer = list(bos), write_answer
        try:
            self._lines = [line for line in source.path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the source {str(source.path)!r}: {error}.") from error
        if not self._lines:
            raise ConfigError(f"the source {str(source.path)!r} has no lines.")

    def __len__(self) -> int:
        return len(self._lines)

    def pair(self, index: int) -> Pair | None:
        """The example of a line; ``None`` if it is longer than a row, or a text too short to cut.

        Raises:
            ConfigError: the line is not what its kind wants.
        """
        where = f"{self.source.path.name}, line {index + 1}"
        try:
            keys = json.loads(self._lines[index])
        except ValueError as error:
            raise ConfigError(f"{where}: not JSON ({error}).") from error
        if not isinstance(keys, dict):
            raise ConfigError(f"{where}: not a JSON object.")
        try:
            laid = self._text(keys) if self.source.kind == "text" else self._asked(keys)
        except (InputError, _BadLine) as error:
            raise ConfigError(f"{where}: {error}") from error
        if laid is None or laid.tokens > self._max:
            return None
        return laid

    def _asked(self, keys: dict[str, Any]) -> Pair:
        kind = self.source.kind
        messages, answer = _conversation(keys, kind, self.source.instruction)
        documents: list[list[int]] = []
        if kind == "summary" and "text" in keys:
            body = self._layout.plain_tokens(_string(keys, "text"))
            step = self.source.segment_tokens
            documents = [self._wrapped(body[i : i + step]) for i in range(0, len(body), step)]
        elif kind != "instruct":
            documents = [self._layout.document_tokens(d, i) for i, d in enumerate(_documents(keys))]
        if kind != "instruct" and not documents:
            raise _BadLine("no documents.")
        return self._pair(self._layout.frame(messages, documents=len(documents)), documents, answer)

    def _pair(self, frame: Frame, documents: Sequence[Sequence[int]], answer: str | list[int] | None) -> Pair:
        layout = self._layout
        segments = self.source.attention == "segments"
        prompt = layout.assemble(frame, documents, links=self._links if documents else None)
        plain = prompt.unwrapped() if layout.wrap is not None else prompt
        if answer is None:
            if self._write_answer is None:
                raise _BadLine("no answer; only soft wraps learn without.")
            answer = self._write_answer(plain.token_ids().tolist())
        elif isinstance(answer, str):
            answer = layout.plain_tokens(answer) + ([layout.end_id] if layout.end_id is not None else [])
        if not answer:
            raise _BadLine("the answer is empty.")
        example = Example.of(prompt, answer, apart=segments)
        if layout.wrap is None:
            return Pair(example)
        return Pair(example, Example.of(plain, answer, apart=False))

    def _text(self, keys: dict[str, Any]) -> Pair | None:
        """As many whole segments as leave room for their continuation, which is the target."""
        ids, layout, step = self._layout.plain_tokens(_string(keys, "text")), self._layout, self.source.segment_tokens
        around = len(layout.mem_start) + len(layout.mem_end) + len(self._bos)
        each = step + (self._links.k if self._links else 0)
        each += layout.wrap.header + layout.wrap.trailer if layout.wrap else 0
        fit = (self._max - around - self.source.target_tokens) // each
        if self._links is not None and self._links.per_place:
            fit = min(fit, len(self._links.ids) // self._links.k)
        count = min(fit, (len(ids) - 1) // step)
        if count < 1:
            return None
        documents = [self._wrapped(ids[i * step : (i + 1) * step]) for i in range(count)]
        target = ids[count * step : count * step + self.source.target_tokens]
        return self._pair(Frame((self._bos, ()), (count,)), documents, target)

    def _wrapped(self, ids: list[int]) -> list[int]:
        return ids if self._layout.wrap is None else self._layout.wrap.around(ids)


class _BadLine(Exception):
    """What is wrong with a line."""


def _string(keys: dict[str, Any], key: str) -> str:
    value = keys.get(key)
    if not isinstance(value, str) or not value.strip():
        raise _BadLine(f"{key!r} must be text.")
    return value


def _conversation(keys: dict[str, Any], kind: str, instruction: str) -> tuple[list[Message], str | None]:
    if kind == "summary":
        return [Message("user", instruction)], _string(keys, "summary") if "summary" in keys else None
    if "messages" not in keys:
        if kind == "instruct":
            raise _BadLine("'messages' must be there.")
        return [Message("user", _string(keys, "question"))], _string(keys, "answer") if "answer" in keys else None
    messages = keys["messages"]
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages) or not messages:
        raise _BadLine("'messages' must be a list of objects with role and content.")
    turns = [Message(_string(m, "role"), _string(m, "content")) for m in messages]
    answer = _string(keys, "answer") if "answer" in keys else None
    if turns[-1].role == "assistant":
        answer = turns.pop().content
    return turns, answer


def _documents(keys: dict[str, Any]) -> list[Document]:
    given = keys.get("documents", [])
    if not isinstance(given, list):
        raise _BadLine("'documents' must be a list.")
    out = []
    for number, entry in enumerate(given):
        if isinstance(entry, str):
            entry = {"text": entry}
        if not isinstance(entry, dict):
            raise _BadLine("a document is text, or an object with text and title.")
        title = _string(entry, "title") if entry.get("title") else None
        out.append(Document(str(number), _string(entry, "text"), title))
    return out
