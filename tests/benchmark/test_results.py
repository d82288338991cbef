"""Figures follow from runs, and a file whose figures do not is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kvlink_core.benchmark.report import read_report, write_report
from kvlink_core.benchmark.results import Case, Report, Row, parts_of, with_ratios
from kvlink_core.errors import ConfigError

MakeReport = Callable[..., Report]


def steps(**changes: list[float]) -> dict[str, list[float]]:
    names = ("load", "decode", "link", "link_forward", "unrotated", "prefill", "sample")
    return {name: [0.0] for name in names} | changes


@pytest.mark.parametrize(
    ("context", "lengths"), [(500, (500,)), (1200, (500, 500, 200)), (3, (3,)), (1000, (500, 500))]
)
def test_a_context_is_cut_into_documents(context: int, lengths: tuple[int, ...]) -> None:
    assert Case(context_tokens=context).document_lengths == lengths


def test_ratios_are_of_medians_and_floors_are_those_of_the_same_tokens(make_report: MakeReport) -> None:
    full, hot, disk, floor, stock = make_report(5000).points[0].rows
    assert (full.median_s, full.of_full, full.x_floor, full.x_stock) == (10.0, 1.0, None, None)
    assert hot.of_full == pytest.approx(0.11)
    assert hot.x_floor == pytest.approx(1.1)
    assert hot.x_stock == pytest.approx(0.55)
    assert disk.x_floor == pytest.approx(1.5)
    assert (floor.x_floor, stock.x_stock, stock.x_floor) == (1.0, 1.0, 2.0)


def test_a_row_without_full_or_floor_has_no_ratios() -> None:
    fields = {"kind": "linker", "source": "memory", "prompt_tokens": 9}
    rows = [
        Row.of([1.0], name="a", computed_tokens=4, **fields),
        Row.of([1.0], name="f", computed_tokens=5, **fields | {"kind": "floor", "source": None}),
    ]
    alone, floor = with_ratios(rows)
    assert (alone.of_full, alone.x_floor, alone.x_stock) == (None, None, None)
    assert floor.x_floor == 1.0


def test_parts_are_medians_and_differences() -> None:
    parts = parts_of(
        steps(
            load=[0.3, 0.3, 9.0], decode=[0.1], link=[0.9, 1.0, 1.1], link_forward=[0.6], unrotated=[0.3],
            prefill=[2.0], sample=[0.5],
        )
    )  # fmt: skip
    expected = {"load": 0.2, "decode": 0.1, "rotate": 0.1, "copy": 0.3, "prefill": 2.6, "sample": 0.5}
    assert parts == pytest.approx(expected)
    assert sum(parts.values()) == pytest.approx(0.3 + 1.0 + 2.0 + 0.5)


def test_noise_makes_no_part_negative_and_loses_nothing() -> None:
    parts = parts_of(steps(load=[0.1], decode=[0.2], link=[0.5], unrotated=[0.6], prefill=[1.0]))
    assert parts == {"load": 0.0, "decode": 0.1, "rotate": 0.0, "copy": 0.5, "prefill": 1.0, "sample": 0.0}


def test_a_report_is_read_as_it_was_written(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(500, 5000)
    write_report(report, tmp_path / "out.json")
    assert read_report(tmp_path / "out.json") == report


def _change(report: dict[str, Any], *path: str | int, value: Any) -> None:
    *steps, last = path
    for step in steps:
        report = report[step]  # type: ignore[index]
    report[last] = value  # type: ignore[index]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("points", 0, "rows", 1, "median_s"), 0.5, "median_s of 'reposition' is 0.5, and its runs give 1.1"),
        (("points", 0, "rows", 1, "min_s"), 0.5, "min_s of 'reposition'"),
        (("points", 0, "rows", 1, "of_full"), 0.01, "of_full of 'reposition'"),
        (("points", 0, "rows", 2, "x_floor"), None, "x_floor of 'reposition, from disk'"),
        (("points", 0, "breakdowns", 1, "parts", "rotate"), 0.0, "rotate of 'reposition, from disk'"),
        (("points", 0, "breakdowns", 1, "sum_s"), 0.0, "sum_s of 'reposition, from disk'"),
        (("points", 0, "breakdowns", 1, "sum_of_whole"), 1.0, "sum_of_whole of 'reposition, from disk'"),
        (("points", 0, "breakdowns", 1, "name"), "glue", "a breakdown of 'glue, from disk'"),
        (("points", 0, "rows", 1, "seconds"), [], "points.0.rows.1.seconds"),
        (("points",), [], "points"),
        (("format",), "kvlink-bench-ttft/2", "format"),
        (("surprise",), 1, "surprise"),
    ],
)
def test_a_changed_file_is_refused(
    make_report: MakeReport, tmp_path: Path, path: tuple[str | int, ...], value: Any, said: str
) -> None:
    figures = json.loads(make_report(5000).model_dump_json())
    _change(figures, *path, value=value)
    (tmp_path / "out.json").write_text(json.dumps(figures))
    with pytest.raises(ConfigError) as refused:
        read_report(tmp_path / "out.json")
    assert said in str(refused.value)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"\xff\xfe"])
def test_what_is_no_report_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "out.json").write_bytes(content)
    with pytest.raises(ConfigError, match=r"out\.json"):
        read_report(tmp_path / "out.json")


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read"):
        read_report(tmp_path / "none.json")
