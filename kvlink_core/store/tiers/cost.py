"""What a piece of work costs, learnt from what the same kind of work has cost."""

from __future__ import annotations

import threading

#: The weight of an observation falls to this with each that follows: the last five count for two thirds.
_DECAY = 0.8


class LinearCost:
    """Seconds as a fixed part plus a part per unit, fitted to exponentially weighted observations. Thread-safe.

    Neither part is ever negative. Amounts that hardly differ say nothing about the fixed part, which is then 0.
    """

    def __init__(self, decay: float = _DECAY) -> None:
        self._decay = decay
        self._lock = threading.Lock()
        self._weight = self._x = self._y = self._xx = self._xy = 0.0
        self._fit: tuple[float, float] | None = None

    def observe(self, amount: float, seconds: float, *, keep: float = 1.0) -> None:
        """Take in that ``amount`` units, more than 0, took ``seconds``.

        ``keep`` is what earlier observations are still worth, beside what each new one takes from them: 1 if they are
        recent.
        """
        assert amount > 0
        with self._lock:
            keep *= self._decay
            self._weight = keep * self._weight + 1
            self._x = keep * self._x + amount
            self._y = keep * self._y + seconds
            self._xx = keep * self._xx + amount * amount
            self._xy = keep * self._xy + amount * seconds
            self._fit = self._fitted()

    def _fitted(self) -> tuple[float, float]:
        x, y = self._x / self._weight, self._y / self._weight
        spread = self._xx / self._weight - x * x
        through_zero = self._xy / self._xx
        if spread <= 1e-2 * x * x:
            return 0.0, through_zero
        slope = (self._xy / self._weight - x * y) / spread
        if slope <= 0:
            return y, 0.0
        fixed = y - slope * x
        return (fixed, slope) if fixed >= 0 else (0.0, through_zero)

    @property
    def known(self) -> bool:
        """Whether anything was observed."""
        return self._fit is not None

    @property
    def fixed(self) -> float:
        """Seconds that work takes however small it is; 0 while nothing is known."""
        return self._fit[0] if self._fit else 0.0

    @property
    def per_unit(self) -> float:
        """Further seconds per unit; 0 while nothing is known."""
        return self._fit[1] if self._fit else 0.0

    def seconds(self, amount: float) -> float:
        """What ``amount`` units are expected to take."""
        fit = self._fit
        return fit[0] + fit[1] * amount if fit else 0.0
