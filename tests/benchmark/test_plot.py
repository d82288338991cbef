"""Pictures: drawn in both formats, with every candidate named; a lack of matplotlib is an error with a remedy."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from kvlink_core.benchmark.plot import check_plot, draw
from kvlink_core.benchmark.results import Report
from kvlink_core.errors import ConfigError

MakeReport = Callable[..., Report]


@pytest.fixture
def readable_svg(monkeypatch: pytest.MonkeyPatch) -> None:
    """Letters stay letters in SVG instead of becoming outlines."""
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")


@pytest.mark.usefixtures("readable_svg")
@pytest.mark.parametrize("contexts", [(5000,), (500, 5000, 32_000)])
def test_everything_is_named_in_the_picture(make_report: MakeReport, tmp_path: Path, contexts: tuple[int, ...]) -> None:
    draw(make_report(*contexts), tmp_path / "out.svg")
    text = (tmp_path / "out.svg").read_text()
    for word in (
        "full",
        "reposition",
        "reposition, from disk",
        "prefill",
        "rotate",
        "random:llama-tiny",
        "A processor",
    ):
        assert word in text, word
    assert "QUICK" not in text


@pytest.mark.usefixtures("readable_svg")
def test_a_quick_run_says_so_in_the_picture(make_report: MakeReport, tmp_path: Path) -> None:
    draw(make_report(5000, quick=True), tmp_path / "out.svg")
    assert "QUICK RUN, 3 runs each, not to be quoted" in (tmp_path / "out.svg").read_text()


def test_the_same_figures_make_the_same_picture(make_report: MakeReport, tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg"):
        draw(make_report(500, 5000), tmp_path / name)
    assert (tmp_path / "a.svg").read_bytes() == (tmp_path / "b.svg").read_bytes()


def test_png(make_report: MakeReport, tmp_path: Path) -> None:
    draw(make_report(500, 5000), tmp_path / "out.PNG")
    assert (tmp_path / "out.PNG").read_bytes().startswith(b"\x89PNG")


def test_without_breakdowns(make_report: MakeReport, tmp_path: Path) -> None:
    report = make_report(5000)
    bare = report.points[0].model_copy(update={"breakdowns": []})
    draw(report.model_copy(update={"points": [bare]}), tmp_path / "out.svg")
    assert (tmp_path / "out.svg").stat().st_size > 0


def test_a_missing_matplotlib_is_named_with_its_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ConfigError, match=r"pip install 'kvlink\[plot\]'"):
        check_plot(tmp_path / "out.svg")


@pytest.mark.parametrize("name", ["out.jpeg", "out", "out.svg.gz"])
def test_other_formats_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"\.svg or \.png"):
        check_plot(tmp_path / name)


def test_a_place_that_cannot_be_written(make_report: MakeReport, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot write"):
        draw(make_report(5000), tmp_path / "none" / "out.svg")
