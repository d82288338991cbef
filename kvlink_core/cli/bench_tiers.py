"""``kvlink bench tiers``."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from kvlink_core.cli.common import Device, Dtype, Model, command_line, probe, progress_bar, stdout
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.benchmark.tiers_traces import Trace
    from kvlink_core.models import LoadedModel


def bench_tiers(
    model: Model = "embedded",
    device: Device = "cpu",
    dtype: Dtype = None,
    hits: Annotated[bool, typer.Option(help="Hit rates of the eviction policy and of others.")] = True,
    speed: Annotated[bool, typer.Option(help="Loading, computing, or choosing, over throttled stores.")] = True,
    qa: Annotated[
        list[Path] | None,
        typer.Option(help="Questions with documents, JSON Lines or like SQuAD's, or .gz of these; repeat."),
    ] = None,
    requests: Annotated[int, typer.Option(min=1, help="Requests of the Zipf trace, besides its scans.")] = 100_000,
    sizes: Annotated[str, typer.Option(help="Of caches over the Zipf trace, as parts.")] = "0.01,0.05,0.1,0.25,0.5",
    qa_sizes: Annotated[str, typer.Option(help="Of caches over question files.")] = "0.1",
    link: Annotated[
        list[str] | None,
        typer.Option(help="A store to try: `MB_PER_S:MS`; repeat. Default: seven, 5:100 to 2000:1."),
    ] = None,
    codec: Annotated[str, typer.Option(help="Codec of the stores.")] = "raw",
    documents: Annotated[int, typer.Option(min=1, help="Documents of a request to a store.")] = 4,
    tokens: Annotated[str, typer.Option(help="Their lengths, `SHORTEST,LONGEST`.")] = "60,240",
    repeats: Annotated[int, typer.Option(min=1, help="Counted requests of each kind to each store.")] = 9,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw them here: .svg or .png.")] = None,
) -> None:
    """What the tiers are worth: hit rates by policy, and whether choosing is as fast as the better of load and compute.

    docs/tiers.md says how to read the figures.
    """
    from kvlink_core.benchmark.hardware import CoreWatch
    from kvlink_core.benchmark.plot import check_plot
    from kvlink_core.benchmark.report import write_text
    from kvlink_core.benchmark.tables import hardware_line
    from kvlink_core.benchmark.tiers_hits import measure_hits
    from kvlink_core.benchmark.tiers_report import draw_tiers, make_tiers_report, tiers_tables
    from kvlink_core.benchmark.tiers_speed import LINKS, SpeedSettings, measure_speed
    from kvlink_core.models import load_model

    watch, started = CoreWatch(), datetime.now(UTC)
    shares, qa_shares = _numbers(sizes, "sizes"), _numbers(qa_sizes, "qa-sizes")
    if max(shares + qa_shares) > 1:
        raise ConfigError("sizes of caches are parts of all tokens: 1 at most.", param="sizes")
    lengths = _numbers(tokens, "tokens")
    if len(lengths) != 2 or lengths[0] > lengths[1] or lengths[0] < 1:
        raise ConfigError(f"--tokens {tokens!r}: give the shortest and the longest, e.g. 60,240.", param="tokens")
    settings = SpeedSettings(
        links=tuple(_link(text) for text in link) if link else LINKS,
        codec=codec, tokens=(int(lengths[0]), int(lengths[1])), each=documents, documents=max(24, documents),
        runs=repeats,
    )  # fmt: skip
    probe(output)
    if plot is not None:
        check_plot(plot)
        probe(plot)
    loaded = load_model(model, device=device, dtype=dtype)
    with progress_bar() as bar, tempfile.TemporaryDirectory(prefix="kvlink-bench-") as scratch:
        task = bar.add_task("", total=None)
        rates = measure_hits(
            _traces(loaded, qa or [], requests, shares, qa_shares) if hits else [],
            progress=lambda name, done: bar.update(task, description=name, completed=done),
        )
        times = measure_speed(
            loaded, Path(scratch) / "store", settings,
            lambda name, done, total: bar.update(task, description=name, completed=done, total=total),
        ) if speed else []  # fmt: skip
    report = make_tiers_report(
        rates, times, model=model, device=device, settings=settings, watch=watch,
        command=command_line(), started=started,
    )  # fmt: skip
    wide = stdout if stdout.is_terminal else Console(emoji=False, width=160)
    for table in tiers_tables(report):
        wide.print(table)
    stdout.print(hardware_line(report), markup=False, highlight=False, soft_wrap=True)
    for warning in report.warnings:
        stdout.print(f"note: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        write_text(report.model_dump_json(indent=1) + "\n", output)
    if plot is not None:
        draw_tiers(report, plot)


def _traces(
    model: LoadedModel, files: Sequence[Path], requests: int, shares: Sequence[float], qa_shares: Sequence[float]
) -> Iterator[tuple[Trace, Sequence[float]]]:
    from kvlink_core.benchmark.tiers_traces import Text, question_traces, zipf_trace
    from kvlink_core.types import Document

    def count(text: Text) -> int:
        return len(model.layout.document_tokens(Document("", text[1], text[0]))) if text[1] else 1

    yield zipf_trace(requests=requests), shares
    yield zipf_trace(requests=requests, scans=0), shares
    for path in files:
        for trace in question_traces(path, count):
            yield trace, qa_shares


def _numbers(text: str, option: str) -> list[float]:
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 < n < float("inf") for n in numbers):
        raise ConfigError(f"--{option} {text!r}: give numbers above 0, separated by commas.", param=option)
    return numbers


def _link(text: str) -> tuple[float, float]:
    try:
        megabytes, milliseconds = (float(part) for part in text.split(":"))
    except ValueError:
        megabytes = milliseconds = -1.0
    if not (0 < megabytes < float("inf") and 0 <= milliseconds < 60_000):
        raise ConfigError(f"--link {text!r}: give MB/s and milliseconds, e.g. 50:20.", param="link")
    return megabytes * 1e6, milliseconds / 1e3
