"""``kvlink eval``: runs end to end on generated worlds and, where they are, on the real data beside the project."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from command import Kvlink

from kvlink_core.evaluation.records import read_rows

DATA = Path(__file__).parents[2].parent / "shared" / "data" / "qa"


def real(name: str) -> str:
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"the real data is not here: ../shared/data/qa/{name} is missing")
    return str(path)


def test_a_grid_from_questions_to_table_plot_and_comparison(kvlink: Kvlink, tmp_path: Path) -> None:
    """The embedded model on its own world: all right under ``full``; what goes through int4 is close to it."""
    out, plot = tmp_path / "run", tmp_path / "plot.svg"
    done = kvlink(
        "eval", "run", "--data", "worlds", "--questions", "3", "--linker", "link-tokens", "--linker", "epic:k=2",
        "--k", "0", "--k", "5", "--codec", "raw", "--codec", "int4", "--max-tokens", "48", "--out", str(out),
        "--plot", str(plot),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "worlds: 3 questions" in done.stdout
    rows = read_rows(out)
    assert {row.linker for row in rows} == {"full", "reposition", "link-tokens:k=5", "epic:k=2"}
    assert all(row.scores["exact"] == 1 for row in rows if row.linker == "full")
    assert plot.stat().st_size > 0
    summary = json.loads((out / "summary.json").read_text())
    assert len(summary["cells"]) == 7
    assert (out / "summary.md").read_text().startswith("worlds: 3 questions")
    shown = kvlink("eval", "show", str(out), "--by", "kind")
    assert {row.kind for row in rows} == {
        kind for kind in ("fact", "pronoun", "two-hop") if f": {kind}:" in shown.stdout
    }
    compared = kvlink("eval", "compare", f"{out}#reposition/raw", f"{out}#reposition/int4", "--metric", "kl")
    assert compared.returncode == 0
    assert "second less first" in compared.stdout


def test_summaries_and_plain_text_in_one_grid(kvlink: Kvlink, tmp_path: Path, tiny_model_dir: Path) -> None:
    news = [{"document": f"It rains in {city}. ||||| It is wet.", "summary": f"Rain in {city}."} for city in ("A", "B")]
    (tmp_path / "news.jsonl").write_text("".join(json.dumps(row) + "\n" for row in news))
    (tmp_path / "book.txt").write_text(" ".join(f"word{i}" for i in range(30)))
    done = kvlink(
        "eval", "run", "--model", str(tiny_model_dir), "--data", str(tmp_path / "news.jsonl"), "--data",
        str(tmp_path / "book.txt"), "--text-words", "4", "--documents", "2", "--linker", "reposition",
        "--max-tokens", "8", "--out", str(tmp_path / "run"), "--plot", str(tmp_path / "plot.png"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run")
    assert [(row.dataset, sorted(row.scores)) for row in rows] == [
        *[("news", ["f1", "rouge_l"])] * 4,
        *[("book", [])] * 4,  # two questions: 2 x 4 words and 4 that follow, 30 words
    ]
    assert "ROUGE-L %" in done.stdout
    assert all(row.top1 is not None for row in rows if row.linker == "reposition")
    assert kvlink("eval", "show", str(tmp_path / "run"), "--metric", "em", "--plot", "x.svg").returncode == 2


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("nq_open_10docs_gold0.jsonl.gz", ("--gold-at", "0", "--gold-at", "1")),
        ("2wikimultihopqa_dev.jsonl.gz", ()),
        ("hotpotqa_dev_distractor.jsonl.gz", ("--follow", "reference")),
        ("musique_dev.jsonl.gz", ("--document-words", "40")),
        ("squad_dev_v1.1.json.gz", ("--template", "Question: {question}")),
    ],
)
def test_real_questions_end_to_end(kvlink: Kvlink, tmp_path: Path, name: str, options: tuple[str, ...]) -> None:
    """The model is poor on real text; that every cell answers, close to ``full`` or not, is what is seen here."""
    source = real(name)
    done = kvlink(
        "eval", "run", "--data", source, "--questions", "2", "--documents", "2", "--max-tokens", "4",
        "--linker", "link-tokens", "--linker", "cacheblend:ratio=1", "--codec", "raw", "--codec", "int4",
        "--out", str(tmp_path / "run"), *options,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = read_rows(tmp_path / "run")
    places = options.count("--gold-at") or 1
    assert len(rows) == 2 * 5 * places
    for row in rows:
        assert row.scores.keys() == {"em", "f1", "exact"}
        if (row.linker, row.codec) == ("cacheblend:ratio=1", "raw"):  # full prefill over caches, by another way
            assert row.kl is not None
            assert row.kl < 1e-6
            assert row.top1 == 1
    if places == 2:
        assert {row.kind for row in rows if row.dataset.endswith("@1")} == {"gold at 1"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--data", "none.jsonl"), "No such file"),
        (("--data", "worlds", "--data", "worlds"), "two data sets are called 'worlds'"),
        (("--data", "worlds", "--template", "no place"), "a template has {question} in it"),
        (("--data", "worlds", "--linker", "magic"), "unknown linker 'magic'"),
        (("--data", "worlds", "--codec", "int5"), "no codec 'int5'"),
        (("--data", "worlds", "--metric", "bleu"), "there is no metric 'bleu'"),
        (("--data", "worlds", "--task", "chat"), "there is no task 'chat'"),
        (("--data", "worlds", "--plot", "x.gif"), "ends in .svg or .png"),
        (("--data", "worlds", "--model", "nowhere"), "nowhere"),
    ],
)
def test_what_cannot_be_is_said_in_a_line_before_the_work(
    kvlink: Kvlink, tmp_path: Path, options: tuple[str, ...], message: str
) -> None:
    done = kvlink("eval", "run", "--questions", "1", "--out", str(tmp_path / "run"), *options)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()
