"""What changes when the same questions are answered in two ways, with an interval."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

#: Of the normal distribution: 95 % lie within as many standard deviations.
_TWO_SIDED_95 = 1.959964


class Difference(NamedTuple):
    """In points, i.e. hundredths of the questions; negative where answers were lost. ``low`` to ``high``: 95 %."""

    points: float
    low: float
    high: float


def paired_difference(gained: int, lost: int, asked: int) -> Difference:
    """The difference of two shares of the same questions.

    The interval is Tango's (Statistics in Medicine 17, 1998): the differences that a score test does not reject. It is
    no point where nothing changed, and holds what it should where little did.

    Args:
        gained, lost: answers that became right, and that became wrong.
        asked: questions in all, at least 1.
    """
    assert 0 <= gained + lost <= asked
    assert asked > 0
    found = (gained - lost) / asked

    def score(difference: float) -> float:
        return _score(gained, lost, asked, difference)

    low = _crossing(score, _TWO_SIDED_95, -1.0, found)
    high = _crossing(score, -_TWO_SIDED_95, found, 1.0)
    return Difference(100 * found, 100 * low, 100 * high)


def _score(gained: int, lost: int, asked: int, difference: float) -> float:
    """How many standard deviations what was found lies above ``difference``, were that the truth. Falls as it grows."""
    off = gained - lost - asked * difference
    # The likeliest share of lost answers where the shares of gained and lost ones differ by that much.
    a, b = 2 * asked, -gained - lost + (2 * asked - gained + lost) * difference
    c = -lost * difference * (1 - difference)
    share = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = asked * (2 * share + difference * (1 - difference))
    if variance <= 0:
        return math.copysign(math.inf, off) if off else 0.0
    return off / math.sqrt(variance)


def _crossing(score: Callable[[float], float], level: float, low: float, high: float) -> float:
    """Where a falling function between ``low`` and ``high`` comes to ``level``."""
    for _ in range(60):
        middle = (low + high) / 2
        if score(middle) > level:
            low = middle
        else:
            high = middle
    return (low + high) / 2
