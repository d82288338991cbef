"""A report made by hand, whose figures are easy to follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from kvlink_core.benchmark.results import (
    Breakdown,
    Case,
    Hardware,
    Model,
    Point,
    Report,
    Row,
    parts_of,
    with_ratios,
)

MeasuredSteps = dict[str, list[float]]


def steps(**changes: list[float]) -> MeasuredSteps:
    """Runs of every step: 0.3 s from the store, 0.4 s of linking, 0.2 s of it rotation, 1 s of prefill."""
    measured = {
        "load": [0.3, 0.3, 9.0],
        "decode": [0.1, 0.1, 0.1],
        "link": [0.4, 0.5, 0.3],
        "link_forward": [0.0, 0.0, 0.0],
        "unrotated": [0.2, 0.2, 0.2],
        "prefill": [1.0, 1.0, 1.0],
        "sample": [0.01, 0.01, 0.01],
    }
    return measured | changes


def breakdown(name: str, source: str, whole_s: float, measured: MeasuredSteps) -> Breakdown:
    parts = parts_of(measured)
    total = sum(parts.values())
    return Breakdown.model_validate(
        {
            "name": name, "source": source, "measured": measured, "parts": parts, "sum_s": total,
            "sum_of_whole": total / whole_s,
        }
    )  # fmt: skip


def point(context: int) -> Point:
    """``full`` takes 10 s, ``reposition`` 1.1 and from disk 1.5, its floors 1 and 2."""

    def row(name: str, kind: str, source: str | None, computed: int, *seconds: float) -> Row:
        return Row.of(
            seconds, name=name, kind=kind, source=source, prompt_tokens=context + 32, computed_tokens=computed
        )

    rows = [
        row("full", "full", None, context + 32, 10.0, 9.0, 11.0),
        row("reposition", "linker", "memory", 32, 1.1, 1.0, 1.2),
        row("reposition", "linker", "disk", 32, 1.5, 1.4, 1.6),
        row("floor of reposition", "floor", None, 32, 1.0, 1.0, 1.0),
        row("stock floor of reposition", "stock", None, 32, 2.0, 2.0, 2.0),
    ]
    return Point(
        case=Case(context_tokens=context),
        rows=with_ratios(rows),
        breakdowns=[
            breakdown("reposition", "memory", 1.1, steps(load=[0.0], decode=[0.0])),
            breakdown("reposition", "disk", 1.5, steps()),
        ],
    )


@pytest.fixture
def make_report() -> Callable[..., Report]:
    """Makes a report of points at the given context lengths; keyword arguments change its fields."""

    def make(*contexts: int, **changes: Any) -> Report:
        fields: dict[str, Any] = {
            "format": "kvlink-bench-ttft/1",
            "command": "kvlink bench ttft",
            "started": "2026-01-02T03:04:05+00:00",
            "quick": False,
            "repeats": 3,
            "full_budget_s": 300.0,
            "versions": {"kvlink": "0.1.0", "python": "3.11.0", "torch": "2.6.0", "transformers": "5.3.0"},
            "hardware": Hardware(cpu="A processor", cores=2, threads=1, memory_gib=24.0),
            "model": Model(source="random:llama-tiny", type="llama", parameters=1, dtype="float32", device="cpu"),
            "warnings": [],
            "points": [point(c) for c in contexts],
        }
        return Report.model_validate(fields | changes)

    return make
