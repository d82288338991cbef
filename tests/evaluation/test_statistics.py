"""Intervals cover as often as they say; tests agree with all exchanges tried one by one, and with the sign test."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvlink_core.evaluation.pareto import pareto_front
from kvlink_core.evaluation.statistics import bootstrap, paired


@pytest.mark.parametrize(("chance", "questions"), [(0.5, 60), (0.2, 150)])
def test_intervals_cover_the_truth_about_as_often_as_they_say(chance: float, questions: int) -> None:
    """300 samples: 95 % of 300 with its own standard error of 1.3 points; the percentile bootstrap is a bit short."""
    draw = np.random.default_rng(5)
    samples = (draw.random((300, questions)) < chance).astype(float)
    found = [bootstrap(sample, seed=i, resamples=1000) for i, sample in enumerate(samples)]
    covered = np.mean([interval.low <= chance <= interval.high for interval in found])
    assert 0.90 <= covered <= 0.985


def test_the_interval_is_about_two_standard_errors_wide() -> None:
    values = np.random.default_rng(1).normal(3, 2, 400)
    found = bootstrap(values)
    error = values.std() / math.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.05)


def test_of_equal_values_there_is_no_doubt() -> None:
    found = bootstrap([0.1] * 7)
    assert (found.low, found.mean, found.high) == pytest.approx((0.1, 0.1, 0.1))
    assert found.low <= found.mean <= found.high


def test_the_same_seed_draws_the_same() -> None:
    values = np.random.default_rng(0).random(20)
    assert bootstrap(values, seed=3) == bootstrap(values, seed=3)
    assert bootstrap(values, seed=3) != bootstrap(values, seed=4)


@given(st.lists(st.integers(-3, 3), min_size=1, max_size=9))
def test_p_against_all_exchanges(differences: list[int]) -> None:
    total = abs(sum(differences))
    patterns = list(itertools.product((1, -1), repeat=len(differences)))
    as_far = sum(abs(sum(s * d for s, d in zip(p, differences, strict=True))) >= total for p in patterns)
    found = paired([0.0] * len(differences), [float(d) for d in differences], resamples=10)
    assert found.p == pytest.approx(as_far / len(patterns))
    assert found.unequal == sum(d != 0 for d in differences)


@pytest.mark.parametrize(("won", "lost"), [(9, 2), (8, 8), (26, 14)])
def test_p_of_right_and_wrong_is_the_exact_sign_test(won: int, lost: int) -> None:
    """McNemar's exact test of two systems on right-or-wrong questions; the last case is drawn, not counted out."""
    first = [0.0] * won + [1.0] * lost + [1.0] * 50
    second = [1.0] * won + [0.0] * lost + [1.0] * 50
    n, least = won + lost, min(won, lost)
    expected = min(1.0, 2 * sum(math.comb(n, i) for i in range(least + 1)) / 2**n)
    found = paired(first, second, resamples=20_000)
    assert found.p == pytest.approx(expected, abs=0.008)
    assert found.difference.mean == pytest.approx((won - lost) / (n + 50))
    assert found.difference.low <= found.difference.mean <= found.difference.high


def test_two_that_are_alike_differ_by_nothing() -> None:
    found = paired([0.5, 1.0], [0.5, 1.0])
    assert (found.p, found.unequal, found.difference.mean) == (1.0, 0, 0.0)


def test_p_is_never_nought() -> None:
    assert 0 < paired([0.0] * 100, [1.0] * 100, resamples=500).p < 0.01


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=12))
def test_pareto_front_against_every_pair(points: list[tuple[int, int]]) -> None:
    def beaten(i: int) -> bool:
        cost, worth = points[i]
        return any(c <= cost and w >= worth and (c, w) != (cost, worth) for c, w in points)

    front = pareto_front([(float(c), float(w)) for c, w in points])
    assert set(front) == {i for i in range(len(points)) if not beaten(i)}
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)
