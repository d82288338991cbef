"""The report of ``kvlink bench tiers``: as JSON, as tables, as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from rich.table import Table

from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions
from kvlink_core.benchmark.plot import check_plot
from kvlink_core.benchmark.results import Hardware
from kvlink_core.benchmark.tables import milliseconds
from kvlink_core.benchmark.tiers_hits import HitRow
from kvlink_core.benchmark.tiers_speed import SpeedRow, SpeedSettings
from kvlink_core.errors import ConfigError

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#777777")


class TiersReport(BaseModel):
    """All figures of one run."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: Literal["kvlink-bench-tiers/1"]
    command: str
    started: str
    model: str
    codec: str
    runs: int
    versions: dict[str, str]
    hardware: Hardware
    warnings: list[str]
    hits: list[HitRow]
    speed: list[SpeedRow]


def make_tiers_report(
    hits: Sequence[HitRow],
    speed: Sequence[SpeedRow],
    *,
    model: str,
    device: str,
    settings: SpeedSettings,
    watch: CoreWatch,
    command: str,
    started: datetime,
) -> TiersReport:
    """Put it together; ``watch`` has looked since before."""
    busy = watch.warning()
    return TiersReport(
        format="kvlink-bench-tiers/1",
        command=command,
        started=started.isoformat(timespec="seconds"),
        model=model,
        codec=settings.codec,
        runs=settings.runs,
        versions=describe_versions(),
        hardware=describe_hardware(torch.device(device), watch),
        warnings=[busy] if busy and speed else [],  # hit rates do not depend on it
        hits=list(hits),
        speed=list(speed),
    )


def tiers_tables(report: TiersReport) -> list[Table]:
    """Hit rates, then times."""
    tables = []
    if report.hits:
        tables.append(_hits_table(report.hits))
    if report.speed:
        tables.append(_speed_table(report))
    return tables


def _hits_table(rows: Sequence[HitRow]) -> Table:
    policies = list(dict.fromkeys(row.policy for row in rows))
    table = Table(title="hit rate in %, by documents and by tokens; the best of those that can be had is bold")
    table.add_column("requests")
    table.add_column("size", justify="right")
    for policy in policies:
        table.add_column(policy, justify="right")
    for trace, share in dict.fromkeys((row.trace, row.share) for row in rows):
        found = {row.policy: row for row in rows if (row.trace, row.share) == (trace, share)}
        best = max(row.token_hits for name, row in found.items() if name != "clairvoyant")
        cells = []
        for policy in policies:
            row = found[policy]
            text = f"{100 * row.document_hits:.1f} / {100 * row.token_hits:.1f}"
            cells.append(f"[bold]{text}[/bold]" if row.token_hits == best else text)
        table.add_row(trace, f"{100 * share:g} %", *cells)
    return table


def _speed_table(report: TiersReport) -> Table:
    table = Table(title=f"until all caches are there, {report.model}, {report.codec}; medians of {report.runs}, ms")
    for name in ("store", "load", "compute", "auto", "auto / better", "loaded"):
        table.add_column(name, justify="left" if name == "store" else "right")
    for row in report.speed:
        load, compute, auto = row.medians
        table.add_row(
            _link(row), milliseconds(load), milliseconds(compute), milliseconds(auto),
            f"{row.ratio:.2f}", f"{100 * row.loaded:.0f} %",
        )  # fmt: skip
    return table


def _link(row: SpeedRow) -> str:
    return f"{row.bytes_per_s / 1e6:,g} MB/s, {row.latency_s * 1e3:g} ms"


def draw_tiers(report: TiersReport, path: Path) -> None:
    """Draw what there is of both.

    Raises:
        ConfigError: as ``check_plot``, or the file cannot be written.
    """
    check_plot(path)
    import matplotlib
    from matplotlib.figure import Figure

    swept = [t for t in dict.fromkeys(r.trace for r in report.hits) if len({r.share for r in report.hits if r.trace == t}) > 1]  # fmt: skip  # noqa: E501
    panels = [(_draw_hits, t) for t in swept] + ([(_draw_speed, "")] if report.speed else [])
    if not panels:
        raise ConfigError("there is nothing to draw: no trace at several sizes, and no times.", param="plot")
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "kvlink"}):
        figure = Figure(figsize=(8, 3.6 * len(panels)), layout="constrained")
        for axes, (draw, trace) in zip(figure.subplots(len(panels), 1, squeeze=False)[:, 0], panels, strict=True):
            draw(axes, report, trace)
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"cannot write to {str(path)!r}: {error.strerror}.") from error


def _draw_hits(axes: Any, report: TiersReport, trace: str) -> None:
    rows = [row for row in report.hits if row.trace == trace]
    for policy, colour in zip(dict.fromkeys(row.policy for row in rows), _COLOURS, strict=False):
        mine = [row for row in rows if row.policy == policy]
        style = ":" if policy == "clairvoyant" else "-"
        axes.plot(
            [100 * r.share for r in mine], [100 * r.token_hits for r in mine], style, marker="o", markersize=4,
            color=colour, label=policy,
        )  # fmt: skip
    axes.set_xscale("log")
    axes.set_xticks([100 * r.share for r in mine], [f"{100 * r.share:g}" for r in mine])
    axes.set(title=trace, xlabel="size of the cache, % of all tokens", ylabel="tokens that hit, %", ylim=(0, None))
    axes.legend(frameon=False)


def _draw_speed(axes: Any, report: TiersReport, _: str) -> None:
    places = range(len(report.speed))
    for number, name in enumerate(("always load", "always compute", "auto")):
        medians = [1e3 * row.medians[number] for row in report.speed]
        axes.plot(
            places, medians, "o-" if name == "auto" else "s--", color=_COLOURS[number] if name != "auto" else "#000000",
            label=name, markersize=4,
        )  # fmt: skip
    axes.set_yscale("log")
    axes.set_xticks(places, [_link(row).replace(", ", "\n") for row in report.speed])
    axes.set(title=f"Until all caches of a request are there, {report.model}, {report.codec}", ylabel="ms, medians")
    axes.legend(frameon=False)
