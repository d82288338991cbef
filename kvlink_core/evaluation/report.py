"""What a run leaves beside its answers: ``summary.json`` for programs, ``summary.md`` for pages."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict

from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions
from kvlink_core.benchmark.report import write_text
from kvlink_core.benchmark.results import Hardware
from kvlink_core.benchmark.tables import count
from kvlink_core.evaluation.records import RunConfig
from kvlink_core.evaluation.summary import CellSummary
from kvlink_core.evaluation.tables import markdown


class Summary(BaseModel):
    """``summary.json``: what was asked, when and on what the last part of it ran, and what it came to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    config: RunConfig
    started: str
    hardware: Hardware
    versions: dict[str, str]
    cells: tuple[CellSummary, ...]


def write_summary(
    path: Path, config: RunConfig, cells: Sequence[CellSummary], *, started: datetime, watch: CoreWatch
) -> None:
    """Write both files into the run's folder.

    Args:
        path: the folder.
        config, cells: of the run.
        started: when the last part of it was.
        watch: has looked since then.

    Raises:
        ConfigError: they cannot be written.
    """
    summary = Summary(
        config=config,
        started=started.isoformat(timespec="seconds"),
        hardware=describe_hardware(torch.device(config.device), watch),
        versions=describe_versions(),
        cells=tuple(cells),
    )
    write_text(summary.model_dump_json(indent=1) + "\n", path / "summary.json")
    write_text(markdown(cells), path / "summary.md")


def footer_of(config: RunConfig, cells: Sequence[CellSummary]) -> str:
    """One line under a plot: models, questions, intervals."""
    models = ", ".join(model.label for model in config.models)
    most = max(cell.questions for cell in cells)
    return (
        f"{models}; {config.dtype or 'default dtype'} on {config.device}; up to {count(most, 'question')} a panel; "
        "dots: means and medians, lines: 95 % bootstrap intervals; TTFT from caches in host memory, one run each"
    )
