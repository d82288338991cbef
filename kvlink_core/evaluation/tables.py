"""Summaries as tables: for a terminal, and as Markdown to be quoted."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from kvlink_core.benchmark.tables import milliseconds
from kvlink_core.evaluation.compare import Comparison
from kvlink_core.evaluation.summary import MEASURES, CellSummary, Estimate

_TITLES = {
    "em": "EM %",
    "f1": "F1 %",
    "exact": "exact %",
    "rouge_l": "ROUGE-L %",
    "kl": "KL, nats",
    "top1": "top-1 %",
    "nll": "NLL, nats",
}


def title_of(measure: str) -> str:
    """A measure as it is headed, unit included."""
    return _TITLES[measure]


def shown_value(measure: str, value: float) -> str:
    """A value in the unit of its heading."""
    return f"{value:.3g}" if measure in ("kl", "nll") else f"{100 * value:.1f}"


def columns_and_rows(summaries: Sequence[CellSummary]) -> tuple[list[str], list[list[str]]]:
    """The table of one group: headings, and a row for each cell. Columns that nothing is in are left out."""
    measures = [name for name in MEASURES if any(name in s.measures for s in summaries)]
    several = len({s.model for s in summaries}) > 1
    headings = [*(["model"] if several else []), "linker", "codec", *(title_of(name) for name in measures)]
    headings += ["TTFT ms", "of full", "decode ms", "computed", "bytes/token"]
    rows = []
    for s in summaries:
        row = [*([s.model] if several else []), s.linker, s.codec or "-"]
        row += [_estimate(name, s.measures.get(name)) for name in measures]
        row.append(milliseconds(s.ttft_s) if s.ttft_s is not None else "-")
        row.append(f"{100 * s.of_full:.1f} %" if s.of_full is not None else "-")
        row.append(milliseconds(s.decode_s) if s.codec and s.decode_s is not None else "-")
        row.append(f"{s.computed_tokens:,.0f}")
        row.append(f"{s.bytes_per_token:,.0f}" if s.bytes_per_token is not None else "-")
        rows.append(row)
    return headings, rows


def summary_tables(summaries: Sequence[CellSummary]) -> list[Table]:
    """A table for each group."""
    tables = []
    for group, members in _by_group(summaries):
        headings, rows = columns_and_rows(members)
        tables.append(_table(f"{group}: {_questions(members)}; means and 95 % intervals", headings, rows))
    return tables


def comparison_table(found: Sequence[Comparison]) -> Table:
    """One line for each pair of cells, data set and measure."""
    several = len({(c.first, c.second) for c in found}) > 1
    headings = [*(["cells"] if several else []), "data", "measure", "questions", "first", "second", "difference"]
    headings += ["differ", "p"]
    rows = []
    for c in found:
        d = c.found.difference
        cells = [c.first if c.first == c.second else f"{c.first} : {c.second}"] if several else []
        interval = [shown_value(c.measure, value) for value in (d.mean, d.low, d.high)]
        rows.append([
            *cells, c.group, title_of(c.measure), f"{c.found.questions:,}", shown_value(c.measure, c.first_mean),
            shown_value(c.measure, c.second_mean), f"{interval[0]} [{interval[1]}, {interval[2]}]",
            f"{c.found.unequal:,}", f"{c.found.p:.2g}",
        ])  # fmt: skip
    return _table("second less first on the same questions, 95 % intervals; p: paired permutation test", headings, rows)


def markdown(summaries: Sequence[CellSummary]) -> str:
    """The same tables for a page."""
    parts = []
    for group, members in _by_group(summaries):
        headings, rows = columns_and_rows(members)
        lines = [f"| {' | '.join(row)} |" for row in [headings, ["---"] * len(headings), *rows]]
        parts.append(f"{group}: {_questions(members)}\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def _by_group(summaries: Sequence[CellSummary]) -> list[tuple[str, list[CellSummary]]]:
    names = dict.fromkeys(s.group for s in summaries)
    return [(name, [s for s in summaries if s.group == name]) for name in names]


def _questions(summaries: Sequence[CellSummary]) -> str:
    """How many were asked, and how many could not be; models may differ in that."""
    asked = sorted({s.questions for s in summaries})
    skipped = sorted({s.skipped for s in summaries} - {0})
    shown = " to ".join(f"{n:,}" for n in dict.fromkeys((asked[0], asked[-1])))
    return f"{shown} questions" + (f" ({' to '.join(str(n) for n in skipped)} skipped)" if skipped else "")


def _estimate(measure: str, found: Estimate | None) -> str:
    if found is None:
        return "-"
    mean, low, high = (shown_value(measure, value) for value in (found.mean, found.low, found.high))
    return f"{mean} [{low}, {high}]"


def _table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(title=title, title_justify="left")
    words = ("model", "linker", "codec", "cells", "data", "measure")
    for heading in headings:
        table.add_column(heading, justify="left" if heading in words else "right")
    for row in rows:
        table.add_row(*row)
    return table
