"""DuckDB and pandas read the catalog and the shards, knowing nothing of KVLink."""

from __future__ import annotations

import json
from pathlib import Path

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from deltalake import DeltaTable
from store_places import Place, make_cache

from kvlink_core.types import DocumentCache

CACHES = {"a": make_cache(4, 1), "b": make_cache(7, 2), "c": make_cache(5, 3)}


@pytest.fixture
def files(local: Place) -> tuple[Path, list[str]]:
    """The store's directory, and the files of its catalog as of now."""
    store = local.open(create=True)
    store.commit(store.write_shard([("a", CACHES["a"]), ("b", CACHES["b"])]))
    store.commit(store.write_shard([("c", CACHES["c"])]))
    root = Path(local.url)
    table = DeltaTable(str(root / "catalog"))
    return root, [str(root / "catalog" / path) for path in pa.table(table.get_add_actions())["path"].to_pylist()]


def numbers(value: bytes, tokens: int, dim: int) -> np.ndarray:
    return np.frombuffer(value, dtype="<f4").reshape(2, tokens, dim)


def matches(cache: DocumentCache, layer: int, k: bytes, v: bytes) -> bool:
    return all(
        torch.equal(torch.from_numpy(numbers(value, cache.tokens, tensor.shape[3]).copy()), tensor[layer])
        for value, tensor in ((k, cache.keys), (v, cache.values))
    )


def test_duckdb_joins_the_catalog_with_its_shards(files: tuple[Path, list[str]]) -> None:
    root, catalog = files
    with duckdb.connect() as database:
        # Partitions are in the paths. DuckDB's own extension for Delta would have to be fetched first.
        listed = ", ".join(f"'{path}'" for path in catalog)
        database.execute(f"CREATE VIEW catalog AS SELECT * FROM read_parquet([{listed}], hive_partitioning = true)")
        assert database.sql("SELECT document_id, tokens, nbytes FROM catalog ORDER BY document_id").fetchall() == [
            (name, cache.tokens, cache.nbytes) for name, cache in CACHES.items()
        ]
        sums = "SELECT namespace, codec, count(*), sum(tokens) FROM catalog GROUP BY ALL"
        assert database.sql(sums).fetchall() == [("default", "raw", 3, 16)]
        rows = database.sql(
            f"""
            WITH layers AS (
                SELECT *, row_number() OVER (PARTITION BY filename ORDER BY file_row_number) - 1 AS place
                FROM read_parquet('{root}/shards/*.parquet', filename = true, file_row_number = true)
            )
            SELECT document_id, layer, k, v, octet_length(k) + octet_length(v)
            FROM catalog JOIN layers ON filename = '{root}/shards/' || shard AND place // 3 = row_group
            ORDER BY document_id, layer
            """
        ).fetchall()
        assert [(r[0], r[1]) for r in rows] == [(name, layer) for name in CACHES for layer in range(3)]
        assert all(matches(CACHES[name], layer, k, v) for name, layer, k, v, _ in rows)
        for name, cache in CACHES.items():
            assert sum(r[4] for r in rows if r[0] == name) == cache.nbytes
        shard = database.sql("SELECT any_value(shard) FROM catalog WHERE document_id = 'c'").fetchall()[0][0]
        pairs = dict(database.sql(f"SELECT key, value FROM parquet_kv_metadata('{root}/shards/{shard}')").fetchall())
        assert json.loads(pairs[b"kvlink.manifest"])["documents"][0]["ids"] == ["c"]


def test_pandas_reads_the_catalog_and_a_shard(files: tuple[Path, list[str]]) -> None:
    root, _ = files
    catalog = DeltaTable(str(root / "catalog")).to_pandas().set_index("document_id").sort_index()
    assert catalog["tokens"].to_dict() == {name: cache.tokens for name, cache in CACHES.items()}
    assert set(catalog["namespace"]) == {"default"}
    row = catalog.loc["b"]
    shard = pd.read_parquet(root / "shards" / row["shard"])
    document = shard.iloc[3 * row["row_group"] : 3 * row["row_group"] + 3]
    assert document["layer"].tolist() == [0, 1, 2]
    assert np.frombuffer(document["token_ids"].iloc[0], "<u4").tolist() == CACHES["b"].token_ids.tolist()
    assert document["token_ids"].iloc[1:].isna().all()
    assert all(
        matches(CACHES["b"], layer, k, v) for layer, k, v in document[["layer", "k", "v"]].itertuples(index=False)
    )
