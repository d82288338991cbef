"""The ``kvlink`` command. Each subcommand parses, calls the library and shows; nothing is computed here."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvlink_core import __version__
from kvlink_core.cli.architectures import architectures
from kvlink_core.cli.ask import ask
from kvlink_core.cli.bench import bench_app
from kvlink_core.cli.bench_serving import bench_serve
from kvlink_core.cli.common import stderr, stdout
from kvlink_core.cli.evaluate import eval_app
from kvlink_core.cli.sample import sample
from kvlink_core.cli.store import store_app
from kvlink_core.cli.train import HELP, train
from kvlink_core.errors import KVLinkError

app = typer.Typer(
    help="KVLink: compute each document's KV cache once, store it, link it into any prompt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
bench_app.command("serve")(bench_serve)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")
app.add_typer(store_app, name="store")
app.command()(ask)
app.command()(sample)
app.command()(architectures)
app.command(help=HELP)(train)


def _version(value: bool) -> None:
    if value:
        stdout.print(f"kvlink {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: what KVLink raises on purpose becomes one line on standard error and exit code 2."""
    try:
        app()
    except KVLinkError as error:
        stderr.print(f"kvlink: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
