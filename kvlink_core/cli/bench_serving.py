"""``kvlink bench serve``: the engine under many requests."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.common import Device, Dtype, Model, command_line, probe, progress_bar, stdout, wide
from kvlink_core.errors import ConfigError


def bench_serve(
    model: Model = "random:llama-100m",
    device: Device = "cpu",
    dtype: Dtype = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests in a full batch.")] = 16,
    documents: Annotated[int, typer.Option(min=1, help="Hot documents, which all of them read.")] = 10,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 500,
    query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of a question.")] = 32,
    links: Annotated[int, typer.Option(min=1, help="Link tokens after each document.")] = 5,
    answer_tokens: Annotated[int, typer.Option(min=2, help="Tokens of an answer.")] = 32,
    clients: Annotated[int, typer.Option(min=1, help="Clients, for time to first token under load.")] = 4,
    cold: Annotated[int, typer.Option(min=1, help="Documents that arrive cold while others decode.")] = 8,
    repeats: Annotated[int | None, typer.Option(min=1, help="Runs of what is compared; default: 7.")] = None,
    step_tokens: Annotated[int, typer.Option(min=1, help="The engine's `step_tokens`.")] = 512,
    stretch: Annotated[float, typer.Option(min=1, help="The engine's `stretch`.")] = 2.0,
    quick: Annotated[bool, typer.Option("--quick", help="Allow fewer than 7 runs; all output says so.")] = False,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Many requests at once, without HTTP: decode steps, memory, throughput, first tokens, gaps between tokens.

    Beside the bare model's forward over the same batch, and beside `full` in the same engine (docs/engine.md).
    """
    from kvlink_core.benchmark.hardware import CoreWatch
    from kvlink_core.benchmark.report import write_report
    from kvlink_core.benchmark.serving import ServingBench, ServingCase
    from kvlink_core.benchmark.serving_results import serving_report, serving_tables
    from kvlink_core.benchmark.tables import hardware_line
    from kvlink_core.benchmark.ttft import ENOUGH_RUNS
    from kvlink_core.models import load_model

    watch, started = CoreWatch(), datetime.now(UTC)
    runs = repeats or (2 if quick else ENOUGH_RUNS)
    if runs < ENOUGH_RUNS and not quick:
        raise ConfigError(f"--repeats {runs}: fewer than {ENOUGH_RUNS} need --quick.", param="repeats")
    probe(output)
    case = ServingCase(
        requests=requests, documents=documents, document_tokens=document_tokens, query_tokens=query_tokens,
        links=links, answer_tokens=answer_tokens, clients=clients, cold=cold, repeats=runs,
    )  # fmt: skip
    loaded = load_model(model, device=device, dtype=dtype)
    with progress_bar() as bar:
        task = bar.add_task("", total=None)
        measured = ServingBench(loaded, case, step_tokens=step_tokens, stretch=stretch).run(
            lambda name, done, total: bar.update(task, description=name, completed=done, total=total)
        )
    report = serving_report(
        loaded, model, case, measured,
        step_tokens=step_tokens, stretch=stretch, quick=runs < ENOUGH_RUNS,
        watch=watch, command=command_line(), started=started,
    )  # fmt: skip
    for table in serving_tables(report):
        wide().print(table)
    stdout.print(hardware_line(report), markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        stdout.print(f"note: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        write_report(report, output)
