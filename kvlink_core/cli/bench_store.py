"""``kvlink bench store``: how fast a store is read and its catalog looked up."""

from __future__ import annotations

import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvlink_core.cli.common import command_line, probe, progress_bar, stderr, stdout
from kvlink_core.cli.store_tables import show


def bench_store(
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each way.")] = 15,
    rows: Annotated[int, typer.Option(min=0, help="Rows of the catalog; 0 leaves it out.")] = 1_000_000,
    reading: Annotated[bool, typer.Option(help="Measure reading shards.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Raw shards beside `read()` of the same files, and a catalog of many rows, in a temporary directory.

    Files are in the system's memory, so this is the cost of the store's own work. docs/store.md explains the figures.
    """
    from kvlink_core.benchmark.catalog import measure
    from kvlink_core.benchmark.hardware import CoreWatch, describe_versions
    from kvlink_core.benchmark.reading import CASES, measure_reading
    from kvlink_core.benchmark.report import write_text

    watch = CoreWatch()
    probe(output)
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as scratch, progress_bar() as bar:
        task = bar.add_task("", total=None)

        def progress(what: str, done: int, total: int) -> None:
            bar.update(task, description=what, completed=done, total=total)

        found = measure_reading(Path(scratch), CASES, repeats, progress) if reading else []
        catalog = measure(Path(scratch) / "catalog", rows, progress) if rows else None
    if found:
        table = Table(title=f"reading, medians of {repeats}", title_justify="left")
        for column in ("documents", "of", "way", "ms", "GB/s", "x read()", "CPU ms", "x read(), CPU"):
            table.add_column(column, justify="left" if column in ("documents", "way") else "right")
        for item in found:
            for way, seconds in item.medians.items():
                ratios = [f"{r[way]:.2f}" if way in r else "" for r in (item.ratios, item.processor_ratios)]
                table.add_row(
                    f"{item.case.documents}, {item.case.name}", f"{item.case.nbytes / 2**20:.2f} MiB", way,
                    f"{1e3 * seconds:.2f}", f"{item.nbytes / seconds / 1e9:.1f}", ratios[0],
                    f"{1e3 * item.processor_medians[way]:.2f}", ratios[1],
                )  # fmt: skip
            table.add_section()
        show(table)
    if catalog is not None:
        table = Table(title=f"catalog of {catalog.rows:,} rows", title_justify="left")
        table.add_column("what")
        table.add_column("figure", justify="right")
        for what, figure in catalog.lines():
            table.add_row(what, figure)
        show(table)
    if warning := watch.warning():
        stderr.print(f"kvlink: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if output is not None:
        import json

        report = {
            "format": "kvlink-bench-store/1", "command": command_line(),
            "versions": describe_versions(), "load_before": watch.load_before, "others_busy": watch.others(),
            "reading": [asdict(item) for item in found], "catalog": asdict(catalog) if catalog else None,
        }  # fmt: skip
        write_text(json.dumps(report, indent=1) + "\n", output)
        stdout.print(f"wrote {output}", markup=False, highlight=False, soft_wrap=True)
