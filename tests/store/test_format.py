"""FORMAT.md, held against a reader and a writer made of nothing but pyarrow, hashlib and json."""

from __future__ import annotations

import hashlib
import io
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from store_places import FINGERPRINT, Place, make_cache, same

from kvlink_core.errors import FormatVersionError, PayloadCorruptError, PayloadError, PayloadForeignError
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.types import DocumentCache

LAYERS = 3


def shard_by_hand(caches: list[DocumentCache], **changes: Any) -> tuple[bytes, dict[str, Any]]:
    """A shard after the letter of FORMAT.md. ``changes`` go into the manifest, or are one of the switches below."""
    groups = changes.pop("row_groups", list(range(len(caches))))
    columns = changes.pop("columns", ["layer", "token_ids", "k", "v"])
    options = changes.pop("options", {})
    metadata = changes.pop("metadata", {})
    documents = []
    tables = []
    for number, cache in enumerate(caches):
        tokens = cache.token_ids.numpy().astype("<u4").tobytes()
        k, v = ([layer.numpy().tobytes() for layer in tensor] for tensor in (cache.keys, cache.values))
        described = {
            name: {"bytes": len(b"".join(data)), "checksum": xxhash.xxh3_128_hexdigest(b"".join(data))}
            for name, data in (("k", k), ("v", v))
        }
        documents.append(
            {
                "ids": [f"doc-{number}"],
                "token_digest": hashlib.sha256(tokens).hexdigest(),
                "tokens": len(cache.token_ids),
                "params": {},
                "columns": described,
            }
        )
        rows = {
            "layer": pa.array(range(LAYERS), pa.int32()),
            "token_ids": pa.array([tokens] + [None] * (LAYERS - 1), pa.large_binary()),
            "k": pa.array(k, pa.large_binary()),
            "v": pa.array(v, pa.large_binary()),
        }
        tables.append([rows[name] for name in columns])
    manifest = {
        "format": 1, "namespace": "default", "fingerprint": hashlib.sha256(FINGERPRINT.to_json().encode()).hexdigest(),
        "codec": {"name": "raw", "params": {}}, "checksum": "xxh3-128", "dtype": "float32", "layers": LAYERS,
        "kv_heads": 2, "head_dim": 8, "value_dim": 6, "documents": documents,
    } | changes  # fmt: skip
    pairs = {
        "kvlink.format": "1",
        "kvlink.manifest": json.dumps(manifest),
        "kvlink.fingerprint": FINGERPRINT.to_json(),
        "somebody.else": "is ignored",
    } | metadata
    kept = {k: v for k, v in pairs.items() if v is not None}
    types = {"layer": pa.int32()}
    schema = pa.schema([pa.field(n, types.get(n, pa.large_binary()), n == "token_ids") for n in columns], metadata=kept)
    sink = io.BytesIO()
    settings = {"compression": "NONE", "use_dictionary": False, "write_statistics": False} | options
    with pq.ParquetWriter(sink, schema, **settings) as writer:
        for group in groups:
            writer.write_table(pa.table(tables[group], schema=schema), row_group_size=LAYERS)
    return sink.getvalue(), manifest


def put(place: Place, data: bytes, manifest: dict[str, Any]) -> list[CatalogRow]:
    """Store a shard under the name that its footer gives it, and make rows for it."""
    length = int.from_bytes(data[-8:-4], "little")
    name = hashlib.sha256(data[-8 - length : -8]).hexdigest() + ".parquet"
    template = place.opened[0].write_shard([("template", make_cache(1, 99))])[0]
    place.write(f"shards/{name}", data)
    return [
        replace(
            template,
            document_id=f"doc-{i}",
            shard=name,
            row_group=i,
            tokens=document["tokens"],
            token_digest=document["token_digest"],
        )
        for i, document in enumerate(manifest["documents"])
    ]


@pytest.fixture
def caches() -> list[DocumentCache]:
    return [make_cache(4, 1), make_cache(7, 2)]


@pytest.mark.parametrize("options", [{}, {"data_page_size": 1, "write_batch_size": 1}, {"write_statistics": False}])
def test_a_shard_written_by_hand_is_read(place: Place, caches: list[DocumentCache], options: dict[str, Any]) -> None:
    store = place.open(create=True)
    rows = put(place, *shard_by_hand(caches, options=options))
    store.commit(rows)
    found = place.open().lookup(["doc-1", "doc-0"])
    assert all(same(f, c) for f, c in zip(store.load([found["doc-0"], found["doc-1"]]), caches, strict=True))
    assert store.token_ids(rows) == [c.token_ids.tolist() for c in caches]


def test_our_shard_is_read_by_hand(local: Place, caches: list[DocumentCache]) -> None:
    store = local.open(create=True)
    rows = store.write_shard([("a", caches[0]), ("b", caches[1]), ("c", caches[0])])
    data = local.read(f"shards/{rows[0].shard}")
    length = int.from_bytes(data[-8:-4], "little")
    assert rows[0].shard == hashlib.sha256(data[-8 - length : -8]).hexdigest() + ".parquet"
    file = pq.ParquetFile(io.BytesIO(data))
    pairs = file.metadata.metadata
    assert pairs[b"kvlink.format"] == b"1"
    assert hashlib.sha256(pairs[b"kvlink.fingerprint"]).hexdigest() == FINGERPRINT.digest
    manifest = json.loads(pairs[b"kvlink.manifest"])
    assert manifest == shard_by_hand(caches)[1] | {
        "documents": [
            document | {"ids": ids}
            for document, ids in zip(shard_by_hand(caches)[1]["documents"], (["a", "c"], ["b"]), strict=True)
        ]
    }
    for group, cache in enumerate(caches):
        table = file.read_row_group(group).to_pydict()
        assert table["layer"] == list(range(LAYERS))
        assert table["token_ids"] == [cache.token_ids.numpy().astype("<u4").tobytes(), None, None]
        for name, tensor in (("k", cache.keys), ("v", cache.values)):
            assert table[name] == [layer.numpy().tobytes() for layer in tensor]
            chunk = file.metadata.row_group(group).column(file.schema_arrow.names.index(name))
            assert chunk.compression == "UNCOMPRESSED"
            assert set(chunk.encodings) <= {"PLAIN", "RLE"}
    copy = pq.read_table(io.BytesIO(local.read(f"tokens/{rows[0].shard}"))).to_pylist()
    assert [np.frombuffer(r["token_ids"], "<u4").tolist() for r in copy] == [c.token_ids.tolist() for c in caches]


def test_our_catalog_is_read_by_hand(local: Place, caches: list[DocumentCache]) -> None:
    store = local.open(create=True)
    (row,) = store.write_shard([("ünï", caches[0])])
    store.commit([row])
    (partition,) = local.names("catalog/namespace=default")
    assert partition == f"fingerprint={FINGERPRINT.digest}"
    (name,) = local.names(f"catalog/namespace=default/{partition}")
    (found,) = pq.read_table(
        io.BytesIO(local.read(f"catalog/namespace=default/{partition}/{name}")), partitioning=None
    ).to_pylist()
    micros = int(found["created_at"].timestamp() * 1_000_000 + 0.5)
    fields = [
        "ünï",
        "default",
        FINGERPRINT.digest,
        found["token_digest"],
        "raw",
        found["shard"],
        0,
        4,
        row.nbytes,
        micros,
    ]
    digest = xxhash.xxh3_64_intdigest(json.dumps(fields, separators=(",", ":")).encode())
    assert found["check"] % 2**64 == digest


def wrong(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        pytest.param(wrong(metadata={"kvlink.format": "2"}), FormatVersionError, id="newer"),
        pytest.param(wrong(metadata={"kvlink.format": "x"}), PayloadCorruptError, id="no version"),
        pytest.param(wrong(metadata={"kvlink.format": None}), PayloadForeignError, id="not ours"),
        pytest.param(wrong(metadata={"kvlink.manifest": None}), PayloadCorruptError, id="no manifest"),
        pytest.param(wrong(metadata={"kvlink.manifest": "[" * 50_000}), PayloadCorruptError, id="deep manifest"),
        pytest.param(wrong(metadata={"kvlink.fingerprint": "{}"}), PayloadCorruptError, id="fingerprint digest"),
        pytest.param(wrong(format=2), PayloadCorruptError, id="two versions"),
        pytest.param(wrong(surprise=1), PayloadCorruptError, id="unknown field"),
        pytest.param(wrong(checksum="crc32"), PayloadCorruptError, id="unknown checksum"),
        pytest.param(wrong(codec={"name": "int5", "params": {}}), FormatVersionError, id="unknown codec"),
        pytest.param(wrong(codec={"name": "raw", "params": {"a": 1}}), PayloadCorruptError, id="codec parameters"),
        pytest.param(wrong(namespace="theirs"), PayloadForeignError, id="namespace"),
        pytest.param(wrong(namespace="../up"), PayloadCorruptError, id="bad namespace"),
        pytest.param(wrong(dtype="float16"), PayloadCorruptError, id="dtype lies"),
        pytest.param(wrong(dtype="int8"), PayloadCorruptError, id="no such dtype"),
        pytest.param(wrong(layers=2**31 - 1), PayloadCorruptError, id="claims layers"),
        pytest.param(wrong(kv_heads=2**31 - 1, head_dim=2**31 - 1), PayloadCorruptError, id="claims a huge shape"),
        pytest.param(wrong(kv_heads=0), PayloadCorruptError, id="no heads"),
        pytest.param(wrong(kv_heads=True), PayloadCorruptError, id="not a number"),
        pytest.param(wrong(row_groups=[1, 0]), PayloadCorruptError, id="swapped documents"),
        pytest.param(wrong(row_groups=[0]), PayloadCorruptError, id="a document lacks"),
        pytest.param(wrong(row_groups=[0, 1, 1]), PayloadCorruptError, id="a document too many"),
        pytest.param(wrong(columns=["layer", "token_ids", "v", "k"]), PayloadCorruptError, id="columns swapped"),
        pytest.param(wrong(columns=["layer", "token_ids", "k"]), PayloadCorruptError, id="no values"),
        pytest.param(wrong(options={"compression": "ZSTD"}), PayloadCorruptError, id="compressed"),
        pytest.param(wrong(options={"use_dictionary": True}), PayloadCorruptError, id="dictionary"),
        pytest.param(wrong(options={"data_page_version": "2.0"}), PayloadCorruptError, id="pages of version 2"),
    ],
)  # fmt: skip
def test_a_shard_that_breaks_the_format(
    local: Place, caches: list[DocumentCache], changes: dict[str, Any], error: type[PayloadError]
) -> None:
    store = local.open(create=True)
    data, manifest = shard_by_hand(caches, **dict(changes))
    found = store.load(put(local, data, manifest))
    assert [type(f) for f in found] == [error, error]


def edit(manifest: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    changed = json.loads(json.dumps(manifest))
    *parents, last = path.split(".")
    at = changed["documents"][0]
    for parent in parents:
        at = at[parent]
    at[last] = value
    return changed  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("columns.k.bytes", 2**62),
        ("columns.k.bytes", 2**62 + 1),
        ("columns.k.bytes", -1),
        ("columns.k.bytes", 191),
        ("columns.k.checksum", "0" * 32),
        ("columns.v.checksum", ""),
        ("columns", {}),
        ("columns.extra", {"bytes": 0, "checksum": "0" * 32}),
        ("tokens", 2**31 - 1),
        ("tokens", 3),
        ("tokens", 0),
        ("token_digest", "0" * 64),
        ("ids", []),
        ("params", {"keep": 3}),
    ],
)
@pytest.mark.parametrize("verify", [True, False])
def test_a_manifest_that_lies(local: Place, caches: list[DocumentCache], path: str, value: Any, verify: bool) -> None:
    honest = shard_by_hand(caches)[1]
    lies = edit(honest, path, value)
    store = local.open(create=True, verify=verify)
    rows = put(local, *shard_by_hand(caches, documents=lies["documents"]))
    store_believes = not verify and path == "columns.k.checksum"
    (found, *_) = store.load(rows)
    assert same(found, caches[0]) if store_believes else isinstance(found, PayloadCorruptError)


def test_parquet_files_of_others_are_not_ours(local: Place) -> None:
    store = local.open(create=True)
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1]}), sink)
    _, manifest = shard_by_hand([make_cache(4, 1)])
    assert [type(f) for f in store.load(put(local, sink.getvalue(), manifest))] == [PayloadForeignError]


def test_a_store_outlives_its_object(local: Place, caches: list[DocumentCache]) -> None:
    with DocumentStore.open(local.url, fingerprint=FINGERPRINT, create=True) as store:
        rows = store.write_shard([("a", caches[0])])
        (found,) = store.load(rows)
    local.delete(f"shards/{rows[0].shard}")
    del store
    assert same(found, caches[0])
