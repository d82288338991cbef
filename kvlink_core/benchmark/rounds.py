"""Run what is compared alternately, so that a noisy machine disturbs all of it alike."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import torch

T = TypeVar("T")

#: Called with (what is under way, runs done, runs in all).
Progress = Callable[[str, int, int], None]


class Clock:
    """Times work on one device, which has finished all that it was given when the clock starts and when it stops."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> float:
        """Seconds, once the device has nothing left to do."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def time(self, work: Callable[[], T]) -> tuple[float, T]:
        """Seconds that ``work`` took, and its result, which outlives the measurement: freeing it is not timed."""
        started = self.now()
        result = work()
        return self.now() - started, result


@dataclass(frozen=True, slots=True)
class Work:
    """What one run measures.

    Attributes:
        run: does it once and returns seconds by name.
        budget_s: seconds that all counted runs together may take; ``None`` for as many as it needs.
    """

    run: Callable[[], Mapping[str, float]]
    budget_s: float | None = None


def affordable(first_s: float, repeats: int, budget_s: float | None) -> int:
    """How many of ``repeats`` runs fit the budget when one takes ``first_s``; 0 when not even one does."""
    if budget_s is None or first_s * repeats <= budget_s:
        return repeats
    return int(budget_s // first_s)


def takes_part(turn: int, allowed: int, repeats: int) -> bool:
    """Whether something with ``allowed`` of ``repeats`` runs has one in ``turn`` (from 0); they are spread evenly."""
    return (turn + 1) * allowed // repeats > turn * allowed // repeats


def alternate(works: Mapping[str, Work], repeats: int, progress: Progress) -> dict[str, list[Mapping[str, float]]]:
    """Run everything once uncounted, then in turns.

    Returns:
        By name the counted runs: ``repeats`` of each, fewer where a budget says so. Where the budget does not even
        allow one, the first run counts after all.
    """
    counted: dict[str, list[Mapping[str, float]]] = {name: [] for name in works}
    allowed: dict[str, int] = {}
    done = 0

    def total() -> int:
        return len(works) + sum(allowed.get(name, repeats) for name in works)

    for name, work in works.items():
        progress(name, done, total())
        started = time.perf_counter()
        first = work.run()
        allowed[name] = affordable(time.perf_counter() - started, repeats, work.budget_s)
        if allowed[name] == 0:
            counted[name].append(first)
        done += 1
    for turn in range(repeats):
        for name, work in works.items():
            if takes_part(turn, allowed[name], repeats):
                progress(name, done, total())
                counted[name].append(work.run())
                done += 1
    progress("", done, total())
    return counted
