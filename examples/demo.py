"""The whole of KVLink in one go: precompute, serve, ask over HTTP, compare; then stop what was started.

Run by ``make demo``. Exits 0 only if every step worked. Logs of the two programs are in ``runs/demo``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
RUN = ROOT / "runs" / "demo"
STORE = RUN / "store"
LINKED = "link-tokens"
ROUNDS = 5
#: Ray of its own, no telemetry, no token that other clusters on this machine might have asked for.
ENVIRONMENT = os.environ | {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "RAY_ADDRESS": "local",
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
}
console = Console(width=max(100, min(Console().width, 140)), highlight=False)


class DemoError(Exception):
    """A step failed; the text says which and where to look."""


def step(title: str) -> None:
    """Announce a step."""
    console.print(f"\n[bold]{title}[/bold]")


def run(arguments: list[str]) -> None:
    """Run a program to its end; its output goes to the terminal."""
    code = subprocess.run(arguments, cwd=ROOT, env=ENVIRONMENT, check=False).returncode
    if code:
        raise DemoError(f"{' '.join(arguments[1:4])} ended with exit code {code}; its output is above.")


@dataclass(frozen=True)
class Reply:
    """One streamed answer: as it came, milliseconds to its first text, tokens cached and generated."""

    text: str
    first_ms: float
    cached: int
    completion: int


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def service(store: Path, directory: Path) -> Iterator[httpx.Client]:
    """``serve run`` with a store, until the block ends; its configuration and log are in ``directory``."""
    port, log = free_port(), directory / "serve.log"
    config = yaml.safe_load((ROOT / "serve/configs/local.yaml").read_text())
    config["http_options"]["port"] = port
    config["applications"][0]["args"] |= {"model": "embedded", "store": str(store)}
    (directory / "serve.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with log.open("wb") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "ray.serve.scripts", "run", str(directory / "serve.yaml")],
            cwd=ROOT, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:
            wait_until_healthy(client, process, log)
            yield client
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # the session that was started above, and nothing else
            process.wait(10)


def wait_until_healthy(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    """Return when ``/healthz`` says 200."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise DemoError(f"the service ended with exit code {process.returncode}; see {log.relative_to(ROOT)}.")
        try:
            if client.get("/healthz").status_code == 200:
                return
        except httpx.TransportError:
            pass  # not listening yet
        time.sleep(0.3)
    raise DemoError(f"the service was not healthy after 120 s; see {log.relative_to(ROOT)}.")


def ask(client: httpx.Client, question: dict[str, Any], linker: str, max_tokens: int = 48) -> Reply:
    """Stream one answer."""
    body = {
        "model": "kvlink-embedded",
        "messages": [{"role": "user", "content": question["question"]}],
        "documents": [{"id": i} for i in question["documents"]],
        "linker": linker,
        "temperature": 0,
        "max_tokens": max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    text, first, usage, finished = "", None, None, False
    started = time.perf_counter()
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            raise DemoError(f"HTTP {response.status_code}: {response.read().decode()}")
        for line in response.iter_lines():
            if line == "data: [DONE]":
                finished = True
            elif line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                if "error" in event:
                    raise DemoError(f"the stream broke off: {event['error']}")
                piece = "".join(c["delta"].get("content") or "" for c in event["choices"])
                if piece and first is None:
                    first = time.perf_counter() - started
                text += piece
                if event.get("usage"):
                    usage = event["usage"]
    if not finished or usage is None:
        raise DemoError("a stream ended without its usage and [DONE].")
    seconds = first if first is not None else time.perf_counter() - started
    return Reply(text, 1e3 * seconds, usage["prompt_tokens_details"]["cached_tokens"], usage["completion_tokens"])


def ask_all(client: httpx.Client, questions: list[dict[str, Any]]) -> tuple[int, int]:
    """Ask every question both ways, print the table; returns (right, asked) of the linked path."""
    table = Table(
        "question", "answer (linked)", "", "cached tokens", "full ms", "linked ms", "ratio",
        title=f"time to first token over HTTP, median of {ROUNDS}; the first round is not counted",
        title_justify="left",
    )  # fmt: skip
    right = 0
    for question in questions:
        times: dict[str, list[float]] = {"full": [], LINKED: []}
        answer, cached = "", 0
        for round_number in range(ROUNDS + 1):
            for linker in times:
                reply = ask(client, question, linker)
                if linker == LINKED:
                    answer, cached = reply.text.strip(), reply.cached
                if round_number:
                    times[linker].append(reply.first_ms)
        correct = answer == question["answer"]
        right += correct
        full, linked = (statistics.median(times[name]) for name in ("full", LINKED))
        table.add_row(
            question["question"], answer, "[green]right[/green]" if correct else "[red]wrong[/red]", str(cached),
            f"{full:.1f}", f"{linked:.1f}", f"{linked / full:.2f}",
        )  # fmt: skip
        if not cached:
            raise DemoError("the linked path used no cached tokens: the store was not hit.")
    console.print(table)
    console.print(
        f"{right} of {len(questions)} right. A model this small prefills in no time, so what is saved hardly shows:"
        " the ratio is near 1. Step 3 shows it where prefill costs something."
    )
    return right, len(questions)


def show_large_shape(shape: str = "random:llama-100m") -> None:
    """The same ratio where prefill costs something: few runs, since this is a demonstration and no figure to quote."""
    output = RUN / "ttft.json"
    run([
        sys.executable, "-m", "kvlink_core.cli", "bench", "ttft", "--model", shape,
        "--linker", LINKED, "--quick", "--repeats", "3", "--json", str(output),
    ])  # fmt: skip
    (point,) = json.loads(output.read_text())["points"]
    medians = {(row["kind"], row["source"]): row["median_s"] for row in point["rows"]}
    full = medians["full", None]
    for source, what in (("memory", "caches in memory"), ("disk", "caches read from disk, checked")):
        linked = medians["linker", source]
        console.print(
            f"full {full:.2f} s, linked {linked:.3f} s ({what}): "
            f"[bold]{100 * linked / full:.1f} %[/bold] of the time to first token."
        )


NEXT = """
[bold]Next, with a real model[/bold] (a Hugging Face directory of any of 94 architectures):

  .venv/bin/python pipeline/precompute.py --input my-documents/ --store my-store --model /path/to/model
  .venv/bin/serve run serve.app:build_app store=my-store model=/path/to/model

and then POST http://127.0.0.1:8000/v1/chat/completions with "documents": [{"id": ...}]. README.md has the rest."""


def main() -> int:
    """Run the demo; returns the exit code."""
    started = time.monotonic()
    shutil.rmtree(RUN, ignore_errors=True)
    RUN.mkdir(parents=True)
    questions = [json.loads(line) for line in (ROOT / "examples/questions.jsonl").read_text().splitlines()]
    try:
        step("1. Precompute: examples/corpus.jsonl -> caches in runs/demo/store (Ray Data)")
        run([
            sys.executable, "pipeline/precompute.py", "--input", "examples/corpus.jsonl",
            "--store", str(STORE), "--model", "embedded", "--ray-address", "local",
            "--summary-json", str(RUN / "precompute.json"),
        ])  # fmt: skip
        step("2. Serve them (Ray Serve), ask over HTTP with and without reuse")
        with service(STORE, RUN) as client:
            right, asked = ask_all(client, questions)
        if right * 2 < asked:
            raise DemoError(f"only {right} of {asked} answers were right: the model or the linking is broken.")
        step("3. The same where prefill costs something: 100 M-parameter Llama shape, 5,000 context tokens")
        show_large_shape()
    except DemoError as error:
        console.print(f"\n[red]demo failed:[/red] {error}")
        return 1
    except KeyboardInterrupt:
        return 130
    console.print(NEXT, soft_wrap=True)
    console.print(f"\ndone in {time.monotonic() - started:.0f} s; all that was started has been stopped.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
