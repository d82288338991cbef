"""Quality against time to first token: a dot with its interval for each cell, and a line through what nothing beats."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvlink_core.benchmark.plot import check_plot
from kvlink_core.errors import ConfigError
from kvlink_core.evaluation.grid import FULL
from kvlink_core.evaluation.pareto import pareto_front
from kvlink_core.evaluation.summary import LESS_IS_BETTER, CellSummary
from kvlink_core.evaluation.tables import title_of

# Okabe and Ito's colours, which people with any kind of colour vision tell apart; black is kept for ``full``.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#999933")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
_BLACK, _GREY = "#000000", "#777777"


def draw_quality(summaries: Sequence[CellSummary], measures: Sequence[str], path: Path, *, footer: str) -> None:
    """Draw a panel for each group and measure.

    Args:
        summaries: of one or more groups.
        measures: by name; a panel whose group does not have it is left empty.
        path: .svg or .png.
        footer: what was measured, on what.

    Raises:
        ConfigError: as ``check_plot``, or the file cannot be written.
    """
    check_plot(path)
    import matplotlib  # an extra, which is there as was just checked
    import matplotlib.lines
    import matplotlib.ticker
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(s.group for s in summaries))
    looks = _looks(summaries)
    with matplotlib.rc_context({"font.size": 9, "svg.hashsalt": "kvlink"}):
        size = (5.6 * len(measures) + 0.4, 3.9 * len(groups) + 1.1)
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(len(groups), len(measures), squeeze=False)
        for group, row in zip(groups, panels, strict=True):
            members = [s for s in summaries if s.group == group]
            for measure, axes in zip(measures, row, strict=True):
                _panel(axes, members, measure, looks, matplotlib)
                axes.set_title(f"{group}: {title_of(measure)}", loc="left", fontsize=9)
        _legend(figure, summaries, looks, matplotlib)
        figure.supxlabel(footer, x=0.01, ha="left", fontsize=7, color=_GREY)
        try:
            figure.savefig(path, dpi=160, metadata={"Date": None} if path.suffix.lower() == ".svg" else None)
        except OSError as error:
            raise ConfigError(f"cannot write to {str(path)!r}: {error.strerror}.") from error


def _name(summary: CellSummary, several_models: bool) -> str:
    return f"{summary.model}: {summary.linker}" if several_models else summary.linker


def _looks(summaries: Sequence[CellSummary]) -> dict[tuple[str, str], tuple[str, str]]:
    """Colour by model and linker, marker by codec."""
    codecs = list(dict.fromkeys(s.codec for s in summaries if s.codec))
    linkers = list(dict.fromkeys((s.model, s.linker) for s in summaries if s.linker != FULL))
    models = list(dict.fromkeys(s.model for s in summaries))
    looks = {}
    for s in summaries:
        if s.linker == FULL:
            look = (_BLACK if models.index(s.model) == 0 else _GREY, "*")
        else:
            colour = _COLOURS[linkers.index((s.model, s.linker)) % len(_COLOURS)]
            look = (colour, _MARKERS[codecs.index(s.codec) % len(_MARKERS)])
        looks[s.cell.name, s.group] = look
    return looks


def _panel(
    axes: Any,
    members: Sequence[CellSummary],
    measure: str,
    looks: dict[tuple[str, str], tuple[str, str]],
    matplotlib: Any,
) -> None:
    shown = [s for s in members if s.ttft_s is not None and (measure in s.measures or _is_reference(s, measure))]
    scale = 1.0 if measure in LESS_IS_BETTER else 100.0
    points = []
    for s in shown:
        # ``full`` is what closeness is measured to: it is as close to itself as can be.
        found = s.measures.get(measure)
        mean = found.mean if found else float(measure == "top1")
        low, high = (found.low, found.high) if found else (mean, mean)
        assert s.ttft_s is not None
        points.append((1e3 * s.ttft_s, scale * mean))
        colour, marker = looks[s.cell.name, s.group]
        axes.plot([points[-1][0]] * 2, [scale * low, scale * high], color=colour, linewidth=1)
        axes.plot(*points[-1], marker, color=colour, markersize=9 if marker == "*" else 6, markeredgecolor="white")
    sign = -1 if measure in LESS_IS_BETTER else 1
    front = [points[i] for i in pareto_front([(x, sign * y) for x, y in points])]
    axes.plot([x for x, _ in front], [y for _, y in front], color=_GREY, linewidth=1, linestyle="--", zorder=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(matplotlib.ticker.LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.4g}")
    axes.minorticks_off()
    axes.set_xlabel("median time to first token, ms")
    axes.set_ylabel(title_of(measure) + (" (less is better)" if measure in LESS_IS_BETTER else ""))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)


def _is_reference(summary: CellSummary, measure: str) -> bool:
    return summary.linker == FULL and measure in ("kl", "top1")


def _legend(
    figure: Any, summaries: Sequence[CellSummary], looks: dict[tuple[str, str], tuple[str, str]], matplotlib: Any
) -> None:
    line = matplotlib.lines.Line2D
    several = len({s.model for s in summaries}) > 1
    linkers: dict[str, Any] = {}
    codecs: dict[str, Any] = {}
    for s in summaries:
        colour, marker = looks[s.cell.name, s.group]
        dot = marker if s.linker == FULL else "o"
        linkers[_name(s, several)] = line([], [], color=colour, marker=dot, linestyle="", markersize=6)
        if s.codec:
            codecs[s.codec] = line([], [], color=_GREY, marker=marker, linestyle="", markersize=6)
    handles = linkers | (codecs if len(codecs) > 1 else {})
    handles["Pareto front: nothing is both faster and better"] = line([], [], color=_GREY, linestyle="--", linewidth=1)
    figure.legend(
        handles.values(), handles.keys(), loc="outside upper left", ncols=4, frameon=False, fontsize=8,
        handletextpad=0.3, columnspacing=1.4,
    )  # fmt: skip
