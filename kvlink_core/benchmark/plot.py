"""The figures of ``kvlink bench ttft`` as a picture: time against context length, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlink_core.benchmark.results import PARTS, Breakdown, Point, Report, Row
from kvlink_core.benchmark.tables import count, milliseconds, typical_point
from kvlink_core.errors import ConfigError

#: Formats by the ending of the file's name.
FORMATS = (".svg", ".png")

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black is kept for ``full``.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999933")
_BLACK, _GREY = "#000000", "#777777"
_PART_COLOURS = dict(zip(PARTS, ("#56B4E9", "#CC79A7", "#E69F00", "#009E73", "#0072B2", "#000000"), strict=True))

#: Pieces of a bar larger than this share have their milliseconds written on them; white shows better on some.
_LABELLED = 0.06
_DARK = ("prefill", "copy", "sample")

_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def check_plot(path: Path) -> None:
    """Learn before the work, not after it, whether a plot can be drawn.

    Raises:
        ConfigError: matplotlib is not installed, or the file is named for a format that is not drawn.
    """
    if path.suffix.lower() not in FORMATS:
        raise ConfigError(f"--plot {str(path)!r}: name a file that ends in {' or '.join(FORMATS)}.", param="plot")
    _matplotlib()


def draw(report: Report, path: Path) -> None:
    """Draw the report.

    Raises:
        ConfigError: as ``check_plot``, or the file cannot be written.
    """
    check_plot(path)
    matplotlib, figure_class = _matplotlib()
    typical = typical_point(report)
    sweep = len(report.points) > 1
    linkers = [row for row in typical.rows if row.kind in ("full", "linker")]
    heights = [4.4 if sweep else 0.9 + 0.27 * len(linkers)]
    heights += [1.1 + 0.27 * len(typical.breakdowns)] if typical.breakdowns else []
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "kvlink"}):
        figure = figure_class(figsize=(8, sum(heights) + 0.6), layout="constrained")
        parts = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        (_lines if sweep else _dots)(parts[0].subplots(), report)
        if typical.breakdowns:
            _shares(parts[1].subplots(), typical)
        figure.suptitle(_title(report), x=0.01, ha="left", fontsize=10)
        figure.supxlabel(_footer(report), x=0.01, ha="left", fontsize=7, color=_GREY)
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"cannot write to {str(path)!r}: {error.strerror}.") from error


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib
        import matplotlib.ticker
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "a plot needs matplotlib, which is not installed; pip install 'kvlink[plot]', or leave --plot out and "
            "draw the JSON elsewhere with `kvlink bench plot`.",
            param="plot",
        ) from error
    return matplotlib, Figure


def _title(report: Report) -> str:
    quick = f"QUICK RUN, {count(report.repeats, 'run')} each, not to be quoted\n" if report.quick else ""
    case = typical_point(report).case
    return (
        f"{quick}Time to first token: {report.model.source}, {report.model.dtype}, documents of "
        f"{case.document_tokens:,} tokens, query of {case.query_tokens}"
    )


def _footer(report: Report) -> str:
    hardware = report.hardware
    where = hardware.gpu or f"{hardware.cpu}, {count(hardware.threads, 'thread')} on {count(hardware.cores, 'core')}"
    least = min(len(row.seconds) for point in report.points for row in point.rows)
    runs = f"medians of {report.repeats} runs" + (f" (of `full` down to {least})" if least < report.repeats else "")
    versions = ", ".join(f"{name} {report.versions[name]}" for name in ("kvlink", "torch") if name in report.versions)
    return f"{where}; {runs}; {versions}"


def _lines(axes: Any, report: Report) -> None:
    """Several cases: a line for each candidate, and a dotted one for its floor."""
    linkers = list(dict.fromkeys(r.name for p in report.points for r in p.rows if r.kind == "linker"))
    last = max(point.case.context_tokens for point in report.points)
    ends: list[tuple[float, str, str]] = []
    for label in dict.fromkeys(r.label for p in report.points for r in p.rows if r.kind in ("full", "linker")):
        found = [(p, row) for p in report.points for row in p.rows if row.label == label]
        row = found[0][1]
        number = linkers.index(row.name) if row.kind == "linker" else 0
        colour = _COLOURS[number % len(_COLOURS)] if row.kind == "linker" else _BLACK
        disk = row.source == "disk"
        x = [point.case.context_tokens for point, _ in found]
        y = [row.median_s for _, row in found]
        axes.plot(
            x, y, color=colour, linewidth=1.3, linestyle="--" if disk else "-", markersize=4,
            marker=_MARKERS[number % len(_MARKERS)], markerfacecolor="white" if disk else colour,
        )  # fmt: skip
        if row.source == "memory":
            floors = [floor.median_s for floor in (_floor(p, r, "floor") for p, r in found) if floor]
            axes.plot(x[: len(floors)], floors, color=colour, linewidth=1, linestyle=":")
        ends.append((y[-1], f"{label}  {_readable(y[-1])}" + ("" if x[-1] == last else f" at {x[-1]:,}"), colour))
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(_matplotlib()[0].ticker.LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: _readable(value))
    ticks = [point.case.context_tokens for point in report.points]
    axes.set_xticks(ticks, [f"{t:,}" for t in ticks])
    axes.minorticks_off()
    axes.set_xlabel("tokens of context; dotted: the floor, which is the model's forward pass alone")
    _plain(axes, grid="both")
    _label_ends(axes, ends)


def _label_ends(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """A label at the right of each line, moved apart where lines end close to each other."""
    low, high = axes.get_ylim()
    apart = (high / low) ** (1 / 24)  # so many labels fit one above the other
    at = 0.0
    for y, label, colour in sorted(ends):
        at = max(y, at * apart)
        axes.annotate(
            label, (1.015, at), xycoords=axes.get_yaxis_transform(), color=colour, va="center", fontsize=8,
            annotation_clip=False,
        )  # fmt: skip


def _dots(axes: Any, report: Report) -> None:
    """One case: a dot for each candidate, with marks for its floors."""
    point = report.points[0]
    rows = [row for row in reversed(point.rows) if row.kind in ("full", "linker")]
    for y, row in enumerate(rows):
        colour = _BLACK if row.kind == "full" else _COLOURS[0]
        floor, stock = _floor(point, row, "floor"), _floor(point, row, "stock")
        for mark, beside in (("|", floor), ("x", stock)):
            if beside is not None:
                axes.plot([beside.median_s], [y], mark, color=_GREY, markersize=9 if mark == "|" else 5)
        axes.plot([min(row.seconds), max(row.seconds)], [y, y], color=colour, linewidth=1)
        axes.plot([row.median_s], [y], "o", color=colour, markersize=5)
        ratio = f", {100 * row.of_full:.1f} % of full" if row.of_full is not None and row.kind != "full" else ""
        ratio += f", {row.x_floor:.2f} x floor" if row.x_floor is not None else ""
        right = max([*row.seconds, *(r.median_s for r in (floor, stock) if r)])
        axes.annotate(
            f"{_readable(row.median_s)}{ratio}", (right, y), xytext=(7, 0), textcoords="offset points", va="center",
            fontsize=8,
        )  # fmt: skip
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.set_xscale("log")
    left, right = axes.get_xlim()
    axes.set_xlim(left, right * (right / left) ** 0.3)  # room for the last label
    axes.xaxis.set_major_locator(_matplotlib()[0].ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: _readable(value))
    axes.minorticks_off()
    axes.set_xlabel(
        "dot: median; line: all runs; |: the floor, the model's forward pass alone; x: that of transformers"
    )
    _plain(axes, grid="x")


def _floor(point: Point, row: Row, kind: str) -> Row | None:
    """The floor of a linker's row."""
    same = (row.prompt_tokens, row.computed_tokens)
    found = (r for r in point.rows if r.kind == kind and (r.prompt_tokens, r.computed_tokens) == same)
    return next(found, None) if row.kind == "linker" else None


def _shares(axes: Any, point: Point) -> None:
    """A bar for each linker, a piece for each step, as shares of the linker's own time."""
    breakdowns: list[Breakdown] = [*reversed(point.breakdowns)]
    shown = [part for part in PARTS if any(b.parts[part] > 0 for b in breakdowns)]
    starts = [0.0] * len(breakdowns)
    for part in shown:
        shares = [b.parts[part] / b.sum_s for b in breakdowns]
        axes.barh(
            range(len(breakdowns)), shares, left=starts, color=_PART_COLOURS[part], height=0.62, edgecolor="white",
            linewidth=0.5, label=part,
        )  # fmt: skip
        for y, (start, share, breakdown) in enumerate(zip(starts, shares, breakdowns, strict=True)):
            if share > _LABELLED:
                text = milliseconds(breakdown.parts[part])
                dark = part in _DARK
                axes.annotate(
                    text, (start + share / 2, y), ha="center", va="center", fontsize=7,
                    color="white" if dark else "black",
                )  # fmt: skip
        starts = [start + share for start, share in zip(starts, shares, strict=True)]
    for y, breakdown in enumerate(breakdowns):
        axes.annotate(
            f"{milliseconds(breakdown.sum_s)} ms", (1, y), xytext=(4, 0), textcoords="offset points", va="center",
            fontsize=8, annotation_clip=False,
        )  # fmt: skip
    axes.set_yticks(range(len(breakdowns)), [b.label for b in breakdowns])
    axes.set_ylim(-0.6, len(breakdowns) - 0.4)
    axes.set_xlim(0, 1)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel(f"share of the linker's own time at {point.case.context_tokens:,} tokens of context; in it, ms")
    axes.legend(
        loc="lower left", bbox_to_anchor=(-0.01, 1.0), ncols=len(PARTS), frameon=False, fontsize=8, handlelength=0.9,
        handletextpad=0.4, columnspacing=1.4, borderpad=0.2,
    )  # fmt: skip
    _plain(axes, grid="")


def _readable(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{1e6 * seconds:.3g} \u00b5s"
    return f"{1e3 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _plain(axes: Any, *, grid: str) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    if grid:
        axes.grid(axis=grid, color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
