"""The figures of ``kvlink bench codec`` in a page that people also write in: ``docs/codecs.md``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kvlink_core.benchmark.codec_results import CodecReport
from kvlink_core.benchmark.codec_tables import Grid, grids, verdicts
from kvlink_core.benchmark.report import read_json
from kvlink_core.errors import ConfigError

#: What is between these two lines is generated; the rest of the page is left as it is.
BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"


def read_codec_report(path: Path) -> CodecReport:
    """Read the JSON of ``kvlink bench codec`` back.

    Raises:
        ConfigError: not there, not such a file, or figures that do not follow from what is in it.
    """
    return read_json(path, CodecReport, "kvlink bench codec")


def render(reports: Sequence[CodecReport]) -> str:
    """The generated part of the page: the figures of every report, in their order."""
    parts = []
    for report in reports:
        hardware = report.speed.hardware if report.speed else None
        versions = ", ".join(f"{name} {version}" for name, version in report.versions.items() if name != "kvlink")
        on = f"{hardware.gpu or hardware.cpu}, {hardware.cores} cores. " if hardware else ""
        parts.append(f"<!-- Written by `{report.command}`. -->\n\n{on}{versions[:1].upper()}{versions[1:]}.")
        if report.quick:
            parts.append("**A quick run, with fewer runs or questions than a figure needs: not to be quoted.**")
        parts += [_markdown(grid) for grid in grids(report)]
        said = [f"- {line[:1].upper()}{line[1:]}" for line in verdicts(report)]
        said += [f"- Note: {note}" for note in report.notes]
        parts += ["\n".join(said)] if said else []
    return "\n\n".join(parts) + "\n"


def page_with(old: str, reports: Sequence[CodecReport]) -> str:
    """The page ``old`` with its figures replaced; where it has none, they come at the end.

    Raises:
        ConfigError: one of the two lines that enclose them is there without the other, or twice.
    """
    block = f"{BEGIN}\n{render(reports)}{END}\n"
    counts = old.count(BEGIN), old.count(END)
    if counts == (0, 0):
        return old + ("\n" if old and not old.endswith("\n\n") else "") + block
    before, _, rest = old.partition(BEGIN)
    _, end, after = rest.partition(END)
    if counts != (1, 1) or not end:
        raise ConfigError(f"the page must hold the lines {BEGIN!r} and {END!r} once each, in this order.")
    return before + block + after.removeprefix("\n")


def read_page(path: Path) -> str:
    """A page as it stands, "" for a new one.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return path.read_text("utf-8") if path.exists() else ""
    except OSError as error:
        raise ConfigError(f"cannot read {str(path)!r}: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{str(path)!r} is not text in UTF-8.") from error


def _markdown(grid: Grid) -> str:
    lines = [f"| {' | '.join(grid.header)} |", f"|{' --- |' * len(grid.header)}"]
    lines += [f"| `{row[0]}` | {' | '.join(row[1:])} |" for row in grid.rows]
    return f"**{grid.title[:1].upper()}{grid.title[1:]}**\n\n" + "\n".join(lines)
