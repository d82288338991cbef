"""``python -m serve.prove load`` and ``python -m serve.prove faults``. Exit code 1 if a condition does not hold."""

from __future__ import annotations

import os
import shlex
import signal
import sys
from pathlib import Path
from typing import Annotated

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import typer

from kvlink_core.errors import KVLinkError

app = typer.Typer(add_completion=False, no_args_is_help=True)

Json = Annotated[Path | None, typer.Option("--json", help="write what was found here")]
Markdown = Annotated[Path | None, typer.Option("--markdown", help="and the table here")]


def _say(text: str) -> None:
    print(f"... {text}", file=sys.stderr, flush=True)


def _command() -> str:
    return shlex.join(["python", "-m", "serve.prove", *sys.argv[1:]])


def _finish(page: str, markdown: Path | None, failed: bool) -> None:
    print(page)
    if markdown is not None:
        markdown.parent.mkdir(parents=True, exist_ok=True)
        markdown.write_text(page, "utf-8")
    raise SystemExit(1 if failed else 0)


@app.command()
def load(
    seconds: Annotated[float, typer.Option(min=1, help="for each rate")] = 300.0,
    share: Annotated[list[float] | None, typer.Option(help="of capacity (may be repeated)")] = None,
    capacity_seconds: Annotated[float, typer.Option(min=1, help="to measure capacity")] = 20.0,
    ttft: Annotated[float, typer.Option(min=0, help="goodput: seconds to the first token at most")] = 1.0,
    itl: Annotated[float, typer.Option(min=0, help="goodput: mean seconds between tokens at most")] = 0.2,
    seed: Annotated[int, typer.Option(help="of questions and arrivals")] = 0,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """0.5, 0.8 and 1.2 of capacity: no error below, only 503 above, no wrong token, memory flat."""
    from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware
    from serve.prove.load_run import prove_load
    from serve.prove.report import load_page, save

    watch = CoreWatch()
    capacity, results = prove_load(
        share or (0.5, 0.8, 1.2), seconds=seconds, capacity_s=capacity_seconds, ttft_s=ttft, itl_s=itl, seed=seed,
        say=_say,
    )  # fmt: skip
    hardware = describe_hardware(torch.device("cpu"), watch)
    if json is not None:
        save(json, command=_command(), hardware=hardware, capacity=capacity, load=results)
    _finish(load_page(capacity, results, hardware, _command()), markdown, any(r.faults for r in results))


@app.command()
def faults(
    only: Annotated[list[str] | None, typer.Option(help="this fault (may be repeated); default: all")] = None,
    times: Annotated[int, typer.Option(min=1, help="that each happens")] = 3,
    rate: Annotated[float, typer.Option(min=0.1, help="requests a second meanwhile")] = 4.0,
    clients: Annotated[int, typer.Option(min=1, help="that leave mid-stream, each time")] = 1000,
    seed: Annotated[int, typer.Option(help="of questions and arrivals")] = 0,
    json: Json = None,
    markdown: Markdown = None,
) -> None:
    """Faults under load: no wrong token, no request lost without a clear error, all freed afterwards."""
    from kvlink_core.benchmark.hardware import CoreWatch, describe_hardware
    from serve.prove.fault_run import prove_faults
    from serve.prove.faults import FAULTS
    from serve.prove.report import fault_page, save

    watch = CoreWatch()
    results = prove_faults(only or list(FAULTS), times=times, rate=rate, clients=clients, seed=seed, say=_say)
    hardware = describe_hardware(torch.device("cpu"), watch)
    if json is not None:
        save(json, command=_command(), hardware=hardware, faults=results)
    _finish(fault_page(results, hardware, _command()), markdown, any(r.faults or r.skipped for r in results))


def main() -> None:
    """Errors of ours are one line."""
    torch.set_num_threads(1)
    # Ended from outside, it still ends the service that it started.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        app()
    except KVLinkError as error:
        print(f"Error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
