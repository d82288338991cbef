"""A circuit breaker: a store that fails again and again is left alone for a while, then tried with one request."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Literal

State = Literal["closed", "open", "half-open"]
Permission = Literal["yes", "trial", "no"]


class CircuitBreaker:
    """Safe to use from several threads.

    Args:
        failures: that many one after the other open it.
        retry_after_s: how long it stays open; doubled, up to ``longest_s``, each time the trial fails too.
        trial_s: a trial that has said nothing for so long is given up, and another one is let through.
        clock: seconds that only grow.
    """

    def __init__(
        self,
        *,
        failures: int = 3,
        retry_after_s: float = 5.0,
        longest_s: float = 60.0,
        trial_s: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._failures = failures
        self._first_s, self._longest_s = retry_after_s, max(retry_after_s, longest_s)
        self._trial_s = trial_s
        self._clock = clock
        self._lock = threading.Lock()
        self._state: State = "closed"
        self._in_a_row = 0
        self._open_s = retry_after_s
        self._since = 0.0  # when it opened, or when the trial was let through
        self.opened = 0

    @property
    def state(self) -> State:
        """``open`` until the next request would be let through as a trial, ``half-open`` from then on."""
        with self._lock:
            return "half-open" if self._state == "open" and self._left() <= 0 else self._state

    def retry_in_s(self) -> float:
        """Seconds until the store is tried again; 0 where it may be asked now."""
        with self._lock:
            return max(0.0, self._left()) if self._state == "open" else 0.0

    def allow(self) -> Permission:
        """Whether the store may be asked now; once its time is over, one request may, as the trial."""
        with self._lock:
            if self._state == "closed":
                return "yes"
            waited = self._left() if self._state == "open" else self._since + self._trial_s - self._clock()
            if waited > 0:
                return "no"
            self._state, self._since = "half-open", self._clock()
            return "trial"

    def succeeded(self) -> None:
        """The store answered in time."""
        with self._lock:
            self._in_a_row = 0
            if self._state == "half-open":
                self._state, self._open_s = "closed", self._first_s

    def failed(self) -> None:
        """The store did not answer, or not in time."""
        with self._lock:
            self._in_a_row += 1
            if self._state == "half-open":
                self._open_s = min(2 * self._open_s, self._longest_s)
            elif self._state == "open" or self._in_a_row < self._failures:
                return
            self._state, self._since = "open", self._clock()
            self.opened += 1

    def _left(self) -> float:
        return self._since + self._open_s - self._clock()
