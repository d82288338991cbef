"""``kvlink train``: link tokens and soft wraps for a model, from a recipe."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.common import stdout
from kvlink_core.errors import ConfigError

HELP = """
Train link tokens or soft wraps for a model, from a recipe: a YAML file.

Three recipes ship, with the papers' settings; print one, set its model and data, and run it:

    kvlink train kvlink --show > my.yaml

    kvlink train my.yaml --out my-model

    kvlink ask --model my-model "..." -d "..."

* **kvlink**: link-token embeddings and the whole model, or a LoRA adapter, on a mixture that keeps full attention good.

* **link-only**: only the link-token embeddings; the model stays as it is, to the bit.

* **soft-wrap**: embeddings around each document, learned from the model itself; no labels needed.

The data are JSONL files (docs/training.md). Needs the extra `train`: `pip install 'kvlink[train]'`. Loss curves:
`tensorboard --logdir my-model/checkpoints/tensorboard`. Several GPUs: `pipeline/train.py`.
"""


def train(
    recipe: Annotated[str, typer.Argument(help="A recipe file; with --show the name of one that ships.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write: `serve` and `kvlink ask` load it.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in --out.")] = False,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="`key=value` in place of the recipe's: `links.k=1`; repeat.")
    ] = None,
    device: Annotated[str | None, typer.Option(help="`cpu` to leave an accelerator alone.")] = None,
    show: Annotated[bool, typer.Option("--show", help="Print a recipe that ships, and end.")] = False,
) -> None:
    """Run a recipe; its help is ``HELP``."""
    from kvlink_core.training.recipes.config import read_recipe, shipped

    if show:
        sys.stdout.write(shipped(recipe))
        return
    settings = read_recipe(recipe, tuple(set_ or ()))
    if out is None:
        raise ConfigError("say where to write the model: --out DIRECTORY.")
    if device not in (None, "cpu"):
        raise ConfigError(f"--device is 'cpu' or left out, not {device!r}; CUDA_VISIBLE_DEVICES chooses among GPUs.")
    from kvlink_core.training.recipes.run import train as run

    outcome = run(settings, out, resume=resume, device=device)
    first, last = outcome.losses[0], outcome.losses[-1]
    stdout.print(
        f"{outcome.steps} steps, loss {first[1]:.4f} (step {first[0]}) to {last[1]:.4f} (step {last[0]}); "
        f"{outcome.left_out} lines made no example.",
        highlight=False,
    )
    stdout.print(f"{outcome.directory}: kvlink ask --model {outcome.directory} ...", highlight=False, soft_wrap=True)
