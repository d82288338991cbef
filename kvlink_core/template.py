"""How a document becomes text, and which link tokens follow it: the parts of a layout that are values."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from kvlink_core.errors import ConfigError, InputError
from kvlink_core.types import Document


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
            InputError: more documents than the model has link tokens for.
        """
        start = place * self.k if self.per_place else 0
        if start + self.k > len(self.ids):
            raise InputError(
                f"this model has link tokens for {len(self.ids) // self.k} documents and was sent more; "
                "send fewer, or use the linker 'reposition'.",
                param="documents",
            )
        return self.ids[start : start + self.k]


@dataclass(frozen=True, slots=True)
class DocumentTemplate:
    """How a document becomes a string. ``{text}`` and ``{title}`` are the fields.

    A template that names the document's place would tie its cache to that place, so there is no such field.
    """

    untitled: str = "{text}\n\n"
    titled: str = "{title}\n{text}\n\n"

    def __post_init__(self) -> None:
        if "{text}" not in self.untitled or "{text}" not in self.titled or "{title}" not in self.titled:
            raise ConfigError("a document template must contain {text}, and the titled one {title} as well.")

    def render(self, document: Document) -> str:
        """The document as one string; literal replacement, so braces in a text mean nothing."""
        template = self.titled if document.title else self.untitled
        before, after = template.split("{text}", 1)
        title = document.title or ""
        return before.replace("{title}", title) + document.text + after.replace("{title}", title)

    def to_json(self) -> str:
        """Canonical JSON, part of the fingerprint."""
        return json.dumps(asdict(self), sort_keys=True)
