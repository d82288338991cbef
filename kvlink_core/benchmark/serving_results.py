"""What ``kvlink bench serve`` found: its JSON, and its tables."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime
from typing import Literal

from pydantic import BaseModel, ConfigDict
from rich.table import Table

from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions
from kvlink_core.benchmark.results import Hardware, Model
from kvlink_core.benchmark.serving import Measured, ServingCase
from kvlink_core.models import LoadedModel


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Target(_Record):
    """A figure and what it should be.

    Attributes:
        what: described.
        figure: a ratio.
        bound: it should be at most, or at least, this.
        direction: which of the two.
    """

    what: str
    figure: float
    bound: float
    direction: Literal["at most", "at least"]

    @property
    def met(self) -> bool:
        """Whether it is."""
        return self.figure <= self.bound if self.direction == "at most" else self.figure >= self.bound


class ServingReport(_Record):
    """All of it; seconds, tokens a second, and bytes, by name, every run."""

    format: Literal["kvlink-bench-serve/1"] = "kvlink-bench-serve/1"
    command: str
    started: str
    quick: bool
    versions: dict[str, str]
    hardware: Hardware
    model: Model
    case: dict[str, int]
    step_tokens: int
    stretch: float | None
    decode_s: dict[str, list[float]]
    tokens_per_s: dict[str, list[float]]
    first_token_s: dict[str, list[float]]
    gaps_s: dict[str, list[float]]
    document_bytes: dict[str, int]
    targets: list[Target]
    warnings: list[str]


def serving_report(
    model: LoadedModel,
    source: str,
    case: ServingCase,
    measured: Measured,
    *,
    step_tokens: int,
    stretch: float | None,
    quick: bool,
    watch: CoreWatch,
    command: str,
    started: datetime,
) -> ServingReport:
    """The report of what was measured."""
    busy = watch.warning()
    return ServingReport(
        command=command,
        started=started.isoformat(timespec="seconds"),
        quick=quick,
        versions=describe_versions(),
        hardware=describe_hardware(model.device, watch),
        model=Model.of(model, source),
        case=asdict(case),
        step_tokens=step_tokens,
        stretch=stretch,
        decode_s=_lists(measured.decode),
        tokens_per_s=_lists(measured.throughput),
        first_token_s=_lists(measured.first_tokens),
        gaps_s=_lists(measured.gaps),
        document_bytes=dict(measured.document_bytes),
        targets=targets(measured),
        warnings=([busy] if busy else []) + (["quick: not to be quoted."] if quick else []),
    )


def targets(measured: Measured) -> list[Target]:
    """The figures of DESIGN section 7 that are about many requests."""
    decode = {name: statistics.median(runs) for name, runs in measured.decode.items()}
    rates = {name: statistics.median(runs) for name, runs in measured.throughput.items()}
    first = {name: statistics.median(runs) for name, runs in measured.first_tokens.items()}
    gaps = measured.gaps["with cold documents"]
    one, many = measured.document_bytes.values()
    return [
        Target(
            what="decode step of a full batch / bare forward, in place",
            figure=decode["engine"] / decode["bare in place"], bound=1.10, direction="at most",
        ),
        Target(
            what="decode step of a full batch / bare forward, DynamicCache",
            figure=decode["engine"] / decode["bare DynamicCache"], bound=1.10, direction="at most",
        ),
        Target(
            what="the same, no document shared / bare forward, in place",
            figure=decode["engine, own documents"] / decode["bare in place, own documents"],
            bound=1.10, direction="at most",
        ),
        Target(what="memory of documents, all requests / one", figure=many / one, bound=1.0, direction="at most"),
        Target(
            what="output tokens/s, batch / one at a time",
            figure=rates["batch"] / rates["one at a time"], bound=4.0, direction="at least",
        ),
        Target(
            what="p50 time to first token under load, linked / full",
            figure=first["link-tokens"] / first["full"], bound=0.10, direction="at most",
        ),
        Target(
            what="time between tokens while cold documents arrive, p99 / p50",
            figure=percentile(gaps, 99) / percentile(gaps, 50), bound=3.0, direction="at most",
        ),
    ]  # fmt: skip


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that ``percent`` of all do not exceed."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]


def serving_tables(report: ServingReport) -> list[Table]:
    """For people."""
    case = report.case
    title = (
        f"{case['requests']} requests on {case['documents']} documents of {case['document_tokens']} tokens, "
        f"{report.model.source}, {report.model.dtype} on {report.model.device}"
    )
    figures = Table(title=title, title_justify="left")
    for column in ("figure", "p50", "p99", "runs"):
        figures.add_column(column, justify="left" if column == "figure" else "right")
    groups: Sequence[tuple[str, Mapping[str, list[float]], float, str]] = (
        ("decode step", report.decode_s, 1e3, "ms"),
        ("output", report.tokens_per_s, 1, "tokens/s"),
        ("first token", report.first_token_s, 1e3, "ms"),
        ("between tokens", report.gaps_s, 1e3, "ms"),
    )
    for what, rows, factor, unit in groups:
        for name, runs in rows.items():
            p50, p99 = (f"{percentile(runs, p) * factor:,.4g} {unit}" for p in (50, 99))
            figures.add_row(f"{what}, {name}", p50, p99, str(len(runs)))
    for name, nbytes in report.document_bytes.items():
        figures.add_row(f"documents, {name}", f"{nbytes / 2**20:,.1f} MiB", "", "")
    judged = Table(title="targets", title_justify="left")
    for column in ("what", "figure", "target", ""):
        judged.add_column(column, justify="left" if column == "what" else "right")
    for target in report.targets:
        sign = "<=" if target.direction == "at most" else ">="
        judged.add_row(
            target.what, f"{target.figure:.3f}", f"{sign} {target.bound:.2f}", "met" if target.met else "NOT MET"
        )
    return [figures, judged]


def _lists(runs: Mapping[str, Sequence[float]]) -> dict[str, list[float]]:
    return {name: list(values) for name, values in runs.items()}
