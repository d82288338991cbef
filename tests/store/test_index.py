"""The catalog in memory against a dictionary, and against damage."""

from __future__ import annotations

import hashlib
import io
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from store_places import Place, make_cache

from kvlink_core.store.columns import binary_of_hex
from kvlink_core.store.index import INDEX_SCHEMA, CatalogIndex
from kvlink_core.store.rows import CatalogRow, from_micros, to_micros

START = datetime(2026, 1, 1, tzinfo=UTC)


def row(name: str, text: int, age: int, shard: int = 0) -> CatalogRow:
    digest = hashlib.sha256(str(text).encode()).hexdigest()
    at = START + timedelta(microseconds=age)
    return CatalogRow(name, "default", "f" * 64, digest, "raw", f"{shard:064x}.parquet", text, 3, 99, at)


def table(rows: list[CatalogRow]) -> pa.Table:
    data = {
        "document_id": [r.document_id for r in rows],
        "token_digest": pa.array([bytes.fromhex(r.token_digest) for r in rows], pa.binary(32)),
        "shard": pa.array([r.shard for r in rows], pa.string()).dictionary_encode(),
        "row_group": [r.row_group for r in rows],
        "tokens": [r.tokens for r in rows],
        "nbytes": [r.nbytes for r in rows],
        "created_at": [to_micros(r.created_at) for r in rows],
        "check": [r.check() for r in rows],
    }
    return pa.table(data).cast(INDEX_SCHEMA)


ROWS = st.builds(row, st.sampled_from("abcdef"), st.integers(0, 5), st.integers(0, 9), st.integers(0, 2))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(ROWS, max_size=6), max_size=12))
def test_it_finds_what_a_dictionary_would(batches: list[list[CatalogRow]]) -> None:
    index = CatalogIndex("default", "f" * 64, "raw")
    for batch in batches:
        index.add(table(batch))
    rows = [r for batch in batches for r in batch]
    newest: dict[str, CatalogRow] = {}
    for r in sorted(rows, key=lambda r: r.order):
        newest[r.document_id] = r
    assert index.by_id("fabcdexx") == {i: newest[i] for i in "fabcde" if i in newest}
    living: dict[str, set[str]] = {}
    for r in newest.values():
        living.setdefault(r.token_digest, set()).add(r.document_id)
    found = index.by_digest([row("", i, 0).token_digest for i in range(7)] + ["not a digest"])
    assert set(found) == set(living)
    assert all(r == newest[r.document_id] and r.token_digest == d for d, r in found.items())
    assert index.rows == len(rows)


FILES = st.dictionaries(st.integers(0, 9), st.lists(ROWS, max_size=5), max_size=4)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FILES, st.sets(st.integers(0, 9))), max_size=8))
def test_files_come_and_go(changes: list[tuple[dict[int, list[CatalogRow]], set[int]]]) -> None:
    """A file that is removed takes its rows along and no others, and what they hid comes back."""
    index, held = CatalogIndex("default", "f" * 64, "raw"), dict[int, list[CatalogRow]]()
    for added, removed in changes:
        added = {n: rows for n, rows in added.items() if n not in held}
        removed = removed & held.keys()
        index.change({n: table(rows) for n, rows in added.items()}, removed)
        held = {n: rows for n, rows in (held | added).items() if n not in removed}
        newest: dict[str, CatalogRow] = {}
        for r in sorted((r for rows in held.values() for r in rows), key=lambda r: r.order):
            newest[r.document_id] = r
        assert index.by_id("abcdef") == {i: newest[i] for i in "abcdef" if i in newest}
        assert set(index.by_digest(row("", i, 0).token_digest for i in range(7))) == {
            r.token_digest for r in newest.values()
        }
        assert index.rows == sum(map(len, held.values()))


@given(st.lists(st.one_of(st.binary(min_size=32, max_size=32).map(bytes.hex), st.text(max_size=80), st.just("é" * 32))))
def test_digests_are_turned_or_told_apart(texts: list[str]) -> None:
    digests, sound = binary_of_hex(pa.chunked_array([texts[:2], texts[2:]], pa.string()))
    expected = [bytes.fromhex(t) if re.fullmatch("[0-9a-f]{64}", t) else None for t in texts]
    found = [d if ok else None for d, ok in zip(digests.to_pylist(), sound.to_pylist(), strict=True)]
    assert found == expected


def test_a_document_costs_little_memory() -> None:
    index = CatalogIndex("default", "f" * 64, "raw")
    for start in range(0, 20_000, 500):
        index.add(
            table([row(f"some-corpus/document-{i:08d}", i, i, shard=i // 100) for i in range(start, start + 500)])
        )
    assert index.nbytes / 20_000 < 200
    assert index.by_id(["some-corpus/document-00012345"])["some-corpus/document-00012345"].row_group == 12345


def test_times_survive_exactly() -> None:
    for micros in (0, 1, 1_795_459_709_055_001, 2**50 + 1):
        assert to_micros(from_micros(micros)) == micros


def test_a_damaged_catalog_row_is_ignored(local: Place) -> None:
    """A flipped id would otherwise hand out another document's cache under that id."""
    store = local.open(create=True)
    store.commit(store.write_shard([("doc-1", make_cache(4, 1)), ("doc-2", make_cache(4, 2))]))
    (path,) = Path(local.url).glob("catalog/namespace=*/*/*.parquet")
    damaged = pq.read_table(io.BytesIO(path.read_bytes()), partitioning=None)
    ids = ["doc-7" if i == "doc-1" else i for i in damaged["document_id"].to_pylist()]
    damaged = damaged.set_column(damaged.schema.get_field_index("document_id"), "document_id", pa.array(ids))
    pq.write_table(damaged, path)
    assert set(local.open().lookup(["doc-1", "doc-2", "doc-7"])) == {"doc-2"}


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("token_digest", b"no digest"),
        ("token_digest", b"z" * 64),
        ("token_digest", b"\xff" * 64),
        ("document_id", b"\xff\xfe"),
        ("document_id", None),
        ("shard", b"\xff"),
        ("shard", None),
    ],
)
def test_a_row_that_is_not_text_harms_no_other(local: Place, column: str, value: bytes | None) -> None:
    store = local.open(create=True)
    store.commit(store.write_shard([("doc-1", make_cache(4, 1)), ("doc-2", make_cache(4, 2))]))
    (path,) = Path(local.url).glob("catalog/namespace=*/*/*.parquet")
    damaged = pq.read_table(io.BytesIO(path.read_bytes()), partitioning=None)
    values = [value, *damaged[column].cast(pa.binary()).to_pylist()[1:]]
    # Arrow does not look into what it is told to be text, just as it does not when it reads such a file.
    text = pa.Array.from_buffers(pa.string(), 2, pa.array(values, pa.binary()).buffers())
    pq.write_table(damaged.set_column(damaged.column_names.index(column), column, text), path)
    assert set(local.open().lookup(["doc-1", "doc-2"])) == {"doc-2"}
