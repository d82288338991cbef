"""``kvlink ask``."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from kvlink_core.cli.common import Device, Dtype, Model, stderr
from kvlink_core.errors import ConfigError


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
    codec: Annotated[str, typer.Option(help="Codec of the store's caches.")] = "raw",
    linker: Annotated[
        str | None, typer.Option(help="E.g. `full`, or with a parameter `epic:k=8`; docs/linkers.md has all.")
    ] = None,
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
    opened = (
        DocumentStore.open(store, fingerprint=loaded.fingerprint, namespace=namespace, codec=codec) if store else None
    )
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
