"""What changes when the same questions are answered in two ways, with an interval."""

from __future__ import annotations

import math
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

    The interval is Agresti and Min's (Statistics in Medicine 24, 2005): half an answer more in each of the four cells
    of the table, so that it is no point where nothing changed, and covers what it should where little did.

    Args:
        gained, lost: answers that became right, and that became wrong.
        asked: questions in all, at least 1.
    """
    assert 0 <= gained + lost <= asked
    assert asked > 0
    up, down, total = gained + 0.5, lost + 0.5, asked + 2
    middle = (up - down) / total
    spread = _TWO_SIDED_95 * math.sqrt(up + down - (up - down) ** 2 / total) / total
    return Difference(100 * (gained - lost) / asked, 100 * (middle - spread), 100 * (middle + spread))
