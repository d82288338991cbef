"""``kvlink eval run`` and ``show``: quality of any model, linker and codec on any data."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from kvlink_core.cli.common import Device, Dtype, probe, stderr, stdout
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.evaluation.examples import Dataset, Task
    from kvlink_core.evaluation.summary import CellSummary

#: Wide enough for every table of ours, where the output is no terminal.
_WIDTH = 260

By = Annotated[Literal["dataset", "kind"], typer.Option(help="`kind`: a table for each kind of question, too.")]
Plot = Annotated[Path | None, typer.Option(help="Draw quality against TTFT here: .svg or .png.")]
Metric = Annotated[
    list[str] | None, typer.Option(help="What the plot shows: em, f1, exact, rouge_l, kl, top1, nll; repeat.")
]
Seed = Annotated[int, typer.Option(help="Of the draws behind intervals.")]


def run(
    data: Annotated[
        list[str],
        typer.Option(help="A file, `NAME=FILE`, or generated: `worlds`, `tales`; repeat. docs/evaluation.md."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the results; a run that was ended goes on in it.")],
    model: Annotated[
        list[str] | None, typer.Option(help="`embedded` (default), a Hugging Face directory, `random:SHAPE`; repeat.")
    ] = None,
    linker: Annotated[
        list[str] | None,
        typer.Option(help="With parameters or without, e.g. `epic:k=8`; repeat. Default: all that run."),
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="E.g. `int4` or `int8:zstd=3`; repeat. Default: raw.")] = None,
    k: Annotated[
        list[int] | None, typer.Option(min=0, help="Link tokens that `link-tokens` uses; 0 is `reposition`; repeat.")
    ] = None,
    questions: Annotated[int | None, typer.Option(min=1, help="Only the first so many of each data set.")] = None,
    gold_at: Annotated[
        list[int] | None, typer.Option(min=0, help="Move the gold document to this place, from 0; repeat.")
    ] = None,
    documents: Annotated[int | None, typer.Option(min=1, help="At most so many documents a question.")] = None,
    document_words: Annotated[int | None, typer.Option(min=1, help="Cut documents longer than so many words.")] = None,
    text_words: Annotated[int, typer.Option(min=1, help="Words of the pieces that plain text is cut into.")] = 100,
    task: Annotated[
        str | None, typer.Option(help="`qa`, `summary` or `text`, where the format does not say it right.")
    ] = None,
    evidence: Annotated[Path | None, typer.Option(help="TriviaQA's folder `evidence`.")] = None,
    template: Annotated[str, typer.Option(help="The user's turn, with {question} in it.")] = "{question}",
    system: Annotated[str | None, typer.Option(help="System text; '' for none. Default: the paper's.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Tokens of an answer at most.")] = 200,
    follow: Annotated[
        Literal["full", "reference"],
        typer.Option(help="What KL and top-1 are taken along: the answer of `full`, or the data's first reference."),
    ] = "full",
    device: Device = "cpu",
    dtype: Dtype = None,
    memory: Annotated[float, typer.Option(min=0, help="GiB of caches kept from question to question.")] = 2.0,
    by: By = "dataset",
    plot: Plot = None,
    metric: Metric = None,
    seed: Seed = 0,
) -> None:
    """Ask every question of every data set under every model, linker and codec.

    Each cell of the grid is held against `full` of its own model: KL divergence and top-1 agreement need no labels.
    Ended in between, the same command goes on where it was.

    Example: `kvlink eval run --data nq.jsonl.gz --linker link-tokens --linker epic --codec int4 --out runs/nq`
    """
    from kvlink_core.benchmark.hardware import CoreWatch
    from kvlink_core.benchmark.plot import check_plot
    from kvlink_core.evaluation.grid import RAW, contenders
    from kvlink_core.evaluation.records import RunDirectory
    from kvlink_core.evaluation.report import write_summary
    from kvlink_core.evaluation.run import make_config
    from kvlink_core.evaluation.run import run as ask

    _check_metrics(metric)
    if plot is not None:
        check_plot(plot)
        probe(plot)
    codecs = codec or [RAW]
    models = contenders(model or ["embedded"], linker, codecs, ks=k or (), device=device, dtype=dtype)
    datasets = _datasets(data, questions, gold_at, documents, document_words, text_words, task, evidence)
    config = make_config(
        models, datasets, linkers=linker, codecs=codecs, template=template, system=system, max_tokens=max_tokens,
        follow=follow, device=device, dtype=dtype,
    )  # fmt: skip
    for note in (note for each in models for note in each.left_out if linker):
        _note(note)
    for dataset in datasets:
        for reason, number in dataset.left_out.items():
            _note(f"{dataset.name}: {number} left out, {reason}.")
    watch, started = CoreWatch(), datetime.now(UTC)
    with RunDirectory(out, config) as directory, _bar() as bar:
        if directory.done:
            _note(f"{out}: going on behind {sum(len(each) for each in directory.done.values())} questions.")
        total = len(models) * sum(len(d.examples) for d in datasets)
        # What was done before tells nothing of the time that is left.
        task_id = bar.add_task("", total=total, completed=sum(len(each) for each in directory.done.values()))
        ask(
            directory, models, datasets, memory_bytes=int(memory * 2**30),
            progress=lambda label, done, total: bar.update(task_id, description=label, completed=done),
        )  # fmt: skip
    if busy := watch.warning():
        _note(f"times to first token: {busy}")
    found = _finish(out, by, plot, metric, seed)
    write_summary(out, config, found, started=started, watch=watch)


def show(
    run: Annotated[Path, typer.Argument(help="Folder of a run, done or not.")],
    by: By = "dataset",
    plot: Plot = None,
    metric: Metric = None,
    seed: Seed = 0,
) -> None:
    """The table of a run again, by kind of question perhaps, or its plot."""
    from kvlink_core.benchmark.plot import check_plot

    _check_metrics(metric)
    if plot is not None:
        check_plot(plot)
    _finish(run, by, plot, metric, seed)


def _datasets(
    data: Sequence[str],
    questions: int | None,
    gold_at: Sequence[int] | None,
    documents: int | None,
    document_words: int | None,
    text_words: int,
    task: str | None,
    evidence: Path | None,
) -> list[Dataset]:
    from kvlink_core.evaluation.examples import Shape
    from kvlink_core.evaluation.reading import open_dataset

    asked: list[Task] = ["qa", "summary", "text"]
    if task is not None and task not in asked:
        raise ConfigError(f"there is no task {task!r}; there are {', '.join(asked)}.", param="task")
    places: Sequence[int | None] = gold_at or [None]
    return [
        open_dataset(
            source,
            limit=questions,
            shape=Shape(place, documents, document_words, text_words),
            task=next((each for each in asked if each == task), None),
            evidence=evidence,
        )
        for source in data
        for place in places
    ]


def _finish(
    path: Path, by: Literal["dataset", "kind"], plot: Path | None, metric: list[str] | None, seed: int
) -> list[CellSummary]:
    """Tables on the terminal, and the plot; returns what is known of each data set and cell."""
    from kvlink_core.evaluation.records import read_rows
    from kvlink_core.evaluation.summary import summarise
    from kvlink_core.evaluation.tables import summary_tables

    rows = read_rows(path)
    if not rows:
        raise ConfigError(f"{path} has no question answered yet.")
    found = summarise(rows, seed=seed)
    shown = found if by == "dataset" else summarise(rows, by=by, seed=seed)
    console = stdout if stdout.is_terminal else Console(emoji=False, width=_WIDTH)
    for table in summary_tables(shown):
        console.print(table)
    if plot is not None:
        _draw(path, shown, plot, metric)
    return found


def _draw(path: Path, summaries: Sequence[CellSummary], plot: Path, metric: list[str] | None) -> None:
    from kvlink_core.evaluation.plot import draw_quality
    from kvlink_core.evaluation.records import read_config
    from kvlink_core.evaluation.report import footer_of
    from kvlink_core.evaluation.summary import main_measure

    config = read_config(path)
    measures = metric or list(dict.fromkeys([*(main_measure(config, data.name) for data in config.data), "top1"]))
    there = [name for name in measures if any(name in s.measures for s in summaries)]
    if not there:
        raise ConfigError(f"no cell of {path} has {' or '.join(measures)}; nothing to draw.", param="metric")
    draw_quality(summaries, there, plot, footer=footer_of(config, summaries))


def _check_metrics(metric: Sequence[str] | None) -> None:
    from kvlink_core.evaluation.summary import MEASURES

    if unknown := [name for name in metric or () if name not in MEASURES]:
        raise ConfigError(f"there is no metric {unknown[0]!r}; there are {', '.join(MEASURES)}.", param="metric")


def _bar() -> Progress:
    """What is done of how much, for how long, and how long it will take yet."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=stderr, speed_estimate_period=600,
    )  # fmt: skip


def _note(text: str) -> None:
    stderr.print(f"kvlink: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)
