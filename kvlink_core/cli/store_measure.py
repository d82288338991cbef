"""``kvlink store measure``: how fast the catalog is. Hidden, since it says nothing of a user's own store."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from kvlink_core.cli.store_common import Json, progress, say, show_json


def measure(
    rows: Annotated[int, typer.Option(min=1000, help="Rows of the catalog.")] = 1_000_000,
    as_json: Json = False,
) -> None:
    """Measure a catalog of many rows in a temporary directory: lookups, memory, refreshing."""
    from kvlink_core.store.lifecycle.measure import DOCUMENTS, LOOKUPS
    from kvlink_core.store.lifecycle.measure import measure as run

    with tempfile.TemporaryDirectory(prefix="kvlink-measure-") as scratch, progress() as show:
        f = run(Path(scratch), rows, show)
    if as_json:
        show_json(f)
        return
    resident = "unknown" if f.resident_bytes is None else f"{f.resident_bytes:.0f} bytes"
    say(f"{f.rows:,} rows; {f.processors} processors, load {f.load_before:.2f} before and {f.load_after:.2f} after")
    say(f"open: {f.open_s:.2f} s; memory a document: {f.index_bytes:.0f} bytes held, {resident} resident")
    say(f"{DOCUMENTS} documents by id, of {LOOKUPS} lookups: median {f.by_id:.2f} ms, 99 % under {f.by_id_p99:.2f} ms")
    say(f"{DOCUMENTS} by token digest: median {f.by_tokens:.2f} ms, 99 % under {f.by_tokens_p99:.2f} ms")
    say(
        f"refresh after nothing {f.refresh_nothing:.1f} ms, one row {f.refresh_row:.1f}, a thousand "
        f"{f.refresh_thousand:.1f}, a deletion {f.refresh_deleted:.1f}"
    )
