"""Writes the golden store, with a shard of every codec: ``python tests/golden_store.py DIRECTORY``.

From FORMAT.md alone: nothing of the product is used. What it wrote for version 1 is committed in ``store/golden/``,
because that is what must stay readable: this script could change with the reader, and so can libraries under both.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import xxhash
from codec_oracle import ITEM, Layout, decode, endpoint_dtype
from parquet_bytes import binary, name_of, page, parquet

LAYERS, HEADS, KEY_DIM, VALUE_DIM = 2, 3, 5, 3
DOCUMENTS = {"one token": 1, "ünï": 7}
MICROS = 1_795_000_000_000_000

#: By name of the case: codec, dtype, parameters.
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "raw": ("raw", "float32", {}),
    "raw-bfloat16": ("raw", "bfloat16", {}),
    "raw-float64": ("raw", "float64", {}),
    "lossless": ("lossless", "float16", {"zstd": 3}),
    "fp8": ("fp8", "bfloat16", {"group": 4, "keys": "channel", "zstd": 0}),
    "int8": ("int8", "float32", {"group": 5, "keys": "token", "zstd": 0}),
    "int4": ("int4", "bfloat16", {"group": 16, "keys": "channel", "zstd": 0}),
    "int4-zstd": ("int4", "float16", {"group": 2, "keys": "channel", "zstd": 1}),
}


def noise(*seed: object) -> Iterator[int]:
    """Bytes without end, the same each time."""
    count = 0
    while True:
        yield from hashlib.sha256(repr((*seed, count)).encode()).digest()
        count += 1


def take(source: Iterator[int], count: int) -> bytes:
    return bytes(next(source) for _ in range(count))


def fingerprint(dtype: str) -> str:
    """Canonical JSON of a fingerprint's fields."""
    fields = {
        "adapter": "", "dtype": dtype, "format": 1, "model": "golden", "rope": "{}", "wrap": "",
        "template": "{text}", "tokenizer": "t", "weights": "w",
    }  # fmt: skip
    return json.dumps(fields, sort_keys=True, separators=(",", ":"))


def packed(numbers: list[float], dtype: str) -> bytes:
    """Numbers that ``dtype`` holds exactly, as bytes."""
    match dtype:
        case "float32":
            return struct.pack(f"<{len(numbers)}f", *numbers)
        case "float16":
            return struct.pack(f"<{len(numbers)}e", *numbers)
    return b"".join(struct.pack("<f", n)[2:] for n in numbers)


def layer_of(case: str, axis: str, dim: int, tokens: int, bits: Iterator[int]) -> tuple[list[bytes], bytes]:
    """The plain values of one layer, and the bytes of the numbers that they stand for."""
    codec, dtype, params = CASES[case]
    count = HEADS * tokens * dim
    if codec in ("raw", "lossless"):
        data = take(bits, count * ITEM[dtype])
        if codec == "raw":
            return [data], data
        item = ITEM[dtype]
        data = b"".join(data[i * item : i * item + item - 1] + bytes([60]) for i in range(count))  # planes that shrink
        return [b"".join(data[place::item] for place in range(item))], data
    layout = Layout(HEADS, tokens, dim, axis, params["group"])
    ends = endpoint_dtype(dtype)
    upper = [n / 8 for n in take(bits, layout.groups)]
    if codec == "int4":
        codes = bytearray(take(bits, math.ceil(count / 2)) if not params["zstd"] else b"\x21" * math.ceil(count / 2))
        if count % 2:
            codes[-1] &= 15
    else:
        codes = bytearray(take(bits, count))
        if codec == "fp8":
            codes = bytearray(code - 1 if code & 127 == 127 else code for code in codes)
    endpoints = packed(upper, ends) if codec == "fp8" else packed([-n / 4 - 1 for n in upper] + upper, ends)
    return [bytes(codes), endpoints], packed(decode(codec, layout, dtype, bytes(codes), endpoints), dtype)


def make_shard(case: str) -> tuple[bytes, dict[str, Any], list[bytes], dict[str, Any]]:
    """A shard, its manifest, the token ids of its documents, and what they decode to."""
    codec, dtype, params = CASES[case]
    names = ["k", "v"] if codec in ("raw", "lossless") else ["k", "k_groups", "v", "v_groups"]
    bits = noise(case)
    documents, groups, tokens_of, expected = [], [], [], {}
    for document_id, tokens in DOCUMENTS.items():
        token_ids = struct.pack(f"<{tokens}I", *(int.from_bytes(take(bits, 4), "little") for _ in range(tokens)))
        values: dict[str, list[bytes]] = {name: [] for name in names}
        decoded = {"k": b"", "v": b""}
        for layer in range(LAYERS):
            for name, dim in (("k", KEY_DIM), ("v", VALUE_DIM)):
                axis = params.get("keys", "token") if name == "k" else "token"
                plain, numbers = layer_of(case, axis, dim, tokens, bits)
                decoded[name] += numbers
                for column, value in zip([n for n in names if n[0] == name], plain, strict=True):
                    frame = pa.Codec("zstd").compress(value, asbytes=True)
                    shrinks = (
                        params.get("zstd") and layer == 1 and math.ceil(len(value) / 16) <= len(frame) < len(value)
                    )
                    values[column].append(frame if shrinks else value)
        levels = b"\x02\x01\x02\x00"  # one that is there, and one that is not
        contents = [
            page(LAYERS, struct.pack("<2i", 0, 1)),
            page(LAYERS, len(levels).to_bytes(4, "little") + levels + binary([token_ids])),
            *(page(LAYERS, binary(values[name])) for name in names),
        ]
        groups.append([(LAYERS, [content]) for content in contents])
        tokens_of.append(token_ids)
        expected[document_id] = {
            "token_ids": token_ids.hex(), "keys": decoded["k"].hex(), "values": decoded["v"].hex(), "dtype": dtype
        }  # fmt: skip
        described = {
            name: {"bytes": len(b"".join(v)), "checksum": xxhash.xxh3_128_hexdigest(b"".join(v))}
            for name, v in values.items()
        }
        documents.append(
            {
                "ids": [document_id], "token_digest": hashlib.sha256(token_ids).hexdigest(), "tokens": tokens,
                "params": {}, "columns": described,
            }
        )  # fmt: skip
    text = fingerprint(dtype)
    manifest = {
        "format": 1, "namespace": "golden", "fingerprint": hashlib.sha256(text.encode()).hexdigest(),
        "codec": {"name": codec, "params": params}, "checksum": "xxh3-128", "dtype": dtype, "layers": LAYERS,
        "kv_heads": HEADS, "head_dim": KEY_DIM, "value_dim": VALUE_DIM, "documents": documents,
    }  # fmt: skip
    large = pa.large_binary()
    schema = pa.schema(
        [
            pa.field("layer", pa.int32(), False),
            pa.field("token_ids", large),
            *(pa.field(n, large, False) for n in names),
        ]
    )
    pairs = {
        "kvlink.format": "1", "kvlink.manifest": json.dumps(manifest), "kvlink.fingerprint": text,
        "ARROW:schema": base64.b64encode(schema.serialize().to_pybytes()).decode(),
    }  # fmt: skip
    columns = [("layer", 1, False), ("token_ids", 6, True), *((name, 6, False) for name in names)]
    return parquet(columns, groups, pairs), manifest, tokens_of, expected


def make(root: Path) -> None:
    """Write the store, and what is in it to ``expected.json`` beside it."""
    for folder in ("shards", "tokens", "fingerprints", "catalog/_delta_log", "deleted"):
        (root / "store" / folder).mkdir(parents=True)
    store = root / "store"
    (store / "store.json").write_text('{"format":"kvlink-store","version":1}')
    rows: dict[str, list[dict[str, Any]]] = {}
    expected: dict[str, Any] = {}
    for case in CASES:
        data, manifest, tokens_of, expected[case] = make_shard(case)
        name = name_of(data)
        (store / "shards" / name).write_bytes(data)
        copy = pa.table(
            {
                "row_group": pa.array(range(len(tokens_of)), pa.int32()),
                "token_ids": pa.array(tokens_of, pa.large_binary()),
            }
        )
        pq.write_table(copy, store / "tokens" / name, compression="NONE", use_dictionary=False, write_statistics=False)
        digest = manifest["fingerprint"]
        (store / "fingerprints" / f"{digest}.json").write_text(fingerprint(manifest["dtype"]))
        codec, params = manifest["codec"]["name"], manifest["codec"]["params"]
        spec = codec + (":" + ",".join(f"{k}={params[k]}" for k in sorted(params)) if params else "")
        for group, document in enumerate(manifest["documents"]):
            nbytes = sum(c["bytes"] for c in document["columns"].values())
            fields = [
                document["ids"][0], "golden", digest, document["token_digest"], spec, name, group, document["tokens"],
                nbytes, MICROS,
            ]  # fmt: skip
            check = xxhash.xxh3_64_intdigest(json.dumps(fields, separators=(",", ":")).encode())
            names = ("document_id", "token_digest", "codec", "shard", "row_group", "tokens", "nbytes", "created_at")
            row = dict(zip(names, [fields[0], *fields[3:]], strict=True))
            rows.setdefault(digest, []).append(row | {"check": check - 2**64 if check >= 2**63 else check})
    _catalog(store / "catalog", rows)
    gone = {"format": 1, "namespace": "golden", "ids": ["gone"], "fingerprint": None, "codec": None, "until": MICROS}
    (store / "deleted" / "a.json").write_text(json.dumps(gone))
    (root / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def _catalog(root: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """A Delta table of one commit. https://github.com/delta-io/delta/blob/master/PROTOCOL.md"""
    types = {"row_group": "integer", "tokens": "integer", "nbytes": "long", "created_at": "timestamp", "check": "long"}
    order = [
        "document_id", "namespace", "fingerprint", "token_digest", "codec", "shard", "row_group", "tokens", "nbytes",
        "created_at", "check",
    ]  # fmt: skip
    arrow = {"integer": pa.int32(), "long": pa.int64(), "timestamp": pa.timestamp("us", "UTC"), "string": pa.string()}
    fields = [{"name": n, "type": types.get(n, "string"), "nullable": True, "metadata": {}} for n in order]
    actions: list[dict[str, Any]] = [
        {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
        {
            "metaData": {
                "id": "6b1b0a5e-0000-4000-8000-000000000001", "format": {"provider": "parquet", "options": {}},
                "schemaString": json.dumps({"type": "struct", "fields": fields}),
                "partitionColumns": ["namespace", "fingerprint"], "configuration": {}, "createdTime": MICROS // 1000,
            }
        },
    ]  # fmt: skip
    for digest, of_partition in rows.items():
        path = f"namespace=golden/fingerprint={digest}/part-golden.parquet"
        (root / path).parent.mkdir(parents=True)
        schema = pa.schema([(n, arrow[types.get(n, "string")]) for n in order if n not in ("namespace", "fingerprint")])
        columns = {
            n: pa.array([r[n] for r in of_partition], pa.int64()).cast(schema.field(n).type)
            if n == "created_at"
            else pa.array([r[n] for r in of_partition], schema.field(n).type)
            for n in schema.names
        }
        pq.write_table(pa.table(columns, schema=schema), root / path)
        values = {"namespace": "golden", "fingerprint": digest}
        size = (root / path).stat().st_size
        added = {"path": path, "partitionValues": values, "size": size, "modificationTime": 0, "dataChange": True}
        actions.append({"add": added})
    lines = "".join(json.dumps(action, separators=(",", ":")) + "\n" for action in actions)
    (root / "_delta_log" / f"{0:020}.json").write_text(lines)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
