"""Threads for what may hang: as many at a time as asked for, replaced while they hang, none left when it is over."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kvlink_core.store.tiers.workers import Workers


def alive(name: str) -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == name]


def soon(what: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.002)


class Jobs:
    """Jobs that end when they are told to."""

    def __init__(self) -> None:
        self.running = self.most = 0
        self.done: list[int] = []
        self.gates: dict[int, threading.Event] = {}
        self._lock = threading.Lock()

    def __call__(self, number: int) -> Callable[[], None]:
        gate = self.gates[number] = threading.Event()

        def job() -> None:
            with self._lock:
                self.running += 1
                self.most = max(self.most, self.running)
            assert gate.wait(30)
            with self._lock:
                self.running -= 1
                self.done.append(number)

        return job


@pytest.fixture
def jobs() -> Iterator[Jobs]:
    made = Jobs()
    yield made
    for gate in made.gates.values():
        gate.set()


def test_as_many_run_at_once_as_asked_for_and_in_order(jobs: Jobs) -> None:
    workers = Workers("w-count", 3, 60.0)
    for number in range(6):
        assert workers.submit(jobs(number))
    soon(lambda: jobs.running == 3)
    time.sleep(0.02)
    assert (jobs.most, len(alive("w-count"))) == (3, 3)
    for number in range(6):
        jobs.gates[number].set()
        soon(lambda number=number: number in jobs.done)  # type: ignore[misc]
    assert (jobs.done, jobs.most) == ([0, 1, 2, 3, 4, 5], 3)
    workers.close(10)
    assert alive("w-count") == []
    assert not workers.submit(jobs(9))


def test_those_that_hang_are_replaced_and_are_too_many_when_they_come_back(jobs: Jobs) -> None:
    now = [0.0]
    workers = Workers("w-hang", 2, 5.0, clock=lambda: now[0])
    for number in range(3):
        workers.submit(jobs(number))
    soon(lambda: jobs.running == 2)
    now[0] = 4.0
    workers.submit(jobs(3))
    time.sleep(0.02)
    assert jobs.running == 2
    now[0] = 6.0  # 0 and 1 are late: 2 and 3 are not kept waiting by them
    workers.submit(jobs(4))
    soon(lambda: jobs.running == 4)
    jobs.gates[0].set()
    jobs.gates[1].set()
    soon(lambda: len(alive("w-hang")) == 2)
    assert jobs.running == 2
    for gate in jobs.gates.values():
        gate.set()
    soon(lambda: len(jobs.done) == 5)
    workers.close(10)
    assert alive("w-hang") == []


def test_there_is_an_end_to_threads(jobs: Jobs) -> None:
    now = [0.0]
    workers = Workers("w-most", 1, 1.0, clock=lambda: now[0])
    for number in range(60):
        workers.submit(jobs(number))
        soon(lambda number=number: jobs.running == min(32, number + 1))  # type: ignore[misc]
        now[0] += 2.0
    assert len(alive("w-most")) == 32
    workers.close(0.0)


def test_closing_drops_what_waits_and_does_not_wait_for_what_hangs(jobs: Jobs) -> None:
    workers = Workers("w-close", 1, 60.0)
    workers.submit(jobs(0))
    workers.submit(jobs(1))
    soon(lambda: jobs.running == 1)
    started = time.monotonic()
    workers.close(0.1)
    assert time.monotonic() - started < 5
    (left,) = alive("w-close")
    assert left.daemon  # does not keep the process
    jobs.gates[0].set()
    left.join(10)
    assert jobs.done == [0]


def test_a_job_that_fails_takes_nothing_with_it(caplog: pytest.LogCaptureFixture) -> None:
    workers = Workers("w-fail", 1, 60.0)
    after = threading.Event()

    def fail() -> None:
        raise SystemExit("no")

    workers.submit(fail)
    workers.submit(after.set)
    assert after.wait(10)
    workers.close(10)
    assert "a job of w-fail failed" in caplog.text


def test_a_system_without_another_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    workers = Workers("w-none", 1, 60.0)
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert not workers.submit(lambda: None)
    ran = threading.Event()
    assert workers.submit(ran.set)
    assert ran.wait(10)
    workers.close(10)
