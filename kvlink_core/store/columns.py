"""The catalog's files as Arrow tables: read without trusting them, and turned column by column."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from kvlink_core.store.tables import read_table

#: What a character is worth as a hexadecimal digit; 255 for one that is none.
_DIGITS = np.full(256, 255, dtype=np.uint8)
for _value, _digit in enumerate("0123456789abcdef"):
    _DIGITS[ord(_digit)] = _value


def read_rows(data: bytes, columns: Sequence[str]) -> pa.Table:
    """Columns of a catalog file. Rows with nulls or with text that is not UTF-8 are left out: they are damaged.

    Raises what Arrow raises for a file that cannot be read as Parquet with these columns.
    """
    table = read_table(data, columns)
    if "created_at" in table.column_names:
        at = table.column_names.index("created_at")
        table = table.set_column(at, "created_at", table["created_at"].cast(pa.timestamp("us", "UTC")))
    if any(column.null_count for column in table.columns):
        table = table.drop_null()
    try:
        table.validate(full=True)
    except pa.ArrowInvalid:
        table = table.filter(pa.array([_is_text(table, i) for i in range(table.num_rows)], pa.bool_()))
    return table


def _is_text(table: pa.Table, row: int) -> bool:
    try:
        table.slice(row, 1).to_pylist()
    except UnicodeDecodeError:
        return False
    return True


def binary_of_hex(column: pa.ChunkedArray) -> tuple[pa.Array, pa.Array]:
    """Token digests of 64 hexadecimal digits as 32 bytes each, and for each whether it was one."""
    sound = pc.equal(pc.binary_length(column), 64)
    padded = pc.if_else(sound, column, "0" * 64).cast(pa.binary(64)).combine_chunks()
    if isinstance(padded, pa.ChunkedArray):
        padded = pa.concat_arrays(padded.chunks) if padded.num_chunks else pa.array([], pa.binary(64))
    text = np.frombuffer(padded.buffers()[1] or b"", dtype=np.uint8)[64 * padded.offset :][: 64 * len(padded)]
    digits = _DIGITS[text].reshape(-1, 32, 2)
    proper = (digits < 16).all(axis=(1, 2))
    data = (digits[..., 0] << 4 | digits[..., 1] & 15).tobytes()
    digests = pa.FixedSizeBinaryArray.from_buffers(pa.binary(32), len(padded), [None, pa.py_buffer(data)])
    return digests, pc.and_(pa.array(proper), sound.combine_chunks())
