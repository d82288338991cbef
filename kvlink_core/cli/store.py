"""``kvlink store``: looking at a store. What changes one is in ``store_changes``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.store_changes import compact, delete, expire, gc, rebuild
from kvlink_core.cli.store_common import (
    AnyNamespace,
    Codec,
    Fingerprint,
    Json,
    Namespace,
    Store,
    count,
    progress,
    say,
    show_json,
    size,
)
from kvlink_core.cli.store_tables import show_document, show_documents, show_problems, show_shard, show_stats
from kvlink_core.errors import ConfigError

store_app = typer.Typer(
    help="Look after a store: see what is in it, check it, delete, collect, compact, rebuild, export.\n\n"
    "Commands that remove something show what they would do; **--yes** does it. Credentials for `s3://` come from the "
    "environment (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, ...). docs/store.md explains more.",
    no_args_is_help=True,
    rich_markup_mode="markdown",
)


@store_app.command("ls")
def ls(
    store: Store,
    namespace: Namespace = "default",
    prefix: Annotated[str, typer.Option(help="Only ids that begin with this.")] = "",
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    limit: Annotated[int, typer.Option(min=0, help="Documents shown at most; 0 for all.")] = 50,
    as_json: Json = False,
) -> None:
    """List the documents of a namespace, by id.

    Example: `kvlink store ls ./store --prefix manuals/ --limit 0 --json`
    """
    from kvlink_core.store import lifecycle

    with lifecycle.StoreKeeper.open(store) as keeper:
        scope = keeper.scope(namespace, fingerprint, codec)
        listing = lifecycle.list_documents(keeper, scope, prefix=prefix, limit=limit or None)
    if as_json:
        show_json(listing)
        return
    show_documents(listing.rows, namespace)
    more = f", {len(listing.rows):,} shown; --limit 0 shows all" if len(listing.rows) < listing.total else ""
    say(f"{count(listing.total, 'document')}{more}")


@store_app.command("inspect")
def inspect(
    store: Store,
    document_id: Annotated[str | None, typer.Argument(help="Id of a document.", show_default=False)] = None,
    shard: Annotated[str | None, typer.Option(help="Or a shard: the first digits of its file's name.")] = None,
    namespace: Namespace = "default",
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    as_json: Json = False,
) -> None:
    """Show everything about one document, and read it; or about one shard.

    Exit code 1 when a document cannot be served. Example: `kvlink store inspect ./store doc-1`
    """
    from kvlink_core.store import lifecycle

    if (document_id is None) == (shard is None):
        raise ConfigError("name either a document or, with --shard, a shard.")
    with lifecycle.StoreKeeper.open(store) as keeper:
        scope = keeper.scope(namespace, fingerprint, codec)
        if shard is not None:
            info = lifecycle.inspect_shard(keeper, scope, shard)
            show_json(info) if as_json else show_shard(info)
            return
        found = lifecycle.inspect_document(keeper, scope, document_id or "")
    if as_json:
        show_json(found)
    else:
        for item in found:
            show_document(item)
    if any(item.problem for item in found):
        raise typer.Exit(1)


@store_app.command("stats")
def stats(
    store: Store,
    namespace: AnyNamespace = None,
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    as_json: Json = False,
) -> None:
    """Count documents, tokens and bytes by namespace, model, codec and age; also what lies unused."""
    from kvlink_core.store import lifecycle

    with lifecycle.StoreKeeper.open(store) as keeper:
        found = lifecycle.stats(keeper, keeper.scope(namespace, fingerprint, codec))
    if as_json:
        show_json(found)
        return
    show_stats(found)


@store_app.command("verify")
def verify(
    store: Store,
    namespace: AnyNamespace = None,
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    quick: Annotated[bool, typer.Option("--quick", help="Do not read K and V, only what shards say of them.")] = False,
    jobs: Annotated[int | None, typer.Option(min=1, help="Threads; default: one a processor, at most 8.")] = None,
    as_json: Json = False,
) -> None:
    """Read and check every document that the catalog names, in parallel.

    Exit code 1 when one cannot be served, with a list. A document that fails here is computed again when it is asked
    for, never served wrong; `precompute --replace` mends the store.
    """
    from kvlink_core.store import lifecycle

    with lifecycle.StoreKeeper.open(store) as keeper, progress() as show:
        scope = keeper.scope(namespace, fingerprint, codec)
        found = lifecycle.verify(keeper, scope, values=not quick, jobs=jobs, progress=show)
    if as_json:
        show_json({"sound": found.sound, "verification": found})
    else:
        if found.problems:
            show_problems(found.problems)
        bad = len({(p.namespace, i) for p in found.problems if p.bad for i in p.documents})
        verdict = "all can be served" if found.sound else f"{bad:,} cannot be served"
        payloads = f"{count(found.payloads, 'payload')}, {size(found.nbytes)}, in {count(found.shards, 'shard')}"
        checked = "looked at" if quick else "read and checked"
        say(f"{checked} {count(found.documents, 'document')} ({payloads}): {verdict}")
    if not found.sound:
        raise typer.Exit(1)


@store_app.command("export")
def export(
    store: Store,
    directory: Annotated[Path, typer.Argument(help="A new or empty directory, or an earlier export.")],
    document_id: Annotated[
        list[str] | None, typer.Option("--id", "-i", help="Only this document; repeat for more.", show_default=False)
    ] = None,
    namespace: Namespace = "default",
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    as_json: Json = False,
) -> None:
    """Write documents of a namespace as plain files: `NAME.safetensors` and `NAME.json` for each.

    They hold token ids, keys before RoPE and values, decoded. Exit code 1 when a document cannot be read.
    """
    from kvlink_core.store import lifecycle

    with lifecycle.StoreKeeper.open(store) as keeper, progress() as show:
        scope = keeper.scope(namespace, fingerprint, codec)
        done = lifecycle.export(keeper, scope, directory, document_ids=document_id, progress=show)
    if as_json:
        show_json(done)
    else:
        say(f"wrote {count(done.documents, 'document')}, {size(done.nbytes)}, to {directory}")
        for name, reason in done.failures.items():
            say(f"not {name!r}: {reason}", style="red")
    if done.failures:
        raise typer.Exit(1)


for _change in (delete, expire, gc, compact, rebuild):
    store_app.command()(_change)
