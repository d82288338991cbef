"""``kvlink bench codec``: size, speed, error and quality of codecs."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvlink_core.cli.common import Device, Model, command_line, probe, progress_bar, stdout, wide
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.benchmark.codec_results import CodecReport


def bench_codec(
    codec: Annotated[
        list[str] | None,
        typer.Option(help="A codec, with parameters or without (`int4:group=128,zstd=1`); repeat. Default: all."),
    ] = None,
    model: Model = "embedded",
    text_model: Annotated[
        str | None, typer.Option(help="A second model, e.g. a directory, whose own text is followed.")
    ] = None,
    device: Device = "cpu",
    questions: Annotated[
        int | None, typer.Option(min=0, help="Held-out questions; 0 leaves quality out. Default: 2000.")
    ] = None,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a long document, at most.")] = 512,
    repeats: Annotated[
        int | None, typer.Option(min=0, help="Counted runs of each codec; 0 leaves speed out. Default: 7.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Allow fewer than 7 runs and 2000 questions; all output says so.")
    ] = False,
    layers: Annotated[int, typer.Option(min=1, help="Of the cache that speed is measured with: layers.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Its key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=1, help="Width of a head.")] = 128,
    tokens: Annotated[int, typer.Option(min=1, help="Its tokens.")] = 512,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    page: Annotated[
        Path | None, typer.Option("--markdown", help="Put the tables into this page, between its two marks.")
    ] = None,
) -> None:
    """Bytes a token, speed, error and quality of codecs.

    Speed: GB of bfloat16 cache encoded and decoded a second. Error: of keys, values and logits. Quality: exact match on
    held-out questions against the same questions over caches that were not encoded, and how far distributions of the
    next token diverge. docs/codecs.md says how to read it.
    """
    from kvlink_core.benchmark.codec_page import page_with, read_page
    from kvlink_core.benchmark.codec_results import Shape
    from kvlink_core.benchmark.codec_run import DEFAULT_CODECS, ENOUGH_QUESTIONS, Plan, run
    from kvlink_core.benchmark.hardware import CoreWatch
    from kvlink_core.benchmark.report import write_report, write_text
    from kvlink_core.benchmark.ttft import ENOUGH_RUNS

    watch, started = CoreWatch(), datetime.now(UTC)
    plan = Plan(
        codecs=codec or DEFAULT_CODECS,
        model=model,
        text_model=text_model,
        device=device,
        questions=_or(questions, 100 if quick else ENOUGH_QUESTIONS),
        document_tokens=document_tokens,
        repeats=_or(repeats, 2 if quick else ENOUGH_RUNS),
        shape=Shape(layers=layers, kv_heads=kv_heads, head_dim=head_dim, tokens=tokens),
    )
    if plan.quick and not quick:
        raise ConfigError(
            f"a figure to be quoted needs {ENOUGH_RUNS} runs and {ENOUGH_QUESTIONS} questions; with --quick fewer are "
            "made, and all output says so.",
            param="questions",
        )
    probe(output)
    old = ""
    if page is not None:
        old = read_page(page)
        page_with(old, [])
        probe(page)
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        report = run(
            plan,
            command_line(),
            started,
            watch,
            lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    _show(report)
    if output is not None:
        write_report(report, output)
    if page is not None:
        write_text(page_with(old, [report]), page)


def bench_codec_page(
    page: Annotated[Path, typer.Argument(help="The page; what is between its two marks is replaced.")],
    results: Annotated[list[Path], typer.Argument(help="JSON of `kvlink bench codec`, in the order wanted.")],
) -> None:
    """Put the tables of earlier runs, of several machines say, into a page."""
    from kvlink_core.benchmark.codec_page import page_with, read_codec_report, read_page
    from kvlink_core.benchmark.report import write_text

    reports = [read_codec_report(path) for path in results]
    write_text(page_with(read_page(page), reports), page)


def _or(given: int | None, default: int) -> int:
    return default if given is None else given


def _show(report: CodecReport) -> None:
    from kvlink_core.benchmark.codec_tables import grids, verdicts

    if report.quick:
        stdout.print("A QUICK RUN, with fewer runs or questions than a figure needs: not to be quoted.", style="yellow")
    for grid in grids(report):
        table = Table(title=grid.title, title_justify="left")
        for number, name in enumerate(grid.header):
            table.add_column(name, justify="right" if number else "left", no_wrap=not number)
        for row in grid.rows:
            table.add_row(*row)
        wide().print(table)
    for line in verdicts(report):
        stdout.print(line.replace("`", ""), markup=False, highlight=False, soft_wrap=True)
    for note in report.notes:
        stdout.print(f"note: {note}", style="yellow", markup=False, highlight=False, soft_wrap=True)
