"""``kvlink architectures``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from kvlink_core.cli.common import Device, progress_bar, stderr, stdout
from kvlink_core.errors import ConfigError

if TYPE_CHECKING:
    from kvlink_core.conformance.walk import Row


def architectures(
    names: Annotated[list[str] | None, typer.Argument(help="Values of model_type; all when none is given.")] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Judge again, and fail where the package's table is no longer true.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Judge all and write the package's table and docs/architectures.md.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """List which architectures link exactly, and why the others are refused.

    With **--check** or **--write** each class of the installed transformers is built tiny and random and compared
    with the oracle: one forward pass over the whole prompt. All 189 take well under a minute.
    """
    import transformers

    from kvlink_core.conformance import walk as w
    from kvlink_core.conformance.check import STEPS
    from kvlink_core.conformance.report import render

    wanted = names or []
    if not check and not write:
        version, rows = w.from_json(w.TABLE.read_text())
        if odd := [n for n in wanted if n not in {r.model_type for r in rows}]:
            raise ConfigError(f"{odd[0]!r} is not an architecture of transformers {version}.")
        _show([r for r in rows if not wanted or r.model_type in wanted], version)
        return
    if write and wanted:
        raise ConfigError("--write judges all architectures; name none.")
    document = w.TABLE.parents[2] / "docs" / "architectures.md"
    if write and not document.parent.is_dir():
        raise ConfigError("--write needs a checkout of KVLink; this is an installed package.")
    with progress_bar() as bar:
        task = bar.add_task("judging", total=None)
        rows = w.walk(wanted, lambda done, total: bar.update(task, completed=done, total=total), device=device)
    if write:
        w.TABLE.write_text(w.to_json(rows))
        document.write_text(render(rows, transformers.__version__, STEPS))
        stdout.print(f"wrote {w.TABLE} and {document}", soft_wrap=True)
        return
    _show(rows, transformers.__version__)
    if changes := w.drift(rows):
        for line in changes:
            stderr.print(line, markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(1)
    stdout.print("the table in the package is true of this transformers")


def _show(rows: Sequence[Row], version: str) -> None:
    table = Table(title=f"causal language models of transformers {version}", title_justify="left")
    table.add_column("model type", no_wrap=True)
    table.add_column("status")
    table.add_column("of note, or why not", ratio=1)
    for row in rows:
        table.add_row(row.model_type, row.status, row.remark, style="" if row.status == "exact" else "dim")
    stdout.print(table)
    exact = sum(row.status == "exact" for row in rows)
    stdout.print(f"{exact} exact, {len(rows) - exact} refused")
