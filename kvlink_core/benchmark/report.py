"""The report of ``kvlink bench ttft``: put together, written, read back."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel, ValidationError

from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware, describe_versions
from kvlink_core.benchmark.results import Model, Point, Report
from kvlink_core.benchmark.tables import count
from kvlink_core.benchmark.ttft import ENOUGH_RUNS, Settings
from kvlink_core.errors import ConfigError
from kvlink_core.models import LoadedModel

if TYPE_CHECKING:
    from kvlink_core.benchmark.codec_results import CodecReport
    from kvlink_core.benchmark.precision import PrecisionReport
    from kvlink_core.benchmark.serving_results import ServingReport

AnyReport = TypeVar("AnyReport", bound=BaseModel)


def make_report(
    model: LoadedModel,
    source: str,
    settings: Settings,
    points: Sequence[Point],
    warnings: Sequence[str],
    *,
    watch: CoreWatch,
    command: str,
    started: datetime,
) -> Report:
    """The report of what ``measure`` returned.

    Args:
        model: that was measured, which the command line called ``source``.
        settings, points, warnings: what ``measure`` was given and gave.
        watch: has looked since before.
        command: that was run.
        started: when, with a time zone.
    """
    busy = watch.warning()
    quick = settings.repeats < ENOUGH_RUNS
    few = f"quick, with {count(settings.repeats, 'run')} each: not to be quoted; a figure needs {ENOUGH_RUNS} or more."
    return Report(
        format="kvlink-bench-ttft/1",
        command=command,
        started=started.isoformat(timespec="seconds"),
        quick=quick,
        repeats=settings.repeats,
        full_budget_s=settings.full_budget_s,
        versions=describe_versions(),
        hardware=describe_hardware(model.device, watch),
        model=Model.of(model, source),
        warnings=[*([few] if quick else []), *([busy] if busy else []), *warnings],
        points=list(points),
    )


def write_report(report: Report | PrecisionReport | CodecReport | ServingReport, path: Path) -> None:
    """Write the JSON.

    Raises:
        ConfigError: the file cannot be written.
    """
    write_text(report.model_dump_json(indent=1) + "\n", path)


def write_text(text: str, path: Path) -> None:
    """Write a file.

    Raises:
        ConfigError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {str(path)!r}: {error.strerror}.") from error


def read_report(path: Path) -> Report:
    """Read the JSON of ``kvlink bench ttft`` back.

    Raises:
        ConfigError: not there, not such a file, or figures that do not follow from its runs.
    """
    return read_json(path, Report, "kvlink bench ttft")


def read_json(path: Path, kind: type[AnyReport], command: str) -> AnyReport:
    """Read a report that ``command`` wrote. Raises ``ConfigError`` as ``read_report`` does."""
    try:
        return kind.model_validate_json(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not text in UTF-8, let alone the JSON of {command}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(step) for step in first["loc"]) or "the file"
        raise ConfigError(f"{str(path)!r} is not the JSON of {command}: {where}: {first['msg']}.") from error
