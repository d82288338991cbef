"""The tables that travel between the steps of the job, and the steps that need no model.

What is imported here must not import torch: Ray starts a process for each of the tasks that run side by side, and
those that only read or filter should start fast. (A bad row or file never raises: it is a row that says why.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.errors import CorpusError
from pipeline.reading import BadRow, Columns, Row, read_file
from pipeline.sources import SourceFile

#: Rows as read. ``outcome`` is ``ok``, ``bad-row``, ``bad-file``, or ``fatal`` for what must stop the job.
READ_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("place", pa.string()),
        ("document_id", pa.string()),
        ("text", pa.large_string()),
        ("title", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
    ]
)

#: Chunks with their tokens (little-endian uint32). ``ticket`` names the row; ``part`` numbers a document's rows.
SCAN_SCHEMA = pa.schema(
    [
        ("outcome", pa.string()),
        ("place", pa.string()),
        ("document_id", pa.string()),
        ("chunk_id", pa.string()),
        ("part", pa.int32()),
        ("titled", pa.bool_()),
        ("text_digest", pa.binary()),
        ("token_digest", pa.string()),
        ("tokens", pa.int64()),
        ("ticket", pa.binary()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("token_ids", pa.large_binary()),
    ]
)

#: What an actor says of each chunk. ``catalog`` is the row to commit, as JSON; empty where ``code`` says what failed;
#: where ``fatal`` is true that is the job, not the document (exceptions of one process do not survive the way whole).
#: ``began`` and ``ended`` (seconds since the epoch) are those of its block.
RESULT_SCHEMA = pa.schema(
    [
        ("chunk_id", pa.string()),
        ("token_digest", pa.string()),
        ("tokens", pa.int64()),
        ("catalog", pa.string()),
        ("code", pa.string()),
        ("reason", pa.string()),
        ("fatal", pa.bool_()),
        ("began", pa.float64()),
        ("ended", pa.float64()),
    ]
)


def read_files(
    table: pa.Table, *, columns: Columns, options: Mapping[str, Any], rows_per_block: int = 256
) -> Iterator[pa.Table]:
    """Read the files whose ``SourceFile`` fields are the rows of ``table``, as tables of ``READ_SCHEMA``."""
    for fields in table.to_pylist():
        file = SourceFile(**fields)
        rows = _read_rows(file, columns, options)
        while block := list(islice(rows, rows_per_block)):
            yield pa.Table.from_pylist(block, schema=READ_SCHEMA)
    yield READ_SCHEMA.empty_table()  # Ray needs a schema of a file without rows, too


def _read_rows(file: SourceFile, columns: Columns, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    try:
        for row in read_file(file, columns, options):
            if isinstance(row, Row):
                yield {
                    "outcome": "ok",
                    "place": row.place,
                    "document_id": row.id,
                    "text": row.text,
                    "title": row.title,
                }
            else:
                yield bad_row("bad-row", row)
    except CorpusError as error:
        yield bad_row("bad-file", BadRow(file.url, None, error.code, str(error)))


def bad_row(outcome: str, row: BadRow) -> dict[str, Any]:
    """A row of ``READ_SCHEMA`` (and, with its ``part``, of ``SCAN_SCHEMA``) that says what failed."""
    # What a bad row says of itself may quote its own broken Unicode.
    reason = row.reason[:500].encode("utf-8", "replace").decode()
    return {"outcome": outcome, "place": row.place, "document_id": row.id, "code": row.code, "reason": reason}


def select_rows(table: pa.Table, *, tickets: np.ndarray[Any, Any]) -> pa.Table:
    """The rows whose ticket is among ``tickets`` (sorted, 16 bytes each), without the columns no longer needed."""
    kept = table.filter(pc.equal(table["outcome"], "ok"))
    mine = np.array(kept["ticket"].to_pylist(), dtype="S16")
    at = np.minimum(np.searchsorted(tickets, mine), len(tickets) - 1)
    return kept.filter(pa.array(tickets[at] == mine)).select(["chunk_id", "token_digest", "tokens", "token_ids"])
