"""``kvlink sample``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.common import stdout
from kvlink_core.errors import ConfigError


def sample(
    directory: Annotated[Path, typer.Argument(help="Where to write corpus.jsonl and questions.jsonl.")],
    worlds: Annotated[int, typer.Option(min=1, max=100_000, help="How many worlds.")] = 20,
    questions: Annotated[int, typer.Option(min=1, help="Questions per world at most.")] = 2,
    first_seed: Annotated[int, typer.Option(min=0, help="First world's seed, in the held-out range.")] = 0,
) -> None:
    """Write a sample corpus of generated worlds, with questions that it answers."""
    from kvlink_core.evaluation.sample import write_sample

    try:
        documents, asked = write_sample(directory, worlds=worlds, questions=questions, first_seed=first_seed)
    except OSError as error:
        raise ConfigError(f"cannot write to {str(directory)!r}: {error.strerror}.") from error
    stdout.print(f"wrote {documents} documents and {asked} questions to {directory}")
