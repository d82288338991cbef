"""Runs alternate, a budget thins them out evenly, and nothing is lost or counted twice."""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

import pytest
import torch

from kvlink_core.benchmark.rounds import Clock, Work, affordable, alternate, takes_part


@pytest.mark.parametrize(
    ("first_s", "repeats", "budget_s", "runs"),
    [(10.0, 7, None, 7), (10.0, 7, 70.0, 7), (10.0, 7, 69.0, 6), (10.0, 7, 10.0, 1), (10.0, 7, 9.9, 0)],
)
def test_what_a_budget_allows(first_s: float, repeats: int, budget_s: float | None, runs: int) -> None:
    assert affordable(first_s, repeats, budget_s) == runs


@pytest.mark.parametrize("repeats", [1, 7, 10])
def test_fewer_runs_are_spread_evenly(repeats: int) -> None:
    for allowed in range(repeats + 1):
        turns = [turn for turn in range(repeats) if takes_part(turn, allowed, repeats)]
        assert len(turns) == allowed
        gaps = [b - a for a, b in pairwise(turns)]
        assert not gaps or max(gaps) - min(gaps) <= 1


def test_all_run_in_turns_after_one_run_that_is_not_counted() -> None:
    order: list[str] = []

    def work(name: str) -> Work:
        def run() -> Mapping[str, float]:
            order.append(name)
            return {"whole": float(len(order))}

        return Work(run)

    runs = alternate({"a": work("a"), "b": work("b")}, 3, lambda name, done, total: None)
    assert order == ["a", "b"] * 4
    assert runs == {"a": [{"whole": n} for n in (3.0, 5.0, 7.0)], "b": [{"whole": n} for n in (4.0, 6.0, 8.0)]}


def test_a_budget_that_allows_none_counts_the_first_run() -> None:
    calls = []

    def run() -> Mapping[str, float]:
        time.sleep(0.002)
        calls.append(1)
        return {"whole": float(len(calls))}

    seen: list[tuple[int, int]] = []
    runs = alternate(
        {"slow": Work(run, budget_s=0.001), "other": Work(lambda: {"whole": 0.0})},
        2,
        lambda name, done, total: seen.append((done, total)),
    )
    assert runs["slow"] == [{"whole": 1.0}]
    assert len(runs["other"]) == 2
    assert seen[-1] == (4, 4)


def test_freeing_a_result_is_not_timed() -> None:
    freed: list[str] = []

    class Slow:
        def __del__(self) -> None:
            time.sleep(0.05)
            freed.append("freed")

    seconds, result = Clock(torch.device("cpu")).time(Slow)
    assert seconds < 0.05
    assert not freed
    del result
    assert freed
