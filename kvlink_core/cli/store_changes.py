"""``kvlink store``: commands that change a store. Without ``--yes`` they only show what they would do."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.common import stderr
from kvlink_core.cli.store_common import (
    AnyNamespace,
    Codec,
    Fingerprint,
    Json,
    Namespace,
    Store,
    Yes,
    count,
    parse_duration,
    parse_size,
    progress,
    say,
    show_json,
    size,
    some,
)
from kvlink_core.errors import ConfigError


def _not_done(yes: bool) -> None:
    if not yes:
        stderr.print("Nothing was done; --yes does it.", style="yellow")


def delete(
    store: Store,
    document_id: Annotated[list[str] | None, typer.Argument(help="Ids of documents.", show_default=False)] = None,
    ids_from: Annotated[
        Path | None, typer.Option(help="A file with one id a line, `-` for standard input.", show_default=False)
    ] = None,
    namespace: Namespace = "default",
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    parts: Annotated[
        bool, typer.Option("--parts", help="Also chunks (`ID#0`) and copies for places of a prompt (`ID@0`).")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete documents by id: from the next look at the catalog on, nobody finds them.

    Their bytes go with the next `gc`; where they share a shard with others, after `compact --dead 0` and `gc`.
    Example: `kvlink store delete ./store doc-1 doc-2 --yes`
    """
    from kvlink_core.store import lifecycle

    wanted = [*(document_id or []), *_read_ids(ids_from)]
    if not wanted:
        raise ConfigError("name the documents to delete.")
    with lifecycle.StoreKeeper.open(store) as keeper:
        scope = keeper.scope(namespace, fingerprint, codec)
        done = lifecycle.delete(keeper, scope, wanted, parts=parts, dry_run=not yes)
    if as_json:
        show_json(done)
        return
    _say_removal(done, "deleted" if yes else "would delete")
    if done.missing:
        say(f"not there: {some(done.missing)}")
    if done.parts:
        say(f"stored in chunks or for places of a prompt, which --parts deletes: {some(done.parts)}")
    _not_done(yes)


def _read_ids(source: Path | None) -> list[str]:
    if source is None:
        return []
    try:
        text = sys.stdin.read() if str(source) == "-" else source.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read {str(source)!r}: {error}.", param="ids_from") from error
    return [line for line in text.split("\n") if line]


def _say_removal(done: object, verb: str) -> None:
    from kvlink_core.store.lifecycle import Removal

    assert isinstance(done, Removal)
    named = f": {some(done.examples)}" if done.examples else ""
    more = " and more" if done.documents > len(done.examples) else ""
    say(f"{verb} {count(done.documents, 'document')}, {count(done.tokens, 'token')}, {size(done.nbytes)}{named}{more}")


def expire(
    store: Store,
    older_than: Annotated[str, typer.Option(help="The time to live, e.g. `30d`: older documents are deleted.")],
    namespace: Namespace = "default",
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Delete documents whose latest version was written longer ago than their time to live.

    Committing a document again that is there unchanged does not make it younger; `precompute --replace` does.
    Example: `kvlink store expire ./store --older-than 30d --yes`
    """
    from kvlink_core.store import lifecycle

    limit = parse_duration(older_than, "--older-than")
    with lifecycle.StoreKeeper.open(store) as keeper:
        done = lifecycle.expire(keeper, keeper.scope(namespace, fingerprint, codec), limit, dry_run=not yes)
    if as_json:
        show_json(done)
        return
    _say_removal(done, "deleted" if yes else "would delete")
    _not_done(yes)


def gc(
    store: Store,
    grace: Annotated[
        str, typer.Option(help="How old an unused file must be. Longer than any job takes from writing to committing.")
    ] = "24h",
    everything: Annotated[bool, typer.Option("--all", help="Go on even if the catalog names nothing at all.")] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Remove payloads that nothing names: of deleted and replaced documents, and of writers that died.

    Safe while others read and write; `--grace 0` only when nobody does. Also drops superseded catalog rows, merges the
    catalog's small files and vacuums it. Files that are not the store's own are never touched.
    """
    from kvlink_core.store import lifecycle

    period = parse_duration(grace, "--grace")
    with lifecycle.StoreKeeper.open(store) as keeper, progress() as show:
        done = lifecycle.collect(keeper, period, dry_run=not yes, everything=everything, progress=show)
    if as_json:
        show_json(done)
        return
    verb = "removed" if yes else "would remove"
    files = f"{count(len(done.shards), 'shard')} ({count(done.files, 'file')}, {size(done.nbytes)})"
    say(f"{verb} {files}" + (f": {some(done.shards, 3)}" if done.shards else ""))
    say(f"{verb} {count(len(done.catalog), 'old catalog file')}, {count(len(done.unfinished), 'unfinished write')}")
    say(f"{'dropped' if yes else 'would drop'} {count(done.superseded, 'superseded row')} of the catalog")
    if done.young:
        say(f"unused, but younger than {grace}: {count(len(done.young), 'shard')}, {size(done.young_nbytes)}")
    if done.unknown:
        say(f"left alone, since they are not this store's: {some(done.unknown, 3)}", style="yellow")
    if done.nothing_named and not everything:
        say(
            "The catalog names no document at all. If it was lost, `kvlink store rebuild` makes it again; "
            "to remove all shards, say --all.",
            style="red",
        )
    _not_done(yes)


def compact(
    store: Store,
    namespace: AnyNamespace = None,
    fingerprint: Fingerprint = None,
    codec: Codec = None,
    target: Annotated[str, typer.Option(help="Size of a new shard, about; also the memory that is used.")] = "256MiB",
    dead: Annotated[
        float,
        typer.Option(min=0, max=1, help="Share of deleted documents from which a large shard is written again, too."),
    ] = 0.5,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Write the documents of many small shards into few, and leave deleted ones behind.

    Safe while others read and write: the old shards stay until `gc` collects them. Exit code 1 when a document could
    not be read; it stays where it is.
    """
    from kvlink_core.store import lifecycle

    nbytes = parse_size(target, "--target")
    with lifecycle.StoreKeeper.open(store) as keeper, progress() as show:
        scope = keeper.scope(namespace, fingerprint, codec)
        done = lifecycle.compact(keeper, scope, target=nbytes, dead=dead, dry_run=not yes, progress=show)
    if as_json:
        show_json(done)
    else:
        say(
            f"{'wrote' if yes else 'would write'} {count(done.documents, 'payload')}, {size(done.nbytes)}, of "
            f"{count(done.before, 'shard')} into {done.after:,}; {done.dead:,} unused ones left behind"
        )
        for failure in done.failures:
            say(f"not {some(failure.documents)}: {failure.reason}", style="red")
        _not_done(yes)
    if done.failures:
        raise typer.Exit(1)


def rebuild(
    store: Store,
    from_shards: Annotated[
        bool, typer.Option("--from-shards", help="Believe nothing that the present catalog says.")
    ] = False,
    yes: Yes = False,
    as_json: Json = False,
) -> None:
    """Make the catalog again from what the shards say of themselves.

    What the present catalog soundly says is kept; deleted documents stay deleted. From shards alone, ids that were
    added later to a text that was there already are not known. While the catalog can be opened this is safe beside
    readers and writers; else stop them first.
    """
    from kvlink_core.store import lifecycle

    with lifecycle.StoreKeeper.open(store) as keeper, progress() as show:
        done = lifecycle.rebuild(keeper, from_shards=from_shards, dry_run=not yes, progress=show)
    if as_json:
        show_json(done)
    else:
        damaged = f", {count(done.damaged_rows, 'damaged row')}" if done.damaged_rows else ""
        say(f"the present catalog: {done.catalog}{damaged}")
        say(
            f"{'made' if yes else 'would make'} a catalog of {count(done.documents, 'document')} from "
            f"{count(done.shards, 'shard')}: {done.kept:,} that it has now and {done.added:,} more"
        )
        if done.lost:
            say(f"no longer to be had: {some(done.lost)}", style="red")
        for shard, reason in done.failures.items():
            say(f"left out {shard}: {reason}", style="red")
        if done.moved:
            say(f"the unreadable log is in {done.moved}; start readers and writers anew", style="yellow")
        _not_done(yes)
    if done.lost or done.failures:
        raise typer.Exit(1)
