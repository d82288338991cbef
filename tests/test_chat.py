"""Chat templates of many structures: cut where documents stand, refused where that cannot be done, never cut wrong.

What a prompt must say is asked of the tokenizer's own ``apply_chat_template``, the documents written into the turn.
"""

from __future__ import annotations

from collections.abc import Callable

import chat_templates as t
import pytest
from chat_templates import LONG, SHORT, SYSTEM, TEXTS, build, rendered

from kvlink_core.chat import chat_template_of
from kvlink_core.errors import ChatTemplateError, InputError, MisplacedDocumentsError
from kvlink_core.prompt import PromptLayout
from kvlink_core.types import Document, Message

SPLIT = [
    (name, at, turns)
    for name, places in {
        "HEADERS": "user system",
        "CHATML": "user system",
        "INSTRUCTIONS": "user system",
        "INSTRUCTIONS_LAST": "user system",
        "NO_SYSTEM": "user",
        "LOOSE": "user system",
        "NO_GENERATION_PROMPT": "user system",
        "BARE": "user system",
        "THINKING": "user system",
        "SWITCH": "user system",
        "FORGETFUL": "user system",
        "INSISTENT": "user",
        "BACKWARD": "user system",
        "DOCUMENTS_TURN": "user system turn",
    }.items()
    for at in places.split()
    for turns in (SHORT, LONG, [SYSTEM, *SHORT], [SYSTEM, *LONG])
    if name != "NO_SYSTEM" or turns[0] != SYSTEM
]


@pytest.mark.parametrize(("name", "at", "turns"), SPLIT, ids=lambda value: str(value)[:20])
def test_the_prompt_is_what_the_template_renders(name: str, at: str, turns: list[tuple[str, str]]) -> None:
    prompt, tokenizer = build(getattr(t, name), turns, at)
    expected = rendered(tokenizer, turns, at)
    # One token a byte, so that nothing merges across a border: all tokens must be those of the rendered text.
    assert prompt.token_ids().tolist() == tokenizer(expected, add_special_tokens=False)["input_ids"]
    assert [tokenizer.decode(s.token_ids) for s in prompt.documents] == [f"* {text};" for text in TEXTS]


@pytest.mark.parametrize(
    ("name", "at", "fault"),
    [
        *[(n, at, "changes") for n in ("JSON", "JSON_CONTENT", "UPPER", "LOWER", "HTML", "ONE_LINE", "INDENTED")
          for at in ("user", "system")],
        ("TITLED", "user", "changes"),
        ("CURIOUS", "system", "changes"),
        ("NO_SYSTEM", "system", "refuses.*System role not supported.*with a turn that holds documents"),
        ("CHATML", "turn", ""),
        ("INSTRUCTIONS", "turn", "refuses.*must take turns"),
        ("LOOSE", "turn", ""),
        ("SWITCH", "turn", ""),
    ],
)  # fmt: skip
def test_templates_that_would_change_documents_are_refused_when_loading(name: str, at: str, fault: str) -> None:
    layout = PromptLayout(t.with_template(getattr(t, name)), documents_in=at)  # type: ignore[arg-type]  # a parameter
    if not fault:
        return layout.check()
    with pytest.raises(ChatTemplateError, match=rf"(?s){fault}.*documents_in.*kvlink\.json \(documents_in is '{at}'"):
        layout.check()
    with pytest.raises(MisplacedDocumentsError, match="attach documents to another user turn"):
        build(getattr(t, name), SHORT, at)
    return None


def test_a_template_that_says_the_system_text_again_is_refused_when_it_does() -> None:
    with pytest.raises(MisplacedDocumentsError, match="repeats the text of the 'system' turn"):
        build(t.INSISTENT, LONG, "system")
    build(t.INSISTENT, SHORT, "system")


def test_documents_in_turns_that_the_template_drops_or_moves_are_refused() -> None:
    tokenizer = t.with_template(t.FORGETFUL)
    document = Document("", "One")
    former = [Message("user", "Hi", [document]), Message("assistant", "Hello"), Message("user", "What?")]
    with pytest.raises(MisplacedDocumentsError, match="drops the text of the 'user' turn"):
        PromptLayout(tokenizer).frame(former, documents=0)
    moved = PromptLayout(t.with_template(t.BACKWARD))
    with pytest.raises(MisplacedDocumentsError, match="moves the text"):
        moved.frame([*former[:2], Message("user", "What?", [document])], documents=0)


@pytest.mark.parametrize("conversation", [[("assistant", "Hi"), *SHORT], [*SHORT, *SHORT]])
def test_messages_that_the_template_refuses_are_refused_in_its_words(conversation: list[tuple[str, str]]) -> None:
    layout = PromptLayout(t.with_template(t.INSTRUCTIONS), documents_in="system")
    for documents in (0, 1):
        with pytest.raises(InputError, match="refuses these messages: user and assistant must take turns") as caught:
            layout.frame([Message(*turn) for turn in conversation], documents=documents)
        assert caught.type is InputError


@pytest.mark.parametrize(
    ("template", "error", "says"),
    [
        ("{% for m in messages %}", ChatTemplateError, "cannot be read"),
        ("{{ messages[0].content[0].text }}", ChatTemplateError, "drops"),
        ("{{ messages[7].content }}", InputError, "refuses these messages"),
        ("{{ messages[0].content + 1 }}", InputError, "refuses these messages"),
        ("{{ 1 // 0 }}", InputError, "refuses these messages"),
    ],
)
def test_broken_templates_are_named(template: str, error: type[Exception], says: str) -> None:
    layout = PromptLayout(t.with_template(template))
    act: Callable[[], object] = layout.check
    if error is InputError:
        layout.check()
        act = lambda: layout.frame([Message("user", "?")], documents=0)  # noqa: E731
    with pytest.raises(error, match=says):
        act()


def test_of_several_chat_templates_the_default_counts() -> None:
    tokenizer = t.with_template(t.CHATML)
    tokenizer.chat_template = {"default": t.CHATML, "tool_use": t.JSON}
    assert chat_template_of(tokenizer) == t.CHATML
    tokenizer.chat_template = {"rag": t.CHATML, "tool_use": t.JSON}
    with pytest.raises(ChatTemplateError, match=r"rag, tool_use.*chat_template in the model's kvlink\.json"):
        PromptLayout(tokenizer)
    PromptLayout(tokenizer, chat_template=t.CHATML).check()


def test_without_a_chat_template_roles_are_spelled() -> None:
    tokenizer = t.with_template(t.CHATML)
    tokenizer.chat_template = None
    prompt = PromptLayout(tokenizer).build([Message(*SYSTEM), Message("user", "What?")], [], links=None)
    assert tokenizer.decode(prompt.token_ids()) == "<bos>System: Be brief.\nUser: What?\nAssistant:"
