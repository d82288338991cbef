"""``kvlink bench ttft`` and ``kvlink bench plot``, end to end on a tiny shape, and what they refuse."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from command import Kvlink

from kvlink_core.benchmark.report import read_report

TINY = ("bench", "ttft", "--model", "random:llama-tiny", "--query-tokens", "8")


def test_every_candidate_is_measured_and_written(kvlink: Kvlink, tmp_path: Path) -> None:
    done = kvlink(
        *TINY, "--documents", "3", "--document-tokens", "20", "--links", "3",
        "--json", str(tmp_path / "out.json"), "--plot", str(tmp_path / "out.svg"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out.json")
    (point,) = report.points
    rows = {row.label: row for row in point.rows}
    computed = {
        "full": 68, "reposition": 8, "reposition, from disk": 8, "link-tokens": 17, "link-tokens, from disk": 17,
    }  # fmt: skip
    assert computed.items() <= {label: row.computed_tokens for label, row in rows.items()}.items()
    floors = [row for row in point.rows if row.kind == "floor"]
    assert {8, 17} <= {row.computed_tokens for row in floors}
    assert len([row for row in point.rows if row.kind == "stock"]) == len(floors)
    assert all(len(row.seconds) == 7 for row in point.rows)
    linked = [row for row in point.rows if row.kind == "linker"]
    assert all(row.of_full for row in linked)
    # Of two layers cacheblend computes both, and some tokens again: nothing to compare with.
    compared = [row for row in linked if row.computed_tokens <= row.prompt_tokens]
    assert {row.name for row in linked} - {row.name for row in compared} == {"cacheblend"}
    assert all(row.x_floor and row.x_stock for row in compared)
    assert [b.label for b in point.breakdowns] == [row.label for row in linked]
    assert not report.quick
    assert "not to be quoted" not in done.stdout
    assert report.command.startswith("kvlink bench ttft --model random:llama-tiny")
    for label in rows:
        assert label in done.stdout
    assert (tmp_path / "out.svg").read_text().startswith("<?xml")

    assert kvlink("bench", "plot", str(tmp_path / "out.json"), str(tmp_path / "again.svg")).returncode == 0
    assert (tmp_path / "again.svg").read_bytes() == (tmp_path / "out.svg").read_bytes()


def test_a_sweep_with_a_budget_and_a_skip_says_what_it_left_out(kvlink: Kvlink, tmp_path: Path) -> None:
    done = kvlink(
        *TINY, "--context", "40,10,20", "--document-tokens", "10", "--linker", "reposition", "--quick",
        "--skip", "reposition@20", "--full-budget", "0", "--no-disk", "--no-breakdown",
        "--json", str(tmp_path / "out.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out.json")
    assert [point.case.context_tokens for point in report.points] == [10, 20, 40]
    assert [len(point.rows) for point in report.points] == [4, 4, 1]
    full = [next(row for row in point.rows if row.name == "full") for point in report.points]
    assert [len(row.seconds) for row in full] == [1, 1, 1]
    assert {row.source for point in report.points for row in point.rows} == {None, "memory"}
    assert not any(point.breakdowns for point in report.points)
    assert report.quick
    assert "reposition at 40 context tokens: left out as asked." in done.stdout
    assert "full at 10 context tokens: 1 instead of 2 runs, for its time budget." in done.stdout
    assert "QUICK RUN, 2 runs each, not to be quoted" in done.stdout


@pytest.mark.parametrize("step", ["links", "link"])
def test_linkers_that_the_model_cannot_run_are_named(
    kvlink: Kvlink, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    from kvlink_core.errors import ConfigError
    from kvlink_core.linking.link_tokens import LinkTokensLinker

    def refuse(*_: object, **__: object) -> None:
        raise ConfigError("it lacks glue.")

    monkeypatch.setattr(LinkTokensLinker, step, refuse)
    arguments = (*TINY, "--documents", "1", "--document-tokens", "9", "--quick", "--no-disk", "--repeats", "1")
    done = kvlink(*arguments, "--no-breakdown")
    assert done.returncode == 0, done.stderr
    assert "note: link-tokens was not measured: it lacks glue." in done.stdout
    refused = kvlink(*arguments, "--linker", "link-tokens")
    assert refused.returncode == 2
    assert "it lacks glue." in refused.stderr


def test_the_store_may_use_any_codec_there_is(kvlink: Kvlink) -> None:
    done = kvlink(*TINY, "--documents", "1", "--document-tokens", "9", "--quick", "--codec", "squeeze")
    assert done.returncode == 2
    assert "no codec 'squeeze'" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--model", "random:llama-9z"], "unknown shape 'llama-9z'"),
        (["--repeats", "6"], "needs at least 7 runs; with --quick"),
        (["--linker", "glue"], "unknown linker 'glue'"),
        (["--context", "500,x"], "--context '500,x'"),
        (["--context", "0"], "--context '0'"),
        (["--context", ""], "--context ''"),
        (["--context", "500", "--sweep"], "--context and --sweep"),
        (["--documents", "3", "--sweep"], "--documents and --sweep"),
        (["--context", "500,131072"], "does not fit the model's context of 131,072"),
        (["--skip", "full"], "NAME@TOKENS"),
        (["--skip", "full@many"], "NAME@TOKENS"),
        (["--skip", "full@1", "--skip", "full@2"], "'full' twice"),
        (["--skip", "glue@16000"], "the candidates are full, "),
        (["--json", "/nowhere/x"], "cannot write to '/nowhere/x'"),
        (["--plot", "/nowhere/x.svg"], "cannot write to '/nowhere/x.svg'"),
        (["--plot", "x.jpeg"], ".svg or .png"),
        (["--dtype", "float8"], "unknown dtype 'float8'"),
        (["--device", "cuda:77"], "cuda:77"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(kvlink: Kvlink, arguments: list[str], said: str) -> None:
    done = kvlink(*TINY, *arguments)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("content", "picture", "said"),
    [
        (None, "out.svg", "cannot read"),
        ("{}", "out.svg", "is not the JSON of kvlink bench ttft"),
        ("{}", "out.gif", ".svg or .png"),
    ],
)
def test_bench_plot_refuses_what_it_cannot_draw(
    kvlink: Kvlink, tmp_path: Path, content: str | None, picture: str, said: str
) -> None:
    if content is not None:
        (tmp_path / "in.json").write_text(content)
    done = kvlink("bench", "plot", str(tmp_path / "in.json"), str(tmp_path / picture))
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_figure_that_its_runs_do_not_give_is_not_drawn(kvlink: Kvlink, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    done = kvlink(
        *TINY, "--documents", "1", "--document-tokens", "9", "--quick", "--linker", "reposition", "--no-disk",
        "--json", str(path),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    figures = json.loads(path.read_text())
    figures["points"][0]["rows"][1]["median_s"] /= 2
    shutil.copy(path, tmp_path / "kept.json")
    path.write_text(json.dumps(figures))
    refused = kvlink("bench", "plot", str(path), str(tmp_path / "out.svg"))
    assert refused.returncode == 2
    assert "median_s of 'reposition'" in refused.stderr
    assert kvlink("bench", "plot", str(tmp_path / "kept.json"), str(tmp_path / "out.svg")).returncode == 0
