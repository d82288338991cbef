"""A conversation cut at the places of its documents, by rendering the model's chat template.

The template is rendered with a mark where documents go, and the rendered text is cut there: nobody guesses at its
strings. The mark holds letters of both cases, quotes, spaces and a line end, so that a template that would change
documents changes the mark; and a second rendering with other, longer marks must be the same around them, so that one
that looks at documents is noticed too. Both are refused. What the template makes of a text from outside (trimmed, its
thinking dropped) is what the prompt has, as plain text.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jinja2

from kvlink_core.errors import ChatTemplateError, InputError, MisplacedDocumentsError
from kvlink_core.tokens import GuardedTokenizer

#: For models that bring no chat template of their own (base models).
PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token or '' }}{% for m in messages %}{{ m['role'] | capitalize }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

#: What a template may do to documents shows on these.
_PROBES = ("aZ é  \n\"'\\<&>", 400 * "A longer text. ")

# What the operators and filters of a template raise on values that it was not made for.
_TEMPLATE_ERRORS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError)


def chat_template_of(tokenizer: Any) -> str:
    """The chat template that a Hugging Face tokenizer uses by default, or ``PLAIN_CHAT_TEMPLATE``.

    Raises:
        ChatTemplateError: it has several, and none is the default.
    """
    template = tokenizer.chat_template
    if isinstance(template, dict):
        if "default" not in template:
            raise ChatTemplateError(
                f"the tokenizer has the chat templates {', '.join(sorted(template))} and none named 'default'; "
                "set chat_template in the model's kvlink.json."
            )
        template = template["default"]
    return str(template or PLAIN_CHAT_TEMPLATE)


@dataclass(frozen=True, slots=True)
class Turn:
    """One turn to render. ``documents``: whether documents stand in it, and on which side of its content."""

    role: str
    content: str
    documents: Literal["", "before", "after"] = ""

    def text(self, content: str, mark: str) -> str:
        """``content`` with ``mark`` on its side."""
        if self.documents == "before":
            return mark + content
        return content + mark if self.documents else content


class ChatTemplate:
    """Renders and cuts conversations. Safe to use from several threads.

    Args:
        tokenizer: the Hugging Face tokenizer, which renders.
        source: the template.
        tokens: the same tokenizer, guarded.
    """

    def __init__(self, tokenizer: Any, source: str, tokens: GuardedTokenizer) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._tokens = tokens
        # Of odd digits and of even ones: no part of one is a part of the other.
        self._ends = tuple("".join(secrets.choice(digits) for _ in range(32)) for digits in ("13579", "24680"))

    def split(self, turns: Sequence[Turn]) -> list[list[int]]:
        """Token ids of the rendered conversation, cut where documents stand: one list more than such turns.

        Raises:
            MisplacedDocumentsError: the template drops, repeats, moves or changes a mark.
            InputError: the template refuses the turns, or rewrites a text beyond recognition that spells a control
                token.
            ChatTemplateError: the template is not Jinja.
        """
        contents = [turn.content for turn in turns]
        shown = [self._tokens.hide(content) for content in contents]
        rendered = self._render(turns, shown)
        made: dict[int, str] = {}
        if shown != contents:
            meant = self._render(turns, contents)
            if self._tokens.restore(rendered) != meant:
                made = self._settle(turns, shown)
                shown = [self._tokens.opaque(i) if i in made else text for i, text in enumerate(shown)]
                rendered = self._render(turns, shown)
                if self._tokens.restore(rendered, made) != meant:
                    raise self._unreadable(turns)
        roles = [turn.role for turn in turns if turn.documents]
        if roles:
            rendered = self._cut(rendered, roles, 0)
            if self._cut(self._render(turns, shown, 1), roles, 1) != rendered:
                raise _misplaced("changes", roles[0])
        return self._tokens.pieces(self._tokens.restore(self._tokens.guard(rendered), made))

    def _render(self, turns: Sequence[Turn], contents: Sequence[str], series: int = 0) -> str:
        messages, marks = [], 0
        for turn, content in zip(turns, contents, strict=True):
            messages.append({"role": turn.role, "content": turn.text(content, self._mark(marks, series)[0])})
            marks += bool(turn.documents)
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, chat_template=self._source, tokenize=False, add_generation_prompt=True
                )
            )
        except jinja2.TemplateSyntaxError as error:
            raise ChatTemplateError(f"the model's chat template cannot be read: {error}") from error
        except _TEMPLATE_ERRORS as error:
            raise InputError(f"the model's chat template refuses these messages: {error}", param="messages") from error

    def _mark(self, index: int, series: int) -> tuple[str, str]:
        """The mark at the ``index``-th place of documents, and its ends.

        Those of series 0 and 1 differ in digits, text and length.
        """
        end = f"{self._ends[series]}{index:06d}"
        return f"{end}{_PROBES[series]}{end}", end

    def _cut(self, rendered: str, roles: Sequence[str], series: int) -> str:
        """``rendered`` with every mark replaced by a cut, checked to stand once, whole and in order."""
        after = 0
        for index, role in enumerate(roles):
            mark, end = self._mark(index, series)
            whole, traces, at = rendered.count(mark), rendered.count(end), rendered.find(mark)
            if not traces:
                raise _misplaced("drops", role)
            if traces != 2 * whole:
                raise _misplaced("changes", role)
            if whole > 1:
                raise _misplaced("repeats", role)
            if at < after:
                raise _misplaced("moves", role)
            rendered = rendered.replace(mark, self._tokens.cut)
            after = at
        return rendered

    def _settle(self, turns: Sequence[Turn], shown: Sequence[str]) -> dict[int, str]:
        """For a template that looks at the letters that were hidden from it: what it makes of each such text."""
        made: dict[int, str] = {}
        base = self._tokens.restore(self._render(turns, shown))
        for index, turn in enumerate(turns):
            if shown[index] == turn.content:
                continue
            seen = self._tokens.restore(self._render(turns, [*shown[:index], turn.content, *shown[index + 1 :]]))
            if seen == base:
                continue
            stand_in = self._tokens.opaque(index)
            around = self._render(turns, [*shown[:index], stand_in, *shown[index + 1 :]])
            text = _between(seen, self._tokens.restore(around).split(stand_in))
            if text is None:
                raise self._unreadable([turn])
            made[index] = text
        return made

    def _unreadable(self, turns: Sequence[Turn]) -> InputError:
        control = self._tokens.spelled_in("".join(turn.content for turn in turns))
        return InputError(
            "the model's chat template reads the messages and gives what one of them says a meaning of its own"
            f"{f' (perhaps {control!r})' if control else ''}; leave it out.",
            param="messages",
        )


def _misplaced(fault: str, role: str) -> MisplacedDocumentsError:
    return MisplacedDocumentsError(
        f"the model's chat template {fault} the text of the {role!r} turn that documents stand in", param="messages"
    )


def _between(text: str, pieces: Sequence[str]) -> str | None:
    """The string that joins ``pieces`` to ``text``; "" where there is but one piece, which is ``text``."""
    joints = len(pieces) - 1
    if not joints:
        return "" if text == pieces[0] else None
    start, length = len(pieces[0]), len(text) - sum(map(len, pieces))
    joint = text[start : start + length // joints] if length >= 0 else ""
    return joint if joint.join(pieces) == text else None
