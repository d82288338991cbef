"""``kvlink bench``: speed."""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvlink_core.cli.common import Device, Dtype, Model, probe, progress_bar, stdout

bench_app = typer.Typer(
    help="Measure speed: alternating runs in one process, medians and ratios.", no_args_is_help=True
)


@bench_app.command("ttft")
def bench_ttft(
    model: Model = "random:llama-100m",
    device: Device = "cpu",
    dtype: Dtype = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents in the prompt.")] = 10,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 500,
    query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 32,
    links: Annotated[int, typer.Option(min=1, help="Link tokens after each document.")] = 5,
    linker: Annotated[list[str] | None, typer.Option(help="Linkers to measure beside `full`; repeat.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each.")] = 7,
    disk: Annotated[bool, typer.Option(help="Also measure reading the caches from a store on local disk.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Time to first token of every linker, beside full prefill and beside the floor.

    The floor is the model's forward over link and query tokens with the KV cache ready in memory.
    """
    import tempfile

    import torch

    from kvlink_core.benchmark.ttft import FLOOR, FULL, Case, measure
    from kvlink_core.models import load_model

    probe(output)
    case = Case(documents, document_tokens, query_tokens, links)
    loaded = load_model(model, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as scratch, progress_bar() as bar:
        task = bar.add_task("measuring", total=None)
        rows = measure(
            loaded,
            case,
            linker or ["reposition", "link-tokens"],
            repeats=repeats,
            store_directory=Path(scratch) / "store" if disk else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    medians = {row.name: row.median for row in rows}
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"time to first token: {model}, {loaded.fingerprint.dtype}, {documents} x {document_tokens} tokens "
        f"+ {query_tokens} query tokens, {links} links; {where}; median of {repeats}",
        title_justify="left",
    )
    for column in ("candidate", "computed tokens", "median ms", "min ms", "of full", "x floor"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.computed_tokens),
            f"{1e3 * row.median:.1f}",
            f"{1e3 * min(row.seconds):.1f}",
            f"{100 * row.median / medians[FULL]:.1f} %",
            f"{row.median / medians[FLOOR]:.2f}",
        )
    stdout.print(table)
    if output:
        figures = {
            "model": model,
            "dtype": loaded.fingerprint.dtype,
            "device": where,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "case": {k: getattr(case, k) for k in case.__slots__},
            "rows": [{"name": r.name, "computed_tokens": r.computed_tokens, "seconds": r.seconds} for r in rows],
        }
        output.write_text(json.dumps(figures, indent=1))
