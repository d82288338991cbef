"""The ``kvlink`` command. Each subcommand parses, calls the library and shows; nothing is computed here."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from kvlink_core import __version__
from kvlink_core.errors import ConfigError, KVLinkError

app = typer.Typer(
    help="KVLink: compute each document's KV cache once, store it, link it into any prompt.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)
bench_app = typer.Typer(
    help="Measure speed: alternating runs in one process, medians and ratios.", no_args_is_help=True
)
eval_app = typer.Typer(help="Measure quality.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")

stdout = Console(emoji=False)
stderr = Console(stderr=True, emoji=False)

Model = Annotated[str, typer.Option(help="`embedded`, a Hugging Face directory, or `random:SHAPE`.")]
Device = Annotated[str, typer.Option(help="Torch device, e.g. `cpu` or `cuda`.")]
Dtype = Annotated[str | None, typer.Option(help="`float32`, `bfloat16` or `float16`; default: float32 on CPU.")]


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=stderr
    )


def _probe(path: Path | None) -> None:
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


@app.command()
def ask(
    question: Annotated[str, typer.Argument(help="What to ask.")],
    document: Annotated[
        list[str] | None, typer.Option("--document", "-d", help="Text of a document; repeat for more.")
    ] = None,
    document_id: Annotated[
        list[str] | None, typer.Option("--id", "-i", help="Id of a document in the store; repeat for more.")
    ] = None,
    store: Annotated[str | None, typer.Option(help="Store to load caches from: a path or an fsspec URL.")] = None,
    namespace: Annotated[str, typer.Option(help="Namespace within the store.")] = "default",
    linker: Annotated[str | None, typer.Option(help="`full`, `reposition` or `link-tokens`.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    model: Model = "embedded",
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Ask one question over some documents, in this process.

    Example: `kvlink ask "Where does Maria Lopez live?" -d "Maria Lopez was born in Lima." -d "She lives in Oslo."`
    """
    from kvlink_core.engine import SamplingParams
    from kvlink_core.models import load_model
    from kvlink_core.session import AnswerRequest, Session
    from kvlink_core.store import DocumentStore
    from kvlink_core.types import Document, DocumentRef, Message

    if document_id and store is None:
        raise ConfigError("--id names a document of a store; say which with --store.")
    loaded = load_model(model, device=device, dtype=dtype)
    opened = DocumentStore.open(store, fingerprint=loaded.fingerprint, namespace=namespace) if store else None
    texts = [Document(f"document-{i}", text) for i, text in enumerate(document or [], 1)]
    answer = Session(loaded, opened).start(
        AnswerRequest(
            [Message("user", question)],
            [*(DocumentRef(i) for i in document_id or []), *texts],
            linker,
            SamplingParams(temperature=temperature, max_tokens=max_tokens),
        )
    )
    for event in answer:
        sys.stdout.write(event.text)  # as it is: rich would read markup, and wrap
        sys.stdout.flush()
    sys.stdout.write("\n")
    usage, t = answer.usage, answer.timings
    stderr.print(
        f"[dim]{answer.linker}: {usage.prompt_tokens} prompt tokens, {usage.cached_tokens} cached, "
        f"{usage.computed_tokens} computed; first token after {1e3 * t.ttft_s:.1f} ms[/dim]"
    )


@app.command("sample")
def sample_command(
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


@bench_app.command("ttft")
def bench_ttft(
    model: Model = "random:llama-100m",
    device: Device = "cpu",
    dtype: Dtype = None,
    documents: Annotated[int, typer.Option(min=1, help="Documents in the prompt.")] = 10,
    document_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each.")] = 500,
    query_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the question.")] = 32,
    links: Annotated[int, typer.Option(min=1, help="Link tokens after each document.")] = 5,
    linker: Annotated[list[str] | None, typer.Option(help="Linkers to measure beside `full`; repeat.")] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Counted runs of each.")] = 7,
    disk: Annotated[bool, typer.Option(help="Also measure reading the caches from a store on local disk.")] = True,
    output: Annotated[Path | None, typer.Option("--json", help="Write all figures here.")] = None,
) -> None:
    """Time to first token of every linker, beside full prefill and beside the floor.

    The floor is the model's forward over link and query tokens with the KV cache ready in memory.
    """
    import tempfile

    import torch

    from kvlink_core.benchmark.ttft import FLOOR, FULL, Case, measure
    from kvlink_core.models import load_model

    _probe(output)
    case = Case(documents, document_tokens, query_tokens, links)
    loaded = load_model(model, device=device, dtype=dtype)
    with tempfile.TemporaryDirectory(prefix="kvlink-bench-") as scratch, _bar() as bar:
        task = bar.add_task("measuring", total=None)
        rows = measure(
            loaded,
            case,
            linker or ["reposition", "link-tokens"],
            repeats=repeats,
            store_directory=Path(scratch) / "store" if disk else None,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    medians = {row.name: row.median for row in rows}
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"CPU, {torch.get_num_threads()} threads"
    table = Table(
        title=f"time to first token: {model}, {loaded.fingerprint.dtype}, {documents} x {document_tokens} tokens "
        f"+ {query_tokens} query tokens, {links} links; {where}; median of {repeats}",
        title_justify="left",
    )
    for column in ("candidate", "computed tokens", "median ms", "min ms", "of full", "x floor"):
        table.add_column(column, justify="left" if column == "candidate" else "right")
    for row in rows:
        table.add_row(
            row.name,
            str(row.computed_tokens),
            f"{1e3 * row.median:.1f}",
            f"{1e3 * min(row.seconds):.1f}",
            f"{100 * row.median / medians[FULL]:.1f} %",
            f"{row.median / medians[FLOOR]:.2f}",
        )
    stdout.print(table)
    if output:
        figures = {
            "model": model,
            "dtype": loaded.fingerprint.dtype,
            "device": where,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "case": {k: getattr(case, k) for k in case.__slots__},
            "rows": [{"name": r.name, "computed_tokens": r.computed_tokens, "seconds": r.seconds} for r in rows],
        }
        output.write_text(json.dumps(figures, indent=1))


@eval_app.command("worlds")
def eval_worlds(
    questions: Annotated[int, typer.Option(min=1, help="Held-out questions.")] = 2000,
    condition: Annotated[
        list[str] | None,
        typer.Option(help="A linker, or `link-tokens:K` to use its first K link tokens; repeat. Default: all four."),
    ] = None,
    model: Model = "embedded",
    device: Device = "cpu",
    output: Annotated[Path | None, typer.Option("--jsonl", help="Write every question and answer here.")] = None,
) -> None:
    """Exact match on held-out generated worlds, by linker and kind of question, greedy."""
    from kvlink_core.evaluation.worlds import Condition, accuracy, evaluate
    from kvlink_core.models import load_model

    _probe(output)
    names = condition or ["full", "link-tokens", "link-tokens:1", "reposition"]
    conditions = []
    for name in names:
        linker, colon, k = name.partition(":")
        if colon and not k.isdigit():
            raise ConfigError(f"condition {name!r}: write LINKER or link-tokens:K with a whole number K.")
        conditions.append(Condition(linker, int(k) if colon else None))
    loaded = load_model(model, device=device)
    with _bar() as bar:
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


def main() -> None:
    """Entry point: what KVLink raises on purpose becomes one line on standard error and exit code 2."""
    try:
        app()
    except KVLinkError as error:
        stderr.print(f"kvlink: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
