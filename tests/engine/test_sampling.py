"""Sampling against counts and against what each parameter is defined to do."""

from __future__ import annotations

import collections

import pytest
import torch

from kvlink_core.engine.sampling import Sampler, SamplingParams
from kvlink_core.errors import SamplingError

LOGITS = torch.log(torch.tensor([0.1, 0.5, 0.15, 0.25]))


def draws(params: SamplingParams, n: int = 4000) -> dict[int, float]:
    sampler = Sampler(params)
    counts = collections.Counter(sampler.sample(LOGITS) for _ in range(n))
    return {token: count / n for token, count in counts.items()}


def test_greedy_takes_the_most_likely() -> None:
    assert draws(SamplingParams(), 5) == {1: 1.0}


def test_temperature_one_draws_the_model_distribution() -> None:
    shares = draws(SamplingParams(temperature=1, seed=0))
    assert [shares[i] for i in range(4)] == pytest.approx([0.1, 0.5, 0.15, 0.25], abs=0.03)


def test_temperature_sharpens() -> None:
    squared = torch.tensor([0.1, 0.5, 0.15, 0.25]).square()
    shares = draws(SamplingParams(temperature=0.5, seed=0))
    assert [shares[i] for i in range(4)] == pytest.approx((squared / squared.sum()).tolist(), abs=0.03)


@pytest.mark.parametrize("temperature", [1e-12, 1e-310])
def test_a_tiny_temperature_is_greedy_and_finite(temperature: float) -> None:
    assert draws(SamplingParams(temperature=temperature, seed=0), 20) == {1: 1.0}


def test_top_k_keeps_the_k_most_likely() -> None:
    assert set(draws(SamplingParams(temperature=2, top_k=2, seed=0))) == {1, 3}


@pytest.mark.parametrize(
    ("top_p", "kept"), [(0.4, {1}), (0.5, {1}), (0.6, {1, 3}), (0.8, {1, 2, 3}), (1.0, {0, 1, 2, 3})]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p: float, kept: set[int]) -> None:
    assert set(draws(SamplingParams(temperature=1, top_p=top_p, seed=0))) == kept


def test_a_nucleus_wider_than_what_is_sorted_first() -> None:
    """3,000 tokens of nearly the same probability: the first 2,100 reach 0.7 of it, whatever their order of ids."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.rand(3000, generator=generator) * 1e-3
    sampler = Sampler(SamplingParams(temperature=1, top_p=0.7, seed=0))
    drawn = {sampler.sample(logits) for _ in range(3000)}
    allowed = logits.argsort(descending=True)[:2101].tolist()
    assert drawn <= set(allowed)
    assert len(drawn) > 1400


def test_a_seed_repeats_and_no_seed_does_not() -> None:
    def run(seed: int | None) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1, seed=seed))
        return [sampler.sample(LOGITS) for _ in range(40)]

    assert run(7) == run(7)
    assert run(7) != run(8)
    assert run(None) != run(None)


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": 1e9}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 10**12}, "max_tokens"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ("",)}, "stop"),
        ({"stop": ("x",) * 100}, "stop"),
    ],
)
def test_absurd_values_are_refused_by_name(bad: dict[str, object], name: str) -> None:
    with pytest.raises(SamplingError, match=name) as caught:
        SamplingParams(**bad).validate()  # type: ignore[arg-type]  # wrong on purpose
    assert caught.value.param == name
