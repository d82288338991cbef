"""How a document becomes text and what stands around and after it: the parts of a layout that are values."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from kvlink_core.errors import ConfigError, InputError, TooManyDocumentsError
from kvlink_core.types import Document

_FIELD = re.compile(r"\{[a-z_]+(?:\+\d+)?\}")
_PLACE_FIELDS = ("{place}", "{place+1}")
_FIELDS = ("{text}", "{title}", *_PLACE_FIELDS)


@dataclass(frozen=True, slots=True)
class LinkTokens:
    """The trained link tokens of a model (arXiv 2502.16002).

    Attributes:
        ids: token ids; document at place ``i`` (from 0) is followed by ``ids[i*k : i*k+k]`` when ``per_place``,
            else by ``ids[0:k]`` at every place.
        k: how many follow each document.
        per_place: whether each place has tokens of its own.
    """

    ids: tuple[int, ...]
    k: int
    per_place: bool = False

    def first(self, k: int) -> LinkTokens:
        """The same tokens with only the first ``k`` of each place, for comparison.

        Raises:
            InputError: ``k`` is not from 1 to this ``k``.
        """
        if not 1 <= k <= self.k:
            raise InputError(f"this model has {self.k} link tokens after a document; k must be from 1 to that.")
        places = range(0, len(self.ids), self.k)
        return LinkTokens(tuple(t for p in places for t in self.ids[p : p + k]), k, self.per_place)

    def after(self, place: int) -> tuple[int, ...]:
        """The link tokens after the document at ``place``.

        Raises:
            TooManyDocumentsError: more documents than the model has link tokens for.
        """
        start = place * self.k if self.per_place else 0
        if start + self.k > len(self.ids):
            raise TooManyDocumentsError(
                f"this model has link tokens for {len(self.ids) // self.k} documents and was sent more; "
                "send fewer, or use the linker 'reposition'.",
                param="documents",
            )
        return self.ids[start : start + self.k]


#: Token ids from here on name rows of a model's soft wrap. No vocabulary gets there, and 32 bits hold them.
FIRST_WRAP_ID = 2**31


@dataclass(frozen=True, slots=True)
class WrapRows:
    """How many trained embeddings stand before and after every document of a model (arXiv 2604.13226)."""

    header: int
    trailer: int

    def around(self, token_ids: Sequence[int]) -> list[int]:
        """A document's token ids, wrapped."""
        middle, end = FIRST_WRAP_ID + self.header, FIRST_WRAP_ID + self.header + self.trailer
        return [*range(FIRST_WRAP_ID, middle), *token_ids, *range(middle, end)]

    def inside(self, token_ids: Sequence[int]) -> Sequence[int]:
        """What ``around`` was given."""
        return token_ids[self.header : len(token_ids) - self.trailer]


@dataclass(frozen=True, slots=True)
class DocumentTemplate:
    """How a document becomes a string.

    The fields are ``{text}``, once; ``{title}``; and the document's place in the prompt, ``{place}`` counted from 0
    or ``{place+1}`` counted from 1. A template that names the place ties a cache to it: the same document at another
    place is other tokens, hence another cache.
    """

    untitled: str = "{text}\n\n"
    titled: str = "{title}\n{text}\n\n"

    def __post_init__(self) -> None:
        for template in (self.untitled, self.titled):
            if template.count("{text}") != 1:
                raise ConfigError(f"a document template must contain {{text}} once; {template!r} does not.")
            if unknown := [f for f in _FIELD.findall(template) if f not in _FIELDS]:
                raise ConfigError(
                    f"a document template has the unknown field {unknown[0]}; there are {', '.join(_FIELDS)}."
                )
        if "{title}" not in self.titled:
            raise ConfigError("the document template for titled documents must contain {title}.")

    @property
    def by_place(self) -> bool:
        """Whether a document's tokens depend on its place in the prompt."""
        return any(field in template for field in _PLACE_FIELDS for template in (self.untitled, self.titled))

    def render(self, document: Document, place: int = 0) -> str:
        """The document, at ``place`` (from 0), as one string; braces in its text or title mean nothing."""
        values = {
            "{text}": document.text,
            "{title}": document.title or "",
            "{place}": str(place),
            "{place+1}": str(place + 1),
        }
        return _FIELD.sub(lambda field: values[field[0]], self.titled if document.title else self.untitled)

    def to_json(self) -> str:
        """Canonical JSON, part of the fingerprint."""
        return json.dumps(asdict(self), sort_keys=True)


def id_at_place(document_id: str, place: int) -> str:
    """The id under which a cache is stored that is tied to ``place`` (from 0) of a prompt."""
    return f"{document_id}@{place}"


def without_place(stored_id: str) -> str:
    """The document id that ``id_at_place`` was given."""
    return stored_id.rpartition("@")[0]
