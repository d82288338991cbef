"""Scorers by name. A new one is a file of its own and one line here."""

from __future__ import annotations

from collections.abc import Mapping

from kvlink_core.compress.scorers.base import Scorer
from kvlink_core.compress.scorers.compactor import Compactor
from kvlink_core.compress.scorers.expected_attention import ExpectedAttention
from kvlink_core.compress.scorers.knorm import KeyNorm
from kvlink_core.compress.scorers.random import RandomScorer
from kvlink_core.compress.scorers.repeat import Repeat
from kvlink_core.errors import UnknownScorerError

_SCORERS: Mapping[str, Scorer] = {
    scorer.name: scorer for scorer in (RandomScorer(), KeyNorm(), ExpectedAttention(), Compactor(), Repeat())
}

#: What prunes where none is named: the best of them (docs/pruning.md).
DEFAULT_SCORER = "repeat"

__all__ = ["DEFAULT_SCORER", "Scorer", "get_scorer", "scorer_names"]


def scorer_names() -> tuple[str, ...]:
    """The names that ``get_scorer`` knows, sorted."""
    return tuple(sorted(_SCORERS))


def get_scorer(name: str) -> Scorer:
    """The scorer of that name. Raises ``UnknownScorerError``."""
    if name not in _SCORERS:
        raise UnknownScorerError(f"no scorer {name[:60]!r}; there are: {', '.join(scorer_names())}", param="codec")
    return _SCORERS[name]
