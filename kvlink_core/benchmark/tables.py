"""The figures of ``kvlink bench ttft`` as tables for a terminal."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

from rich.table import Table

from kvlink_core.benchmark.results import PARTS, Breakdown, Point, Report, Row

if TYPE_CHECKING:
    from kvlink_core.benchmark.precision import PrecisionReport
    from kvlink_core.benchmark.serving_results import ServingReport
    from kvlink_core.benchmark.tiers_report import TiersReport

#: With more points than this, one table of all takes the place of one for each.
MOST_DETAILED = 2

#: The context length whose breakdown is shown, or the nearest to it, when there are many.
TYPICAL = 5000


def milliseconds(seconds: float) -> str:
    """Milliseconds with three digits or more, e.g. ``0.123``, ``4.56``, ``78.9``, ``1,234``."""
    value = 1e3 * seconds
    digits = next((d for limit, d in ((1, 3), (10, 2), (100, 1)) if value < limit), 0)
    return f"{value:,.{digits}f}"


def count(number: int, what: str) -> str:
    """``1 run``, ``2 runs``."""
    return f"{number:,} {what}{'s' * (number != 1)}"


def typical_point(report: Report) -> Point:
    """The point that stands for all where only one can be shown."""
    return min(report.points, key=lambda point: abs(point.case.context_tokens - TYPICAL))


def report_tables(report: Report) -> list[Table]:
    """Everything that the report says of time, in the order in which it is to be read."""
    if len(report.points) <= MOST_DETAILED:
        pairs = [(point_table(report, p), breakdown_table(report, p)) for p in report.points]
        tables = [table for pair in pairs for table in pair]
    else:
        tables = [sweep_table(report), breakdown_table(report, typical_point(report))]
    return [table for table in tables if table.row_count]


def headline(report: Report) -> str:
    """What was measured, with a mark on what is not to be quoted."""
    quick = f"QUICK RUN, {count(report.repeats, 'run')} each, not to be quoted: " if report.quick else ""
    runs = "" if report.quick else f"; medians of {count(report.repeats, 'run')}"
    return f"{quick}time to first token, {report.model.source}, {report.model.dtype} on {report.model.device}{runs}"


def hardware_line(report: Report | TiersReport | ServingReport) -> str:
    """The machine and the versions, in a sentence."""
    hw, versions = report.hardware, report.versions
    parts = [f"{hw.cpu}, {count(hw.cores, 'core')}, {count(hw.threads, 'thread')}"]
    if hw.memory_gib is not None:
        parts.append(f"{hw.memory_gib:.0f} GiB")
    if hw.gpu:
        parts.append(f"{hw.gpu} ({hw.gpu_memory_gib:.0f} GiB)")
    if hw.others_busy is not None:
        parts.append(f"others kept {hw.others_busy:.2f} cores busy")
    parts.append(", ".join(f"{name} {version}" for name, version in versions.items()))
    return "; ".join(parts)


def point_table(report: Report, point: Point) -> Table:
    """One line for each candidate at one case."""
    case, documents = point.case, count(len(point.case.document_lengths), "document")
    what = f"{case.context_tokens:,} tokens of {documents} + {case.query_tokens} of the query"
    table = Table(title=f"{headline(report)}\n{what}, {case.links} link tokens a document", title_justify="left")
    _columns(table, "candidate", "tokens computed", "runs", "median ms", "least ms", "of full", "x floor", "x stock")
    for row in point.rows:
        table.add_row(
            row.label,
            f"{row.computed_tokens:,}",
            _runs(row, report.repeats),
            milliseconds(row.median_s),
            milliseconds(row.min_s),
            _percent(row.of_full),
            _times(row.x_floor),
            _times(row.x_stock),
        )
    return table


def sweep_table(report: Report) -> Table:
    """Candidates down, context lengths across: median milliseconds, then share of full, then times the floor."""
    table = Table(title=f"{headline(report)}\nby tokens of context: median ms; of full; x floor", title_justify="left")
    _columns(table, "candidate", *(f"{p.case.context_tokens:,}" for p in report.points))
    for label in dict.fromkeys(row.label for point in report.points for row in point.rows):
        rows = [next((row for row in point.rows if row.label == label), None) for point in report.points]
        table.add_row(label, *(_cell(row, report.repeats) if row else "" for row in rows))
    return table


def breakdown_table(report: Report, point: Point) -> Table:
    """Milliseconds of each step, a line for each linker that uses caches."""
    table = Table(
        title=f"where the time goes at {point.case.context_tokens:,} document tokens, median ms", title_justify="left"
    )
    _columns(table, "linker", *PARTS, "sum", "of the whole")
    for breakdown in point.breakdowns:
        table.add_row(breakdown.label, *_parts(breakdown))
    return table


def precision_table(report: PrecisionReport) -> Table:
    """One line for each architecture, dtype and linker of ``kvlink bench dtype``."""
    table = Table(
        title=f"errors of logits against float32, medians of {report.seeds} models x {report.prompts} prompts: "
        f"linked over ordinary prefill is to be {report.bound:g} at most",
        title_justify="left",
    )
    _columns(table, "architecture", "dtype", "linker", "attention", "ordinary", "linked", "ratio", "ratio of rms", "")
    for row in report.rows:
        table.add_row(
            row.model_type,
            row.dtype,
            row.linker,
            row.attention,
            f"{statistics.median(row.ordinary.largest):.1e}",
            f"{statistics.median(row.linked.largest):.1e}",
            f"{row.ratio_largest:.2f}",
            f"{row.ratio_rms:.2f}",
            "" if row.met else "over",
        )
    return table


def _parts(breakdown: Breakdown) -> list[str]:
    by_part = [milliseconds(breakdown.parts[part]) if breakdown.parts[part] else "-" for part in PARTS]
    return [*by_part, milliseconds(breakdown.sum_s), _percent(breakdown.sum_of_whole)]


def _cell(row: Row, repeats: int) -> str:
    short = "" if len(row.seconds) >= repeats else f" ({count(len(row.seconds), 'run')})"
    ratios = [_percent(row.of_full)] if row.kind == "linker" else []
    ratios += [_times(row.x_floor)] if row.kind == "linker" else []
    return f"{milliseconds(row.median_s)}{short}" + ("\n" + "; ".join(ratios) if ratios else "")


def _runs(row: Row, repeats: int) -> str:
    return str(len(row.seconds)) if len(row.seconds) >= repeats else f"{len(row.seconds)} of {repeats}"


def _percent(ratio: float | None) -> str:
    return "-" if ratio is None else f"{100 * ratio:.1f} %"


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}"


def _columns(table: Table, first: str, *rest: str) -> None:
    table.add_column(first, no_wrap=True)
    for name in rest:
        table.add_column(name, justify="right")
