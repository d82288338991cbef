"""The parameters of a codec, checked one by one, whether a user wrote them or a shard claims them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from kvlink_core.compress.codec import ParamValue
from kvlink_core.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number within limits."""

    default: int
    least: int
    most: int

    def accepts(self, value: ParamValue) -> bool:
        """Whether ``value`` is one; neither a float nor a truth value is."""
        return type(value) is int and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"a whole number from {self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class Choice:
    """One of a few words, the first of which is the default."""

    options: tuple[str, ...]

    @property
    def default(self) -> str:
        """What holds when nothing is said."""
        return self.options[0]

    def accepts(self, value: ParamValue) -> bool:
        """Whether ``value`` is one of them."""
        return value in self.options

    def __str__(self) -> str:
        return f"one of {', '.join(self.options)}"


@dataclass(frozen=True, slots=True)
class Share:
    """A share above 0, up to 1, of three decimals at most: so that what it is of some number is exact."""

    default: float = 1.0

    def accepts(self, value: ParamValue) -> bool:
        """Whether ``value`` is one; a truth value is not."""
        return type(value) in (int, float) and 0.001 <= float(value) <= 1 and float(value) == round(float(value), 3)

    def __str__(self) -> str:
        return "a share from 0.001 to 1 of at most three decimals"


@dataclass(frozen=True, slots=True)
class Word:
    """Small letters, digits and hyphens, 1 to 64 of them, a letter first."""

    default: str

    def accepts(self, value: ParamValue) -> bool:
        """Whether ``value`` is one."""
        return isinstance(value, str) and re.fullmatch(r"[a-z][a-z0-9-]{0,63}", value) is not None

    def __str__(self) -> str:
        return "a name of small letters, digits and hyphens"


Rule = Whole | Choice | Share | Word

#: How hard to try with zstd after the codec's own work; 0 for not at all.
ZSTD_OFF = Whole(0, 0, 22)
ZSTD_ON = Whole(1, 0, 22)


def check_params(codec: str, given: Mapping[str, ParamValue], rules: Mapping[str, Rule]) -> dict[str, ParamValue]:
    """All parameters of ``codec``: those ``given``, and the defaults of the others.

    Raises:
        ConfigError: one that the codec does not have, or a value that its rule does not accept.
    """
    if unknown := sorted(set(given) - set(rules)):
        has = f"has {', '.join(sorted(rules))}" if rules else "has none"
        raise ConfigError(
            f"codec {codec!r} has no parameter {unknown[0][:60]!r}; it {has}, and every codec keep and scorer.",
            param="codec",
        )
    for name, value in given.items():
        if not rules[name].accepts(value):
            shown = repr(value)[:60]
            raise ConfigError(f"codec {codec!r}: {name} is {rules[name]}, not {shown}.", param="codec")
    return {name: given.get(name, rule.default) for name, rule in sorted(rules.items())}
