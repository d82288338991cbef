"""One entry of a file, read field by field; what is missing or of another kind is said with file, line and field."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from kvlink_core.errors import CorpusError
from kvlink_core.text import is_unicode


@dataclass(frozen=True, slots=True)
class Fields:
    """A JSON object of a file.

    Attributes:
        data: the object.
        where: file and line, and the path inside the entry.
    """

    data: Mapping[str, Any]
    where: str

    @classmethod
    def of(cls, value: Any, where: str) -> Fields:
        """Raises ``CorpusError`` where ``value`` is no object."""
        if not isinstance(value, dict):
            raise CorpusError(f"{where}: a JSON object was expected, not {_shown(value)}.")
        return cls(value, where)

    def has(self, *names: str) -> bool:
        """Whether all these fields are there, and none is null."""
        return all(self.data.get(name) is not None for name in names)

    def fail(self, name: str, wanted: str) -> NoReturn:
        """Raises ``CorpusError``: the field is not what was wanted."""
        found = _shown(self.data[name]) if name in self.data else "missing"
        raise CorpusError(f"{self.where}: field {name!r} must be {wanted}; it is {found}.")

    def text(self, name: str, *, blank: bool = False) -> str:
        """A text, which is not blank unless ``blank`` allows it."""
        return self._text_of(name, self.data.get(name), "text", blank=blank)

    def maybe(self, name: str) -> str | None:
        """A text, or ``None`` where there is none."""
        return self.text(name, blank=True) if self.has(name) else None

    def identity(self, *names: str) -> str | None:
        """The first of these fields that is there, as text; numbers are taken too."""
        for name in names:
            value = self.data.get(name)
            if isinstance(value, str | int) and not isinstance(value, bool) and str(value):
                return self._text_of(name, str(value), "text", blank=False)
        return None

    def texts(self, name: str) -> tuple[str, ...]:
        """A list of texts, or a lone text; blank ones are left out."""
        value = self.data.get(name)
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list):
            self.fail(name, "a list of texts")
        found = (self._text_of(name, each, "a list of texts", blank=True) for each in value)
        return tuple(dict.fromkeys(text for text in found if text.strip()))

    def items(self, name: str) -> list[Any]:
        """A list."""
        value = self.data.get(name)
        if not isinstance(value, list):
            self.fail(name, "a list")
        return value

    def objects(self, name: str) -> list[Fields]:
        """A list of objects."""
        return [Fields.of(v, f"{self.where}, {name}[{i}]") for i, v in enumerate(self.items(name))]

    def inside(self, name: str) -> Fields:
        """An object."""
        if not isinstance(self.data.get(name), dict):
            self.fail(name, "an object")
        return Fields.of(self.data[name], f"{self.where}, {name}")

    def places(self, name: str, documents: int) -> tuple[int, ...]:
        """A list of places of documents, ascending; none where the field is missing or null."""
        if not self.has(name):
            return ()
        for value in self.items(name):
            if type(value) is not int or not 0 <= value < documents:
                self.fail(name, f"places of documents, from 0 to {documents - 1}")
        return tuple(sorted(set(self.items(name))))

    def columns(self, *names: str) -> list[tuple[Any, ...]]:
        """Rows of lists that stand side by side, as columnar data sets have them."""
        lists: Sequence[list[Any]] = [self.items(name) for name in names]
        if len({len(each) for each in lists}) > 1:
            raise CorpusError(f"{self.where}: fields {', '.join(names)} have different lengths.")
        return list(zip(*lists, strict=True))

    def _text_of(self, name: str, value: Any, wanted: str, *, blank: bool) -> str:
        if not isinstance(value, str) or not (blank or value.strip()):
            self.fail(name, f"{wanted} that is not blank" if isinstance(value, str) else wanted)
        if not is_unicode(value):
            raise CorpusError(f"{self.where}: field {name!r} has half of a surrogate pair in it.")
        return value


def _shown(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:60]}..."
