"""What a reader sees: every figure, and a mark on each that must not be quoted as it stands."""

from __future__ import annotations

from collections.abc import Callable
from io import StringIO

import pytest
from rich.console import Console

from kvlink_core.benchmark.results import Hardware, Report, Row, with_ratios
from kvlink_core.benchmark.tables import hardware_line, milliseconds, report_tables, typical_point

MakeReport = Callable[..., Report]


def shown(report: Report) -> str:
    sink = StringIO()
    for table in report_tables(report):
        Console(file=sink, width=160).print(table)
    return sink.getvalue()


def line(text: str, name: str) -> list[str]:
    return next(
        [cell.strip() for cell in row.strip("│").split("│")]
        for row in text.splitlines()
        if row.strip("│ ").startswith(name + " ")
    )


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0000012, "0.001"), (0.00123, "1.23"), (0.0456, "45.6"), (0.789, "789"), (12.3456, "12,346")],
)
def test_milliseconds_have_three_digits(seconds: float, text: str) -> None:
    assert milliseconds(seconds) == text


def test_one_case_has_a_line_for_each_candidate(make_report: MakeReport) -> None:
    text = shown(make_report(5000))
    assert line(text, "full") == ["full", "5,032", "3", "10,000", "9,000", "100.0 %", "-", "-"]
    assert line(text, "reposition") == ["reposition", "32", "3", "1,100", "1,000", "11.0 %", "1.10", "0.55"]
    assert line(text, "floor of reposition") == [
        "floor of reposition", "32", "3", "1,000", "1,000", "10.0 %", "1.00", "0.50",
    ]  # fmt: skip
    assert "5,000 tokens of 10 documents + 32 of the query, 5 link tokens a document" in text
    assert "QUICK" not in text


def test_steps_are_shown_with_their_sum(make_report: MakeReport) -> None:
    text = shown(make_report(5000)).split("where the time goes")[1]
    assert line(text, "reposition, from disk") == [
        "reposition, from disk", "200", "100", "200", "200", "1,000", "10.0", "1,710", "114.0 %",
    ]  # fmt: skip
    assert line(text, "reposition")[1:3] == ["-", "-"]


def test_many_cases_stand_side_by_side(make_report: MakeReport) -> None:
    report = make_report(500, 5000, 32_000)
    text = shown(report)
    assert [length in text for length in ("500", "5,000", "32,000")] == [True] * 3
    assert line(text, "full") == ["full", "10,000", "10,000", "10,000"]
    assert text.count("11.0 %; 1.10") == 3
    assert "where the time goes at 5,000 document tokens" in text
    assert typical_point(report).case.context_tokens == 5000


def test_a_candidate_that_a_case_lacks_leaves_a_gap(make_report: MakeReport) -> None:
    report = make_report(500, 5000, 32_000)
    last = report.points[2]
    without = last.model_copy(update={"rows": with_ratios([r for r in last.rows if r.kind != "full"])})
    text = shown(report.model_copy(update={"points": [*report.points[:2], without]}))
    assert line(text, "full") == ["full", "10,000", "10,000", ""]


def test_fewer_runs_than_asked_are_marked(make_report: MakeReport) -> None:
    one, *others = make_report(5000).points[0].rows
    fields = {k: getattr(one, k) for k in ("name", "kind", "source", "prompt_tokens", "computed_tokens")}
    rows = with_ratios([Row.of([10.0], **fields), *others])
    point = make_report(5000).points[0].model_copy(update={"rows": rows})
    assert line(shown(make_report(5000).model_copy(update={"points": [point]})), "full")[2] == "1 of 3"
    many = [point.model_copy(update={"case": point.case.model_copy(update={"context_tokens": c})}) for c in (1, 2, 3)]
    assert line(shown(make_report(5000).model_copy(update={"points": many})), "full")[1] == "10,000 (1 run)"


def test_a_quick_run_says_so_in_every_title(make_report: MakeReport) -> None:
    for contexts in ((5000,), (500, 5000, 32_000)):
        assert "QUICK RUN, 3 runs each, not to be quoted" in shown(make_report(*contexts, quick=True))


def test_the_machine_is_one_line(make_report: MakeReport) -> None:
    gpu = Hardware(
        cpu="A processor", cores=2, threads=1, memory_gib=24.0, gpu="A GPU", gpu_memory_gib=80.0, others_busy=0.5
    )
    text = hardware_line(make_report(5000, hardware=gpu))
    assert text.startswith("A processor, 2 cores, 1 thread; 24 GiB; A GPU (80 GiB); others kept 0.50 cores busy; ")
    assert "torch 2.6.0" in text
