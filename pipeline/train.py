"""``kvlink train`` on several workers: Ray Train's TorchTrainer around the same function. Thin on purpose.

    ray job submit --address http://HEAD:8265 --working-dir . -- \\
        python pipeline/train.py my.yaml --out /shared/my-model --workers 8 --gpu

Every worker is one process of the data-parallel run; ``rows`` of the recipe is over all of them. ``--out`` must be a
directory that all workers see. What is trained, and what is written, is that of ``kvlink train`` (docs/training.md).
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a script, from the checkout
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from kvlink_core.errors import KVLinkError
from kvlink_core.training.recipes.config import Recipe, read_recipe


def work(config: dict[str, Any]) -> None:
    """One worker: the core's own training, in the process group that Ray made."""
    from kvlink_core.training.recipes.run import train

    recipe = Recipe.model_validate_json(config["recipe"])
    train(recipe, Path(config["out"]), resume=config["resume"], device=config["device"])


def run(recipe: Recipe, out: Path, *, workers: int, gpu: bool, resume: bool = False) -> None:
    """Train on ``workers`` processes of the Ray cluster that is connected, or started here.

    Raises:
        ConfigError: as ``kvlink_core.training.recipes.run.train``, if it can be known before the workers start.
        ray.train.TrainingFailedError: a worker failed.
    """
    import ray
    from ray.train import RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    if not ray.is_initialized():
        ray.init(log_to_driver=True)
    out = out.resolve()
    config = {
        "recipe": recipe.model_dump_json(), "out": str(out), "resume": resume, "device": None if gpu else "cpu",
    }  # fmt: skip
    trainer = TorchTrainer(
        work,
        train_loop_config=config,
        scaling_config=ScalingConfig(num_workers=workers, use_gpu=gpu),
        run_config=RunConfig(name=out.name, storage_path=str(out.parent / f".{out.name}-ray")),
    )
    trainer.fit()


def has_checkpoint(out: Path) -> bool:
    """Whether an earlier run came as far as a checkpoint."""
    from kvlink_core.training.recipes.run import CHECKPOINTS

    return any((out / CHECKPOINTS).glob("checkpoint-*"))


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the command line."""
    parser = argparse.ArgumentParser(prog="pipeline/train.py", description=__doc__.split("\n")[0])
    parser.add_argument("recipe", help="a recipe file; `kvlink train kvlink --show` prints one")
    parser.add_argument("--out", type=Path, required=True, help="directory to write, seen by all workers")
    parser.add_argument("--workers", type=int, default=1, help="processes, one GPU each with --gpu")
    parser.add_argument("--gpu", action="store_true", help="a GPU for each worker")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --out")
    parser.add_argument(
        "--retry", action="store_true", help="as --resume where there is a checkpoint; for a job that is tried again"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="instead of the recipe's; repeat"
    )
    options = parser.parse_args(arguments)
    try:
        recipe = read_recipe(options.recipe, tuple(options.set))
        if options.workers < 1 or recipe.rows % (recipe.rows_at_once * options.workers):
            print(
                f"pipeline/train.py: rows ({recipe.rows}) must be a multiple of rows_at_once ({recipe.rows_at_once}) x "
                f"{options.workers} workers.",
                file=sys.stderr,
            )
            return 2
        resume = options.resume or (options.retry and has_checkpoint(options.out))
        run(recipe, options.out, workers=options.workers, gpu=options.gpu, resume=resume)
    except KVLinkError as error:
        print(f"pipeline/train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
