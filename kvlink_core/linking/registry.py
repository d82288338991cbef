"""Linkers by name. A new one needs a file of its own and a line in ``LINKERS``."""

from __future__ import annotations

from kvlink_core.errors import UnknownLinkerError
from kvlink_core.linking.base import Linker
from kvlink_core.linking.full import Full
from kvlink_core.linking.link_tokens import LinkTokensLinker
from kvlink_core.linking.reposition import Reposition

LINKERS: dict[str, Linker] = {linker.name: linker for linker in (Full(), Reposition(), LinkTokensLinker())}


def linker_names() -> tuple[str, ...]:
    """All registered names."""
    return tuple(LINKERS)


def get_linker(name: str) -> Linker:
    """Look a linker up.

    Raises:
        UnknownLinkerError: no such linker.
    """
    if name not in LINKERS:
        raise UnknownLinkerError(f"unknown linker {name!r}; there are {', '.join(LINKERS)}.", param="linker")
    return LINKERS[name]
