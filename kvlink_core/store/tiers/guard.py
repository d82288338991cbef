"""Between us and a store that may fail, or hang: what it is asked is watched, and soon not asked any more."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

from kvlink_core.errors import StoreUnavailableError
from kvlink_core.store.tiers.breaker import CircuitBreaker, Permission

T = TypeVar("T")


class _Call:
    __slots__ = ("blamed", "started")

    def __init__(self, started: float) -> None:
        self.started = started
        self.blamed = False


class StoreGuard:
    """Counts failures and time-outs of a store for its circuit breaker. Safe to use from several threads.

    Args:
        breaker: decides.
        timeout_s: a call that runs longer has failed, whether it ever returns or not.
        clock: seconds that only grow.
    """

    def __init__(
        self, breaker: CircuitBreaker, timeout_s: float, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.breaker = breaker
        self.failures = 0
        self._timeout_s = timeout_s
        self._clock = clock
        self._lock = threading.Lock()
        self._running: set[_Call] = set()

    def allow(self) -> Permission:
        """Whether the store may be asked now."""
        with self._lock:
            late = [c for c in self._running if self._clock() - c.started > self._timeout_s]
        for call in late:  # they may hang for ever, so nobody else would say it
            self._failed(call)
        return self.breaker.allow()

    def watch(self, work: Callable[[], T]) -> T:
        """Ask, after ``allow``: run ``work`` in this thread, and count how it ends; what it raises is passed on."""
        call = _Call(self._clock())
        with self._lock:
            self._running.add(call)
        try:
            result = work()
        except StoreUnavailableError:
            self._failed(call)
            raise
        except BaseException:  # it answered, though not what was hoped for
            self._answered(call)
            raise
        else:
            self._answered(call)
            return result
        finally:
            with self._lock:
                self._running.discard(call)

    def left_alone(self) -> StoreUnavailableError:
        """Why the store is not asked."""
        return StoreUnavailableError(
            f"the store failed {self.failures} times and is left alone for another {self.breaker.retry_in_s():.1f} s"
        )

    def late(self) -> StoreUnavailableError:
        """Why nobody waits for it any longer."""
        return StoreUnavailableError(f"the store has not answered within {self._timeout_s:g} s")

    def _answered(self, call: _Call) -> None:
        if self._clock() - call.started > self._timeout_s:
            self._failed(call)
        else:
            self.breaker.succeeded()

    def _failed(self, call: _Call) -> None:
        with self._lock:
            if call.blamed:
                return
            call.blamed = True
            self.failures += 1
        self.breaker.failed()
