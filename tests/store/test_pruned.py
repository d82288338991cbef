"""Pruned documents in a store: through every command, every tier, and every lie about which tokens are left."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import xxhash
from safetensors.torch import load_file
from store_keeping import OURS, check, keeping, put
from store_places import FINGERPRINT, Place, make_cache, same

from kvlink_core.compress import EncodedColumn, EncodedDocument, get_codec, pruning, pruning_of
from kvlink_core.errors import PayloadCorruptError, PayloadForeignError, PrunedCacheError
from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import compact, export, inspect_document, inspect_shard, rebuild, stats, verify
from kvlink_core.store.tiers.disk import DiskTier
from kvlink_core.store.tiers.key import CacheKey
from kvlink_core.store.tiers.memory import HeapMemory
from kvlink_core.store.tiers.memory_tier import MemoryTier
from kvlink_core.types import DocumentCache

SPEC = "raw:keep=0.5,scorer=random"
WHOLE = {f"d{n}": make_cache(tokens, n) for n, tokens in enumerate((1, 2, 9, 40, 41))}


def left_of(whole: Mapping[str, DocumentCache], spec: str = SPEC) -> dict[str, DocumentCache]:
    prune = pruning_of(get_codec(spec))
    assert prune is not None
    return {name: prune.prune(cache) for name, cache in whole.items()}


def test_they_come_back_with_their_positions(place: Place) -> None:
    """On every kind of storage, whether the store prunes them or gets them pruned."""
    left = left_of(WHOLE)
    assert {c.slots for c in left.values()} == {1, 5, 20, 21}
    for namespace, given in (("here", WHOLE), ("before", left)):
        store = place.open(create=True, codec=SPEC, namespace=namespace)
        put(store, given)
        loaded = place.open(codec=SPEC, namespace=namespace).load(list(store.lookup(WHOLE).values()))
        assert all(same(found, left[name]) for name, found in zip(WHOLE, loaded, strict=True))
    assert place.open(namespace="here").lookup(WHOLE) == {}  # another codec's documents are not found


@pytest.mark.parametrize("spec", ["lossless:keep=0.25,scorer=knorm", "int4:keep=0.25,scorer=compactor"])
def test_with_other_codecs(local: Place, spec: str) -> None:
    store = local.open(create=True, codec=spec)
    rows = put(store, WHOLE)
    codec = get_codec(spec)
    for found, cache, row in zip(store.load(rows), WHOLE.values(), rows, strict=True):
        encoded = codec.encode(cache)
        assert same(found, codec.decode(encoded))
        assert row.nbytes == sum(c.data.numel() for c in encoded.columns.values())
        assert row.tokens == cache.tokens


def test_every_command_takes_them(place: Place, tmp_path: Path) -> None:
    left = left_of(WHOLE)
    store = place.open(create=True, codec=SPEC)
    for name, cache in WHOLE.items():
        put(store, {name: cache})

    def good() -> None:
        with keeping(place) as keeper:
            assert verify(keeper).problems == []
            assert verify(keeper).documents == len(WHOLE)
        reader = place.open(codec=SPEC)
        loaded = reader.load(list(reader.lookup(WHOLE).values()))
        assert all(same(found, left[name]) for name, found in zip(WHOLE, loaded, strict=True))

    good()
    with keeping(place) as keeper:
        assert compact(keeper, dry_run=False).after == 1
    good()
    with keeping(place) as keeper:
        assert rebuild(keeper, from_shards=True, dry_run=False).documents == len(WHOLE)
    good()
    with keeping(place) as keeper:
        (info,) = inspect_document(keeper, OURS, "d3")
        assert info.problem is None
        assert info.row.codec == SPEC
        (shard,) = {r.shard for r in place.open(codec=SPEC).lookup(WHOLE).values()}
        assert inspect_shard(keeper, OURS, shard).manifest.codec.params == {"keep": 0.5, "scorer": "random"}
        assert [g.codec for g in stats(keeper).groups] == [SPEC]
        assert export(keeper, OURS, tmp_path / "plain").failures == {}
    for path in (tmp_path / "plain").glob("d*.safetensors"):
        expected = left[path.name.partition("-")[0]]
        tensors = load_file(path)
        assert set(tensors) == {"token_ids", "keys", "values"} | ({"kept"} if expected.kept is not None else set())
        assert same(DocumentCache(**tensors), expected)
        assert json.loads(path.with_suffix(".json").read_text())["tensors"].keys() == tensors.keys()


def test_a_memory_tier_keeps_the_positions_and_counts_them() -> None:
    (cache,) = left_of({"d": make_cache(300, 1)}).values()
    assert cache.kept is not None
    tier = MemoryTier(HeapMemory(2**20))
    key = CacheKey("tenant", "f" * 64, "a", SPEC)
    assert tier.put(key, cache)
    found = tier.get(key)
    assert same(found, cache)
    assert found is not None
    assert found.kept is not None
    assert found.kept.data_ptr() != cache.kept.data_ptr()
    assert tier.stats.nbytes >= cache.nbytes + cache.token_ids.nbytes
    bare = MemoryTier(HeapMemory(2**20))
    bare.put(key, replace(cache, kept=None, token_ids=cache.token_ids[: cache.slots]))
    assert tier.stats.nbytes > bare.stats.nbytes


def test_the_disk_tier_keeps_them(local: Place, tmp_path: Path) -> None:
    store = local.open(create=True, codec=SPEC)
    tier = DiskTier(tmp_path / "near", 2**20)
    for name, row in zip(WHOLE, put(store, WHOLE), strict=True):
        (document,) = store.load_encoded([row])
        assert isinstance(document, EncodedDocument)
        assert tier.put(
            CacheKey.of(row), row.nbytes + 4 * row.tokens, lambda f, r=row, d=document: store.write_copy(f, r, d)
        )  # type: ignore[misc]
        copy = tier.get(row)
        assert copy is not None
        assert same(store.decode([copy])[0], left_of(WHOLE)[name])
    tier.close()


@pytest.mark.parametrize(
    ("flip", "says"),
    [
        ([(0, 0, 1)], "does not name 5 tokens"),
        ([(0, 1, 6)], "beyond the document's 9"),
        ([(5, 1, 7)], "beyond the document's 9"),
    ],
)
def test_positions_that_lie_are_refused_though_their_checksums_hold(
    local: Place, monkeypatch: pytest.MonkeyPatch, flip: list[tuple[int, int, int]], says: str
) -> None:
    pack = pruning.pack_kept

    def lie(kept: torch.Tensor, tokens: int) -> EncodedColumn:
        honest = pack(kept, tokens)
        data = honest.data.clone().view(-1, 2)
        for row, byte, bit in flip:
            data[row, byte] ^= 1 << bit
        return EncodedColumn(data.view(-1), honest.lengths)

    store = local.open(create=True, codec=SPEC)
    monkeypatch.setattr(pruning, "pack_kept", lie)
    rows = put(store, {"a": WHOLE["d2"]})
    (found,) = store.load(rows)
    assert isinstance(found, PayloadCorruptError)
    assert says in str(found)
    with keeping(local) as keeper:
        assert [p.code for p in verify(keeper).problems] == ["payload_corrupt"]


def lying(store: DocumentStore, params: dict[str, Any]) -> None:
    """The store's codec goes on as it is, and says that its parameters are these."""
    store._codec.params = params  # type: ignore[misc]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"keep": 0.5},
        {"scorer": "random"},
        {"keep": 1, "scorer": "random"},
        {"keep": 1.0, "scorer": "random"},
        {"keep": 0.0, "scorer": "random"},
        {"keep": 0.50001, "scorer": "random"},
        {"keep": "0.5", "scorer": "random"},
        {"keep": True, "scorer": "random"},
        {"keep": 0.5, "scorer": "Random/../"},
        {"keep": 0.5, "scorer": 3},
        {"keep": 0.5, "scorer": "random", "group": 3},
        {"keep": 0.25, "scorer": "random"},
    ],
)
def test_parameters_that_lie_are_refused(local: Place, params: dict[str, Any]) -> None:
    store = local.open(create=True, codec=SPEC)
    lying(store, params)
    (row,) = store.write_shard([("a", left_of(WHOLE)["d2"])])
    asked = replace(row, codec="raw:keep=0.25,scorer=random") if params.get("keep") == 0.25 else row
    (found,) = store.load([asked])
    assert isinstance(found, PayloadCorruptError)


def test_a_shard_written_by_hand_is_read(local: Place) -> None:
    """After the letter of FORMAT.md, with pyarrow, hashlib and json alone: two layers, one head, 5 of 9 tokens."""
    tokens = np.arange(100, 109, dtype="<u4").tobytes()
    kept = [[0, 1, 4, 7, 8], [2, 3, 5, 6, 8]]
    numbers = np.arange(2 * 5 * 4, dtype="<f4").reshape(2, 5, 4)
    columns = {
        "kept": [sum(1 << t for t in layer).to_bytes(2, "little") for layer in kept],
        "k": [layer.tobytes() for layer in numbers],
        "v": [(-layer).tobytes() for layer in numbers],
    }
    manifest = {
        "format": 1, "namespace": "default", "fingerprint": FINGERPRINT.digest,
        "codec": {"name": "raw", "params": {"keep": 0.5, "scorer": "by-hand"}}, "checksum": "xxh3-128",
        "dtype": "float32", "layers": 2, "kv_heads": 1, "head_dim": 4, "value_dim": 4,
        "documents": [{
            "ids": ["a"], "token_digest": hashlib.sha256(tokens).hexdigest(), "tokens": 9, "params": {},
            "columns": {n: {"bytes": len(b"".join(c)), "checksum": xxhash.xxh3_128_hexdigest(b"".join(c))}
                        for n, c in columns.items()},
        }],
    }  # fmt: skip
    pairs = {
        "kvlink.format": "1",
        "kvlink.manifest": json.dumps(manifest),
        "kvlink.fingerprint": FINGERPRINT.to_json(),
    }
    binary = pa.large_binary()
    fields = [("layer", pa.int32(), False), ("token_ids", binary, True), *((n, binary, False) for n in columns)]
    schema = pa.schema([pa.field(*f) for f in fields], metadata=pairs)
    arrays = [pa.array([0, 1], pa.int32()), pa.array([tokens, None], binary)]
    table = pa.table([*arrays, *(pa.array(c, binary) for c in columns.values())], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="NONE", use_dictionary=False, write_statistics=False)
    data = sink.getvalue()
    length = int.from_bytes(data[-8:-4], "little")
    name = hashlib.sha256(data[-8 - length : -8]).hexdigest() + ".parquet"
    store = local.open(create=True, codec=SPEC)
    (row,) = store.write_shard([("other", WHOLE["d2"])])
    local.write(f"shards/{name}", data)
    digest = hashlib.sha256(tokens).hexdigest()
    asked = replace(row, shard=name, token_digest=digest, codec="raw:keep=0.5,scorer=by-hand")
    (found,) = store.load([asked])
    expected = DocumentCache(
        torch.arange(100, 109), *(torch.from_numpy(x)[:, None] for x in (numbers, -numbers)),
        torch.tensor(kept, dtype=torch.int32)[:, None],
    )  # fmt: skip
    assert same(found, expected)


def test_a_scorer_of_next_year_is_read(local: Place) -> None:
    store = local.open(create=True, codec=SPEC)
    lying(store, {"keep": 0.5, "scorer": "of-next-year"})
    (row,) = store.write_shard([("a", left_of(WHOLE)["d2"])])
    assert isinstance(store.load([row])[0], PayloadForeignError)  # it is not the codec that was asked for
    (found,) = store.load([replace(row, codec="raw:keep=0.5,scorer=of-next-year")])
    assert same(found, left_of(WHOLE)["d2"])


def test_a_store_that_does_not_prune_refuses_them(local: Place) -> None:
    store = local.open(create=True)
    with pytest.raises(PrunedCacheError):
        store.write_shard([("a", left_of(WHOLE)["d2"])])
    put(store, {"b": WHOLE["d2"]})
    check(local, {"b": WHOLE["d2"]})
