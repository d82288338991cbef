"""How sure a mean is, and a difference of two: by drawing questions again, and by exchanging who gave which answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

RESAMPLES = 10_000

#: With at most so many questions that differ, all exchanges are tried instead of some drawn.
_ALL_EXCHANGES = 16

_AT_ONCE = 4_000_000

Values = Sequence[float] | npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean with the ends of its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Of two means over the same questions, second less first.

    Attributes:
        difference: with the 95 % interval of the paired bootstrap.
        p: two-sided, of the paired permutation test: how often a difference as large comes of exchanging, question by
            question, which of the two gave which value.
        questions: how many both have.
        unequal: on how many of them they differ.
    """

    difference: Interval
    p: float
    questions: int
    unequal: int


def bootstrap(values: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Interval:
    """Percentile bootstrap of a mean over questions (Efron 1979): 95 %.

    Values of the same number and seed are drawn alike, so intervals of several cells can be compared.

    Args:
        values: one of each question; at least one.
        seed: of the draws.
        resamples: how many.
    """
    given = np.asarray(values, dtype=np.float64)
    means = _resampled_means(given, seed, resamples)
    low, high = np.percentile(means, (2.5, 97.5))
    # The mean of equal values, summed in another order, may differ in its last bit.
    mean = float(given.mean())
    return Interval(mean, min(float(low), mean), max(float(high), mean))


def _resampled_means(given: npt.NDArray[np.float64], seed: int, resamples: int) -> npt.NDArray[np.float64]:
    draw = np.random.default_rng(seed)
    means = np.empty(resamples)
    step = max(1, _AT_ONCE // len(given))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        means[start : start + size] = given[draw.integers(0, len(given), (size, len(given)))].mean(axis=1)
    return means


def paired(first: Values, second: Values, *, seed: int = 0, resamples: int = RESAMPLES) -> Difference:
    """Compare two conditions that answered the same questions, in the same order."""
    differences = np.asarray(second, dtype=np.float64) - np.asarray(first, dtype=np.float64)
    unequal = differences[differences != 0]
    return Difference(
        bootstrap(differences, seed=seed, resamples=resamples),
        _exchange_test(unequal, seed, resamples),
        len(differences),
        len(unequal),
    )


def _exchange_test(unequal: npt.NDArray[np.float64], seed: int, resamples: int) -> float:
    """Share of sign patterns whose sum is as far from 0 as the one that was found (Fisher 1935)."""
    if not len(unequal):
        return 1.0
    found = abs(float(unequal.sum())) * (1 - 1e-12)  # sums in another order are not to fall short of it
    if len(unequal) <= _ALL_EXCHANGES:
        patterns = np.arange(2 ** len(unequal))[:, None] >> np.arange(len(unequal)) & 1
        return float(np.mean(np.abs((2 * patterns - 1) @ unequal) >= found))
    draw = np.random.default_rng(seed)
    as_far, step = 0, max(1, _AT_ONCE // len(unequal))
    for start in range(0, resamples, step):
        size = min(step, resamples - start)
        signs = draw.integers(0, 2, (size, len(unequal)), dtype=np.int8) * 2 - 1
        as_far += int(np.count_nonzero(np.abs(signs @ unequal) >= found))
    return (as_far + 1) / (resamples + 1)  # the one that was found is one of them
