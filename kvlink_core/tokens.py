"""Text to token ids, where text from outside can never become a control token.

A control token is spelled like any text ("<|im_end|>"), so text that is rendered into a chat template could say one.
Here the template's own control tokens are therefore spelled in secret, with digits that nobody outside can know, and
the tokenizer takes their usual spelling for plain text. Template and text from outside are then tokenised in one go,
as they stand side by side.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable, Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import DecodeStream

from kvlink_core.errors import InputError
from kvlink_core.text import is_unicode

_CONTROL, _LETTER, _OPAQUE, _CUT = "2345"


class GuardedTokenizer:
    """A fast tokenizer, its control tokens under guard. Safe to use from several threads.

    Args:
        tokenizer: a fast Hugging Face tokenizer; not changed.
        chat_template: the template in use; an added token that it spells is a control token.
        control_ids: further control tokens.
    """

    def __init__(self, tokenizer: Any, *, chat_template: str, control_ids: Iterable[int] = ()) -> None:
        text = tokenizer.backend_tokenizer.to_str()
        definition = json.loads(text)
        self._knowing = Tokenizer.from_str(text)
        further = frozenset(control_ids)
        control = []
        for token in definition["added_tokens"]:
            # Not every control token is marked special: "<think>" of some chat templates is an ordinary added token.
            marked = token["special"] or token["content"] in chat_template or token["id"] in further
            # Runs of spaces or line ends are text, whatever they are marked as.
            token["special"] = bool(marked and token["content"].strip())
            if token["special"]:
                control.append(token)
        self._plain = Tokenizer.from_str(json.dumps(definition))
        self._plain.encode_special_tokens = True
        for each in (self._knowing, self._plain):
            each.no_truncation()
            each.no_padding()

        # No digit 1 but the first: one secret never begins inside another, nor inside digits of a text before it.
        self._secret = "1" + "".join(secrets.choice("23456789") for _ in range(31))
        self._stand_in = re.compile(self._secret + r"([2-5])(\d{6})")
        by_length = sorted(range(len(control)), key=lambda i: -len(control[i]["content"]))
        spellings = "|".join(re.escape(control[i]["content"]) for i in by_length)
        self._spelled: re.Pattern[str] = re.compile(spellings or r"(?!)")
        self._secret_of = {token["content"]: self._spell(_CONTROL, i) for i, token in enumerate(control)}
        self._plain.add_tokens(
            [
                AddedToken(
                    self._secret_of[t["content"]],
                    special=False,
                    normalized=False,
                    lstrip=t["lstrip"],
                    rstrip=t["rstrip"],
                )
                for t in control
            ]
            + [AddedToken(self._spell(_CUT, i), special=False, normalized=False) for i in range(2)]
        )
        self._real = {self._plain.token_to_id(self._secret_of[t["content"]]): int(t["id"]) for t in control}
        self._cut_id, self._break_id = (self._plain.token_to_id(self._spell(_CUT, i)) for i in range(2))
        # What a tokenizer gives for what it does not know is no control token, whatever it is marked as.
        self._forbidden = frozenset(self._real.values()) - {tokenizer.unk_token_id}
        # A control token begins and ends with one of these; text without them cannot spell one, nor a part of one
        # that the template would complete.
        edges: list[str] = sorted({c for t in control for c in (t["content"][0], t["content"][-1])})
        self._letters = dict(enumerate(edges))
        self._hidden = str.maketrans({c: self._spell(_LETTER, i) for i, c in self._letters.items()})

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of generated tokens, special tokens left out; incomplete UTF-8 shows as U+FFFD."""
        return str(self._knowing.decode(list(token_ids), skip_special_tokens=True))

    def decode_stream(self) -> Callable[[int], str | None]:
        """A decoder for one answer: called with each token, returns text once it is whole characters."""
        stream = DecodeStream(skip_special_tokens=True)
        return lambda token_id: stream.step(self._knowing, token_id)

    def plain(self, text: str) -> list[int]:
        """Token ids of text from outside; control tokens in it stay text.

        Raises:
            InputError: the text is not Unicode (it has half of a surrogate pair), or spells a control token that
                this tokenizer cannot write as text.
        """
        if not is_unicode(text):
            raise InputError("a text has half of a surrogate pair in it; send whole Unicode characters.")
        return self._encode(text)

    @property
    def cut(self) -> str:
        """In text for ``pieces``: where to cut."""
        return self._spell(_CUT, 0)

    def opaque(self, index: int) -> str:
        """A stand-in for a whole text: digits, which templates let pass as they are."""
        return self._spell(_OPAQUE, index)

    def hide(self, text: str) -> str:
        """Text from outside with the first and last letters of control tokens replaced by stand-ins."""
        return text.translate(self._hidden)

    def restore(self, text: str, opaque: dict[int, str] | None = None) -> str:
        """Put back what ``hide`` replaced, and texts for opaque stand-ins by index."""

        def original(found: re.Match[str]) -> str:
            kind, index = found[1], int(found[2])
            if kind == _LETTER:
                return self._letters[index]
            return opaque[index] if kind == _OPAQUE and opaque and index in opaque else found[0]

        return self._stand_in.sub(original, text)

    def spelled_in(self, text: str) -> str | None:
        """The first control token that a text spells."""
        found = self._spelled.search(text)
        return str(found[0]) if found else None

    def guard(self, text: str) -> str:
        """Template text with its control tokens spelled in secret; what came from outside must be hidden."""
        return self._spelled.sub(lambda found: self._secret_of[found[0]], text)

    def pieces(self, text: str) -> list[list[int]]:
        """Token ids of guarded text, cut where it says ``cut``: one list more than there are cuts."""
        pieces: list[list[int]] = [[]]
        for token_id in self._encode(text):
            if token_id == self._cut_id:
                pieces.append([])
            else:
                pieces[-1].append(self._real.get(token_id, token_id))
        return pieces

    def _encode(self, text: str) -> list[int]:
        token_ids = list(self._plain.encode(text, add_special_tokens=False).ids)
        if self._forbidden.isdisjoint(token_ids):
            return token_ids
        # The vocabulary itself spells a control token (Unigram models): break every spelling after its first letter.
        broken = self._spelled.sub(lambda found: found[0][:1] + self._spell(_CUT, 1) + found[0][1:], text)
        token_ids = [i for i in self._plain.encode(broken, add_special_tokens=False).ids if i != self._break_id]
        if not self._forbidden.isdisjoint(token_ids):
            raise InputError("a text spells a control token that this model's tokenizer cannot write as text.")
        return token_ids

    def _spell(self, kind: str, index: int) -> str:
        return f"{self._secret}{kind}{index:06d}"
