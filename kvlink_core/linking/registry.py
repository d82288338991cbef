"""Linkers by name. A new one needs a file of its own and a line at the end of this one (docs/linkers.md)."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

from kvlink_core.errors import ConfigError, UnknownLinkerError
from kvlink_core.linking.base import Linker
from kvlink_core.linking.cacheblend import CacheBlend
from kvlink_core.linking.concat import Concat
from kvlink_core.linking.epic import Epic
from kvlink_core.linking.full import Full
from kvlink_core.linking.link_tokens import LinkTokensLinker
from kvlink_core.linking.reposition import Reposition
from kvlink_core.linking.soft_wrap import SoftWrapLinker

#: What a parameter may be, and how a message calls it.
_KINDS: Mapping[type, str] = {int: "a whole number", float: "a number"}

_LINKERS: dict[str, type[Linker]] = {}


def register_linker(linker: type[Linker]) -> None:
    """Let users select a linker by its ``name``, in this process.

    Args:
        linker: a class whose keyword arguments are the linker's parameters: whole or real numbers, each with a default,
            whose type is the parameter's.

    Raises:
        ConfigError: the name is taken or cannot be written in a specification, or a parameter is of another kind.
    """
    name = linker.name
    if not isinstance(name, str) or not name or set(name) & set(":,= "):
        raise ConfigError(f"{name!r} cannot name a linker: it must be a word without ':', ',' and '='.")
    if name in _LINKERS:
        raise ConfigError(f"there is a linker {name!r} already; choose another name.")
    for parameter, default in _parameters(linker).items():
        if type(default) not in _KINDS:
            raise ConfigError(
                f"parameter {parameter!r} of linker {name!r} needs a whole or real number as its default."
            )
    _LINKERS[name] = linker


def unregister_linker(name: str) -> None:
    """Forget a linker.

    Raises:
        UnknownLinkerError: no such linker.
    """
    del _LINKERS[_known(name)]


def linker_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(_LINKERS)


def get_linker(spec: str) -> Linker:
    """The linker that a user wrote as ``name`` or ``name:parameter=value,...``.

    Raises:
        UnknownLinkerError: no such linker.
        ConfigError: it has no such parameter, or the value cannot be.
    """
    name, colon, rest = spec.partition(":")
    linker = _LINKERS[_known(name)]
    defaults = _parameters(linker)
    given: dict[str, int | float] = {}
    for part in rest.split(",") if colon else ():
        parameter, equals, text = part.partition("=")
        if not equals or parameter in given:
            raise ConfigError(
                f"linker {spec!r} is not of the form name:parameter=value,parameter=value.", param="linker"
            )
        if parameter not in defaults:
            raise ConfigError(f"linker {name!r} has no parameter {parameter!r}; {_listed(defaults)}.", param="linker")
        kind = type(defaults[parameter])
        try:
            given[parameter] = kind(text)
        except ValueError:
            raise ConfigError(f"linker {spec!r}: {parameter} must be {_KINDS[kind]}.", param="linker") from None
    return linker(**given)


def _known(name: str) -> str:
    if name not in _LINKERS:
        raise UnknownLinkerError(f"unknown linker {name!r}; there are {', '.join(_LINKERS)}.", param="linker")
    return name


def _parameters(linker: type[Linker]) -> dict[str, int | float]:
    return {name: p.default for name, p in inspect.signature(linker).parameters.items()}


def _listed(defaults: Mapping[str, int | float]) -> str:
    shown = ", ".join(f"{name} (default {default})" for name, default in defaults.items())
    return f"there is {shown}" if shown else "it has none"


for _linker in (Full, Concat, Reposition, LinkTokensLinker, SoftWrapLinker, Epic, CacheBlend):
    register_linker(_linker)
