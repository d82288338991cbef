"""What the subcommands share: consoles, options, a progress bar."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from kvlink_core.errors import ConfigError

stdout = Console(emoji=False)
stderr = Console(stderr=True, emoji=False)

#: Columns for tables that go into a file or a pipe.
_WIDTH = 140

Model = Annotated[str, typer.Option(help="`embedded`, a Hugging Face directory, or `random:SHAPE`.")]
Device = Annotated[str, typer.Option(help="Torch device, e.g. `cpu` or `cuda`.")]
Dtype = Annotated[str | None, typer.Option(help="`float32`, `bfloat16` or `float16`; default: float32 on CPU.")]


def progress_bar() -> Progress:
    """A bar on standard error: what is done of how much, and for how long."""
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=stderr
    )


def command_line() -> str:
    """What was run, as one would type it again."""
    return shlex.join(["kvlink", *sys.argv[1:]])


def wide() -> Console:
    """A terminal as it is; what goes into a file or a pipe has room for tables."""
    return stdout if stdout.is_terminal else Console(emoji=False, width=_WIDTH)


def probe(path: Path | None) -> None:
    """Learn before the work, not after it, that a result cannot be written.

    Raises:
        ConfigError: it cannot.
    """
    if path is None:
        return
    try:
        with path.open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write to {str(path)!r}: {error.strerror}.") from error
