"""``kvlink bench``: speed."""

from __future__ import annotations

import tempfile
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvlink_core.cli.bench_codec import bench_codec, bench_codec_page
from kvlink_core.cli.bench_store import bench_store
from kvlink_core.cli.bench_tiers import bench_tiers
from kvlink_core.cli.common import Device, Dtype, Model, command_line, probe, progress_bar, stderr, stdout, wide
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.benchmark.results import Case, Report

bench_app = typer.Typer(
    help="Measure speed (alternating runs in one process, medians and ratios), codecs, and accuracy by dtype.",
    no_args_is_help=True,
)
bench_app.command("codec")(bench_codec)
bench_app.command("codec-page")(bench_codec_page)
bench_app.command("tiers")(bench_tiers)
bench_app.command("store")(bench_store)


@bench_app.command("ttft")
def bench_ttft(
    model: Model = "random:llama-100m",
    device: Device = "cpu",
    dtype: Dtype = None,
    documents: Annotated[int | None, typer.Option(min=1, help="Documents in the prompt; default: 10.")] = None,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 500,
    query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 32,
    links: Annotated[int, typer.Option(min=1, help="Link tokens after each document.")] = 5,
    context: Annotated[
        str | None, typer.Option(help="Document tokens in all, instead of --documents; several: `500,1000,...`.")
    ] = None,
    sweep: Annotated[bool, typer.Option("--sweep", help="Contexts of 500 to 32,000 tokens.")] = False,
    linker: Annotated[
        list[str] | None,
        typer.Option(help="Linkers to measure beside `full`, with parameters or without; repeat. Default: all."),
    ] = None,
    repeats: Annotated[int | None, typer.Option(min=1, help="Counted runs of each; default: 7.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Allow fewer than 7 runs; all output says so.")] = False,
    full_budget: Annotated[
        float, typer.Option(min=0, help="Seconds for the runs of `full` at one context; beyond, it gets fewer.")
    ] = 300.0,
    skip: Annotated[
        list[str] | None, typer.Option(help="`NAME@TOKENS`: leave NAME out beyond that context; repeat.")
    ] = None,
    disk: Annotated[bool, typer.Option(help="Also measure reading the caches from a store on local disk.")] = True,
    codec: Annotated[str, typer.Option(help="Codec of that store.")] = "raw",
    breakdown: Annotated[bool, typer.Option(help="Also time each step of the linkers.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here: .svg or .png.")] = None,
) -> None:
    """Time to first token of every linker, beside full prefill and beside its floors.

    The floors compute the tokens that a linker leaves to compute with everything else ready in memory: the engine's
    own forward pass, and that of transformers. docs/benchmarks.md says how to read the figures.
    """
    from kvlink_core.benchmark.hardware import CoreWatch
    from kvlink_core.benchmark.plot import check_plot, draw
    from kvlink_core.benchmark.report import make_report, write_report
    from kvlink_core.benchmark.ttft import ENOUGH_RUNS, Settings, measure, parse_skips
    from kvlink_core.models import load_model

    watch, started = CoreWatch(), datetime.now(UTC)
    runs = repeats or (2 if quick else ENOUGH_RUNS)
    if runs < ENOUGH_RUNS and not quick:
        raise ConfigError(
            f"--repeats {runs}: a median to be quoted needs at least {ENOUGH_RUNS} runs; with --quick fewer are made, "
            "and all output says so.",
            param="repeats",
        )
    cases = _cases(documents, document_tokens, query_tokens, links, context, sweep)
    probe(output)
    if plot is not None:
        check_plot(plot)
        probe(plot)
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as scratch:
        settings = Settings(
            linkers=tuple(linker) if linker else None,
            repeats=runs,
            full_budget_s=full_budget,
            skip=parse_skips(skip or []),
            directory=Path(scratch) / "store" if disk else None,
            codec=codec,
            breakdown=breakdown,
        )
        loaded = load_model(model, device=device, dtype=dtype)
        if early := watch.warning():
            stderr.print(f"kvlink: {early}", style="yellow", markup=False, highlight=False, soft_wrap=True)
        with progress_bar() as bar:
            task = bar.add_task("", total=None)
            points, warnings = measure(
                loaded,
                cases,
                settings,
                lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
            )
    report = make_report(
        loaded, model, settings, points, warnings,
        watch=watch, command=command_line(), started=started,
    )  # fmt: skip
    _show(report)
    if output is not None:
        write_report(report, output)
    if plot is not None:
        draw(report, plot)


@bench_app.command("plot")
def bench_plot(
    results: Annotated[Path, typer.Argument(help="JSON of `kvlink bench ttft`.")],
    picture: Annotated[Path, typer.Argument(help="What to draw: .svg or .png.")],
) -> None:
    """Draw the figures of an earlier run again."""
    from kvlink_core.benchmark.plot import check_plot, draw
    from kvlink_core.benchmark.report import read_report

    check_plot(picture)
    draw(read_report(results), picture)


@bench_app.command("place")
def bench_place(
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="`float32`, `bfloat16` or `float16`.")] = "float32",
    layers: Annotated[int, typer.Option(min=1, help="Layers.")] = 32,
    kv_heads: Annotated[int, typer.Option(min=1, help="Key/value heads.")] = 8,
    head_dim: Annotated[int, typer.Option(min=8, help="Width of a head.")] = 128,
    documents: Annotated[int, typer.Option(min=1, help="Documents of 500 tokens.")] = 10,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each way.")] = 15,
) -> None:
    """Ways to rotate keys and write them into their place: plain, a document at a time, all at once."""
    from kvlink_core.benchmark.placing import PlacingCase, measure_placing
    from kvlink_core.models.describe import DTYPES

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; use one of {', '.join(DTYPES)}.", param="dtype")
    case = PlacingCase(layers=layers, kv_heads=kv_heads, head_dim=head_dim, documents=documents)
    rows = measure_placing(case, device, DTYPES[dtype], repeats)
    table = Table(
        title=f"placing {case.slots:,} tokens, {dtype} on {device}; medians of {repeats}", title_justify="left"
    )
    for column in ("way", "ms", "of plain", "difference"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for row in rows:
        ratio = row.median / rows[0].median
        table.add_row(row.name, f"{row.median * 1e3:.3g}", f"{ratio:.2f}", f"{row.difference:.1e}")
    stdout.print(table)


@bench_app.command("dtype")
def bench_dtype(
    architectures: Annotated[
        list[str] | None, typer.Argument(help="Values of model_type; default: all that link exactly.")
    ] = None,
    dtype: Annotated[list[str] | None, typer.Option(help="`bfloat16`, `float16`; repeat. Default: both.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Random models of each architecture.")] = 12,
    prompts: Annotated[int, typer.Option(min=1, help="Random prompts for each model.")] = 4,
    output: Annotated[Path | None, typer.Option("--json", help="Write every error here.")] = None,
    page: Annotated[Path | None, typer.Option("--markdown", help="Write the table here, for people.")] = None,
) -> None:
    """Whether linking in bfloat16 and float16 is as accurate as ordinary prefill in the same dtype.

    Errors of logits against float32 with the same rounded weights, on tiny random models; the exit code is 1 when the
    linked path's is more than 1.5 x that of ordinary prefill anywhere.
    """
    from kvlink_core.benchmark.precision import DTYPES, LINKERS, measure_precision, precision_report
    from kvlink_core.benchmark.precision_page import render
    from kvlink_core.benchmark.report import write_report, write_text
    from kvlink_core.benchmark.tables import precision_table
    from kvlink_core.models.spec import check_architecture, exact_model_types

    for name in architectures or ():
        check_architecture(name)
    if odd := [d for d in dtype or () if d not in DTYPES]:
        raise ConfigError(f"unknown dtype {odd[0]!r}; use one of {', '.join(DTYPES)}.", param="dtype")
    probe(output)
    probe(page)
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        rows, failures = measure_precision(
            list(dict.fromkeys(architectures or exact_model_types())),
            list(dict.fromkeys(dtype or DTYPES)),
            seeds=seeds,
            prompts=prompts,
            progress=lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        )
    report = precision_report(rows, failures, seeds=seeds, prompts=prompts, command=command_line())
    wide().print(precision_table(report))
    for name, reason in failures.items():
        stdout.print(f"note: {name}: {reason}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    over = sum(not row.met for row in rows)
    stdout.print(f"{len(rows) - over} of {len(rows)} within {report.bound:g} ({', '.join(LINKERS)})")
    if output is not None:
        write_report(report, output)
    if page is not None:
        write_text(render(report), page)
    if over:
        raise typer.Exit(1)


def _cases(
    documents: int | None, document_tokens: int, query_tokens: int, links: int, context: str | None, sweep: bool
) -> list[Case]:
    from kvlink_core.benchmark.results import Case
    from kvlink_core.benchmark.ttft import SWEEP, parse_contexts

    named = {"--documents": documents is not None, "--context": context is not None, "--sweep": sweep}
    given = [name for name, there in named.items() if there]
    if len(given) > 1:
        raise ConfigError(f"{' and '.join(given)} both say how long the context is; give one of them.", param="context")
    contexts: tuple[int, ...] = ((documents or 10) * document_tokens,)
    if sweep or context is not None:
        contexts = parse_contexts(context) if context is not None else SWEEP
    return [
        Case(context_tokens=c, document_tokens=document_tokens, query_tokens=query_tokens, links=links)
        for c in contexts
    ]


def _show(report: Report) -> None:
    from kvlink_core.benchmark.tables import hardware_line, report_tables

    console = wide()
    for table in report_tables(report):
        console.print(table)
    stdout.print(hardware_line(report), markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        stdout.print(f"note: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
