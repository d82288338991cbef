"""``kvlink eval compare``: two runs, or two cells, with a paired test."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from kvlink_core.cli.common import stderr, stdout
from kvlink_core.cli.evaluate_run import By, Seed

_WIDTH = 200


def compare(
    first: Annotated[str, typer.Argument(help="Folder of a run, or `FOLDER#CELL`, e.g. `runs/nq#epic:k=8/int4`.")],
    second: Annotated[str, typer.Argument(help="The same, of another run or the same one.")],
    by: By = "dataset",
    metric: Annotated[list[str] | None, typer.Option(help="Only this measure; repeat.")] = None,
    seed: Seed = 0,
) -> None:
    """Second less first on the questions that both answered: paired bootstrap interval and paired permutation test.

    Two folders: every cell of one with the same linker and codec of the other. `FOLDER#CELL` twice: these two.
    """
    from kvlink_core.evaluation import compare as comparing
    from kvlink_core.evaluation.tables import comparison_table

    one, other = comparing.open_side(first), comparing.open_side(second)
    found = comparing.compare(one, other, by=by, measures=metric, seed=seed)
    for difference in comparing.differing_settings(one.config, other.config):
        stderr.print(f"kvlink: {difference}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    console = stdout if stdout.is_terminal else Console(emoji=False, width=_WIDTH)
    console.print(comparison_table(found))
