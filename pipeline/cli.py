"""The command line of the precompute job."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from kvlink_core.errors import ConfigError, KVLinkError
from pipeline.config import PrecomputeConfig, load_config
from pipeline.summary import Summary

#: Base of typer's own errors: an unknown option, a missing value. Which class that is depends on typer's version
#: (its own, or click's), and neither is public; its name is the same in all.
_USAGE_ERROR: Any = next(c for c in typer.BadParameter.__mro__ if c.__name__ == "ClickException")

#: ``\b`` keeps the lines of a paragraph as they are.
HELP = """
Compute the KV cache of every document of a corpus, once, and store it.

What the store already has is skipped, so running the job again is cheap, and a killed run is completed by the next.
With --replace nothing is skipped: what is damaged in the store is mended.

\b
On this machine, with the small model that ships:
  python pipeline/precompute.py --input corpus.jsonl --store ./store

\b
A folder and a glob, columns named, with a model of yours on two GPUs:
  python pipeline/precompute.py --input docs/ --input 's3://bucket/wiki/*.parquet' \\
    --text-column body --id-column url --model /models/llama \\
    --store s3://bucket/caches --actors 2 --num-gpus 1

\b
On a running cluster (absolute paths or URLs that every node reaches):
  ray job submit --address http://HEAD:8265 --working-dir . -- \\
    python pipeline/precompute.py --input /data/corpus --store /data/store

\b
Settings from a file, one of them overridden:
  python pipeline/precompute.py --config pipeline/configs/gpu.yaml --actors 8

INPUT is .jsonl, .jsonl.gz, .parquet, .txt or .md. A row needs a text; without an id it is called file:row. Documents
over --chunk-tokens are split at sentence borders into chunks ID#0, ID#1, ...

EXIT CODE 0: done; documents that failed are listed with reasons. 1: some failed, with --strict. 2: the job cannot be
done as asked (one line says why); what was committed before stays.
"""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

Texts = list[str] | None


@app.command(help=HELP)
def precompute(
    config: Annotated[
        str | None, typer.Option(help="YAML file with these keys (input: [...], num_gpus: 1, ...).")
    ] = None,
    input: Annotated[
        Texts, typer.Option(help="File, folder or glob; a path or fsspec URL. May be repeated.", metavar="TEXT")
    ] = None,
    store: Annotated[
        str | None, typer.Option(help="Where the caches go: a folder or fsspec URL; made if missing.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="'embedded' (default), a Hugging Face directory, or random:SHAPE.")
    ] = None,
    text_column: Annotated[str | None, typer.Option(help="Column of the text. [text]")] = None,
    id_column: Annotated[str | None, typer.Option(help="Column of the id. [id if there, else file:row]")] = None,
    title_column: Annotated[str | None, typer.Option(help="Column of the title. [title, if there]")] = None,
    input_option: Annotated[
        Texts, typer.Option(help="KEY=VALUE for the input's file system. May be repeated.", metavar="TEXT")
    ] = None,
    bad_files: Annotated[
        str | None, typer.Option(help="A file that cannot be read: 'fail' (default) or 'skip' it.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Namespace of the documents. [default]")] = None,
    codec: Annotated[
        str | None,
        typer.Option(help="How keys and values become bytes, e.g. int4 or int4:keep=0.5,scorer=knorm. [raw]"),
    ] = None,
    storage_option: Annotated[
        Texts, typer.Option(help="KEY=VALUE for the store's file system. May be repeated.")
    ] = None,
    replace: Annotated[
        bool | None,
        typer.Option("--replace/--no-replace", help="Compute also what the store has, and replace it: mends damage."),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16. [float32 on CPU, the model's own on GPU]")
    ] = None,
    device: Annotated[str | None, typer.Option(help="Torch device. [cuda with --num-gpus, else cpu]")] = None,
    chunk_tokens: Annotated[
        int | None, typer.Option(help="Most tokens of a chunk, the model's context at most. [512]")
    ] = None,
    places: Annotated[
        int | None,
        typer.Option(help="For a document template that names the place: store each chunk for the first N places."),
    ] = None,
    max_batch_tokens: Annotated[int | None, typer.Option(help="Tokens of one forward pass. [4096]")] = None,
    shard_mb: Annotated[float | None, typer.Option(help="About how large a shard is, in MiB. [256]")] = None,
    actors: Annotated[int | None, typer.Option(help="How many workers hold the model. [1]")] = None,
    num_gpus: Annotated[float | None, typer.Option(help="GPUs of each actor; may be a fraction. [0]")] = None,
    num_cpus: Annotated[float | None, typer.Option(help="CPUs that Ray sets aside for each actor. [0.25]")] = None,
    threads: Annotated[int | None, typer.Option(help="Torch threads of each actor. [cores / actors]")] = None,
    ray_address: Annotated[
        str | None,
        typer.Option(help="Ray to use: 'auto', host:port, 'local'. [$RAY_ADDRESS, which a job has, or a new one]"),
    ] = None,
    commit_interval_s: Annotated[
        float | None, typer.Option(help="Seconds between commits: the most work that a kill loses. [30]")
    ] = None,
    no_progress_timeout_s: Annotated[
        float | None, typer.Option(help="Give up when nothing has moved for so long, say for lack of a GPU. [600]")
    ] = None,
    strict: Annotated[
        bool | None, typer.Option("--strict/--no-strict", help="Exit with 1 when a document failed.")
    ] = None,
    summary_json: Annotated[str | None, typer.Option(help="Write the summary here as JSON, with all failures.")] = None,
) -> None:
    """Read the settings, run the job, say what it did."""
    given = {k: v for k, v in locals().items() if k in PrecomputeConfig.model_fields}
    given["input"] = input or None
    given["input_options"] = _pairs("--input-option", input_option)
    given["storage_options"] = _pairs("--storage-option", storage_option)
    settings = load_config(config, given)
    _check_writable(settings.summary_json)
    from pipeline import job  # Ray takes seconds to import, and --help and bad settings need none of it

    summary = job.run(settings)
    _report(summary, settings)
    if settings.strict and summary.failed:
        raise typer.Exit(1)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code. Bad input is one line on standard error and 2."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # no telemetry
    try:
        code = app(args=None if arguments is None else list(arguments), standalone_mode=False)
    except KVLinkError as error:
        return _complain(str(error))
    except _USAGE_ERROR as error:
        return _complain(f"{' '.join(error.format_message().split())} (--help shows all options)")
    except (typer.Abort, KeyboardInterrupt):
        return _complain("interrupted; what was committed stays, and running again completes it.", 130)
    return code if isinstance(code, int) else 0


def _complain(message: str, code: int = 2) -> int:
    print(f"error: {message}", file=sys.stderr)
    return code


def _pairs(option: str, values: Sequence[str] | None) -> dict[str, str] | None:
    pairs: dict[str, str] = {}
    for each in values or ():
        key, found, value = each.partition("=")
        if not key or not found:
            raise ConfigError(f"{option}: {each!r} is not KEY=VALUE.")
        pairs[key] = value
    return pairs or None


def _check_writable(path: str | None) -> None:
    """Learn before the work, not after it, that the summary cannot be written."""
    if path is None:
        return
    try:
        with Path(path).open("a", encoding="utf-8"):
            pass
    except OSError as error:
        raise ConfigError(f"cannot write the summary to {path!r}: {error.strerror}.", param="summary_json") from error


def _report(summary: Summary, settings: PrecomputeConfig) -> None:
    """The table, the JSON file, and the JSON again as the last line of standard output (20 failures of it)."""
    summary.print(Console())
    if settings.summary_json is not None:
        Path(settings.summary_json).write_text(summary.to_json(indent=2) + "\n", encoding="utf-8")
    print(summary.to_json(most=20), flush=True)
