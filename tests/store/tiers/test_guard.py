"""When a store is left alone, and which settings are refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from tier_scene import Clock

from kvlink_core.errors import ConfigError, StoreUnavailableError
from kvlink_core.store.tiers.breaker import CircuitBreaker
from kvlink_core.store.tiers.guard import StoreGuard
from kvlink_core.store.tiers.settings import TierSettings

# The breaker


@pytest.fixture
def clock() -> Clock:
    return Clock()


def breaker(clock: Callable[[], float]) -> CircuitBreaker:
    return CircuitBreaker(failures=3, retry_after_s=5, longest_s=15, trial_s=8, clock=clock)


def test_it_opens_after_failures_in_a_row_only(clock: Clock) -> None:
    made = breaker(clock)
    for end in (made.failed, made.failed, made.succeeded, made.failed, made.failed):
        end()
        assert (made.allow(), made.state) == ("yes", "closed")
    made.failed()
    assert (made.allow(), made.state, made.opened, made.retry_in_s()) == ("no", "open", 1, 5)


def test_one_trial_decides_and_waiting_doubles(clock: Clock) -> None:
    made = breaker(clock)
    for wait_s in (5, 10, 15, 15):
        for _ in range(3):
            made.failed()
        clock.now += wait_s - 0.1
        assert made.allow() == "no"
        clock.now += 0.2
        assert made.state == "half-open"
        assert [made.allow(), made.allow()] == ["trial", "no"]
    made.succeeded()
    assert (made.allow(), made.state) == ("yes", "closed")
    for _ in range(3):
        made.failed()
    assert made.retry_in_s() == 5  # as at first


def test_a_trial_that_says_nothing_is_given_up(clock: Clock) -> None:
    made = breaker(clock)
    for _ in range(3):
        made.failed()
    clock.now += 6
    assert made.allow() == "trial"
    clock.now += 7
    assert made.allow() == "no"
    clock.now += 2
    assert made.allow() == "trial"


def test_late_news_of_earlier_requests_does_not_close_it(clock: Clock) -> None:
    made = breaker(clock)
    for _ in range(3):
        made.failed()
    made.succeeded()
    assert made.allow() == "no"
    made.failed()
    assert made.opened == 1


# The guard


def test_failures_and_slow_answers_count_and_refusals_do_not(clock: Clock) -> None:
    guard = StoreGuard(breaker(clock), timeout_s=2, clock=clock)

    def away() -> None:
        raise StoreUnavailableError("away")

    def slow() -> str:
        clock.now += 3
        return "at last"

    def refused() -> None:
        raise ValueError("not here")

    with pytest.raises(StoreUnavailableError):
        guard.watch(away)
    assert guard.watch(slow) == "at last"
    assert guard.failures == 2
    with pytest.raises(ValueError, match="not here"):
        guard.watch(refused)  # an answer
    assert guard.allow() == "yes"
    for _ in range(3):
        guard.watch(slow)
    assert guard.allow() == "no"
    assert "left alone for another 5.0 s" in str(guard.left_alone())


def test_what_hangs_is_counted_without_coming_back_and_once(clock: Clock) -> None:
    guard = StoreGuard(breaker(clock), timeout_s=2, clock=clock)

    def hang(depth: int) -> None:
        clock.now += 1
        if depth:
            guard.watch(lambda: hang(depth - 1))
        else:
            clock.now += 2
            assert guard.allow() == "no"

    guard.watch(lambda: hang(2))
    assert guard.failures == 3


@pytest.mark.parametrize(
    ("settings_", "match"),
    [
        ({"host_bytes": -1}, "host_bytes is -1"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"timeout_s": float("nan")}, "timeout_s is nan"),
        ({"threads": 0}, "threads"),
        ({"recompute": "maybe"}, "'maybe'"),
        ({"disk_bytes": 5}, "both disk_path and disk_bytes"),
        ({"disk_path": "x"}, "both disk_path and disk_bytes"),
    ],
)
def test_impossible_settings_are_refused(settings_: dict[str, object], match: str) -> None:
    with pytest.raises(ConfigError, match=match):
        TierSettings(**settings_)  # type: ignore[arg-type]
