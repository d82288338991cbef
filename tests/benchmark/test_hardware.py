"""Who keeps the cores busy is read from the system, or nothing is said."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import torch

from kvlink_core.benchmark import hardware
from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions


@pytest.fixture
def stat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine of 4 cores, whose file of counters the test writes; no time is spent by this process."""
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "times", lambda: (0.0, 0.0, 0.0, 0.0, 0.0))
    monkeypatch.setattr(os, "getloadavg", lambda: (0.25, 0.0, 0.0))
    monkeypatch.setattr(os, "sysconf", lambda name: 100)
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now.__setitem__(0, now[0] + 10) or now[0])
    path = tmp_path / "stat"
    path.write_text("cpu  0 0 0 0 0 0 0 0 0 0\ncpu0 0 0 0 0 0 0 0 0 0 0\n")
    return path


def test_work_of_others_is_counted_and_warned_of(stat: Path) -> None:
    watch = CoreWatch(stat)
    stat.write_text("cpu  1000 100 500 99999 88888 100 100 200 0 0\n")  # 20 s of work in 10 s; idling is none
    assert watch.others() == pytest.approx(2.0)
    stat.write_text("cpu  2000 0 0 0 0 0 0 0 0 0\n")  # 20 s in 20 s
    assert watch.others() == pytest.approx(1.0)
    warning = watch.warning()
    assert warning is not None
    assert "0.7 of 4 cores" in warning
    assert "0.25" in warning


def test_own_work_is_nobody_elses(stat: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    watch = CoreWatch(stat)
    stat.write_text("cpu  1000 0 0 0 0 0 0 0 0 0\n")
    monkeypatch.setattr(os, "times", lambda: (9.0, 0.5, 0.5, 0.0, 0.0))
    assert watch.others() == pytest.approx(0.0)
    assert watch.warning() is None


@pytest.mark.parametrize(("load", "warned"), [(0.1, False), (3.0, True)])
def test_where_the_system_says_nothing_the_load_average_must_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, load: float, warned: bool
) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    watch = CoreWatch(tmp_path / "none")
    assert watch.others() is None
    assert (watch.warning() is not None) == warned


def test_the_machine_is_described() -> None:
    found = describe_hardware(torch.device("cpu"), CoreWatch())
    assert found.cpu
    assert 1 <= found.cores <= (os.cpu_count() or 1)
    assert found.threads == torch.get_num_threads()
    assert found.gpu is None
    assert describe_versions()["torch"] == torch.__version__


def test_a_machine_without_a_file_of_its_processor_still_has_a_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", _missing)
    assert hardware._processor()
    assert hardware._cores() >= 1


def _missing(*_: object) -> str:
    raise FileNotFoundError
