"""``kvlink eval``: quality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from kvlink_core.cli.common import Device, Model, probe, progress_bar, stdout
from kvlink_core.cli.evaluate_compare import compare
from kvlink_core.cli.evaluate_run import run, show

eval_app = typer.Typer(help="Measure quality.", no_args_is_help=True)
eval_app.command()(run)
eval_app.command()(show)
eval_app.command()(compare)


@eval_app.command("worlds")
def eval_worlds(
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 2000,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A linker, with parameters or without (`epic:k=8`, `link-tokens:1`); repeat. Default: four."),
    ] = None,
    model: Model = "embedded",
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option("--jsonl", help="Write every question and answer here.")] = None,
) -> None:
    """Exact match on held-out generated worlds, by linker and kind of question, greedy."""
    from kvlink_core.evaluation.worlds import Condition, accuracy, evaluate
    from kvlink_core.linking import get_linker
    from kvlink_core.models import load_model

    probe(output)
    names = condition or ["full", "link-tokens", "link-tokens:1", "reposition"]
    conditions = []
    for name in names:
        linker, _, k = name.partition(":")
        conditions.append(Condition(linker, int(k)) if k.isdecimal() else Condition(name))
        get_linker(conditions[-1].linker)  # refused before the model is loaded
    loaded = load_model(model, device=device)
    with progress_bar() as bar:
        task = bar.add_task("questions", total=questions)
        results = evaluate(loaded, conditions, questions, progress=lambda done: bar.update(task, completed=done))
    kinds = sorted({r.kind for r in results})
    table = Table(title=f"exact match on {questions} held-out questions, greedy, model {loaded.name}, {device}")
    table.add_column("linker")
    for kind in [*kinds, "all"]:
        table.add_column(kind, justify="right")
    for name in dict.fromkeys(c.name for c in conditions):
        cells = [accuracy(results, condition=name, kind=kind) for kind in kinds]
        cells.append(accuracy(results, condition=name))
        table.add_row(name, *(f"{100 * right / asked:.1f} % ({right}/{asked})" for right, asked in cells))
    stdout.print(table)
    if output:
        fields = ("condition", "kind", "passages", "question", "expected", "answer", "right")
        lines = (json.dumps({f: getattr(r, f) for f in fields}) for r in results)
        output.write_text("\n".join(lines) + "\n")
