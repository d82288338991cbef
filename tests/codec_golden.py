"""Makes the golden files of codecs, ``tests/golden/codecs``, from FORMAT.md by the oracle: the product has no part.

    python tests/codec_golden.py    writes them

A file is one encoded document: the manifest's parameters and shape, each column's values layer by layer in hexadecimal,
and the bytes of the cache that was encoded and of the one that it decodes to.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import codec_oracle as oracle

DIRECTORY = Path(__file__).parent / "golden" / "codecs"

LAYERS, HEADS, TOKENS, DIMS = 2, 3, 5, {"k": 7, "v": 4}

CASES: list[tuple[str, str, dict[str, Any]]] = [
    (name, dtype, {"group": group, "keys": keys, "zstd": 0})
    for name in ("fp8", "int8", "int4")
    for dtype, group, keys in (
        ("bfloat16", 2, "channel"), ("float16", 64, "token"), ("float32", 3, "channel"), ("bfloat16", 8, "token"),
    )
]  # fmt: skip


def numbers(seed: int, count: int, dtype: str) -> list[float]:
    """Numbers of ``dtype``, some of them extreme, drawn without any library."""
    state = seed * 2654435761 % 2**32 or 1
    found = []
    for place in range(count):
        state = (1664525 * state + 1013904223) % 2**32
        x = (state / 2**32 - 0.5) * 2.0 ** (state >> 7 & 7)
        if place % 17 == 5:
            x = 0.0
        if place % 29 == 7:
            x *= 2.0**-20
        found.append(oracle.rounded(oracle.single(x), dtype))
    return found


def pack(values: list[float], dtype: str) -> bytes:
    if dtype == "float16":
        return struct.pack(f"<{len(values)}e", *values)
    whole = [struct.pack("<f", x) for x in values]
    return b"".join(whole if dtype == "float32" else [w[2:] for w in whole])


def quantised(name: str, dtype: str, params: dict[str, Any], *, flat: bool = False) -> dict[str, Any]:
    columns: dict[str, list[str]] = {}
    cache: dict[str, str] = {}
    decoded: dict[str, str] = {}
    for tensor, dim in DIMS.items():
        axis = params["keys"] if tensor == "k" else "token"
        layout = oracle.Layout(HEADS, TOKENS, dim, axis, params["group"])
        plain = []
        for layer in range(LAYERS):
            # Another seed, until no number stands between two codes, where writers may differ.
            for seed in range(100 * layer + len(tensor) + dim, 10**6, 1000):
                drawn = numbers(seed, HEADS * TOKENS * dim, dtype)
                if flat:  # codes that repeat, for runs
                    drawn[dim:] = [1.5] * len(drawn[dim:])
                if layer:
                    drawn[:dim] = [drawn[0]] * dim  # groups of one number, if by token
                if dtype == "float32" and layer:
                    drawn[dim] = oracle.single(3e38)  # clipped
                try:
                    plain.append((drawn, *oracle.encode(name, layout, dtype, drawn)))
                except AssertionError:
                    continue
                break
            else:
                raise RuntimeError("no seed gives numbers that all have one nearest code")
        columns[tensor] = [codes.hex() for _, codes, _ in plain]
        columns[f"{tensor}_groups"] = [ends.hex() for _, _, ends in plain]
        cache[tensor] = b"".join(pack(drawn, dtype) for drawn, _, _ in plain).hex()
        back = [oracle.decode(name, layout, dtype, codes, ends) for _, codes, ends in plain]
        decoded[tensor] = b"".join(pack(values, dtype) for values in back).hex()
    return document(name, dtype, params, columns, cache, decoded)


def lossless(dtype: str, level: int) -> dict[str, Any]:
    columns: dict[str, list[str]] = {}
    cache: dict[str, str] = {}
    item = oracle.ITEM[dtype]
    for tensor, dim in DIMS.items():
        layers = []
        for layer in range(LAYERS):
            count = HEADS * TOKENS * dim
            if dtype == "float64":
                layers.append(struct.pack(f"<{count}d", *(math.sqrt(n + 10 * layer) for n in range(count))))
            else:
                layers.append(pack(numbers(layer + dim, count, dtype), dtype))
            if level:  # upper bytes that repeat, for runs
                layers[-1] = b"".join(bytes([layers[-1][i * item], 63][:item]) for i in range(count))
        planes = [b"".join(data[place::item] for place in range(item)) for data in layers]
        columns[tensor] = [(oracle.frame(p) if level else p).hex() for p in planes]
        cache[tensor] = b"".join(layers).hex()
    return document("lossless", dtype, {"zstd": level}, columns, cache, cache)


def document(
    name: str, dtype: str, params: dict[str, Any], columns: dict[str, list[str]], cache: dict[str, str],
    decoded: dict[str, str],
) -> dict[str, Any]:  # fmt: skip
    return {
        "codec": {"name": name, "params": params},
        "dtype": dtype,
        "layers": LAYERS,
        "kv_heads": HEADS,
        "tokens": TOKENS,
        "head_dim": DIMS["k"],
        "value_dim": DIMS["v"],
        "columns": columns,
        "encoded_from": cache,
        "decodes_to": decoded,
    }


def framed(plain: dict[str, Any]) -> dict[str, Any]:
    """The same document, with frames of Zstandard where these are shorter."""
    columns = {}
    for name, values in plain["columns"].items():
        pairs = [(bytes.fromhex(v), oracle.frame(bytes.fromhex(v))) for v in values]
        columns[name] = [(f if len(f) < len(v) else v).hex() for v, f in pairs]
    return {**plain, "codec": {**plain["codec"], "params": {**plain["codec"]["params"], "zstd": 3}}, "columns": columns}


def files() -> Iterator[tuple[str, dict[str, Any]]]:
    """Every file: its name and its content."""
    for name, dtype, params in CASES:
        yield f"{name}-{dtype}-{params['keys']}-{params['group']}", quantised(name, dtype, params)
    flat = quantised("int8", "bfloat16", {"group": 64, "keys": "token", "zstd": 0}, flat=True)
    yield "int8-bfloat16-frames", framed(flat)
    for dtype in ("bfloat16", "float16", "float32", "float64"):
        yield f"lossless-{dtype}", lossless(dtype, 0)
    yield "lossless-bfloat16-frames", lossless("bfloat16", 1)


def text(content: dict[str, Any]) -> str:
    return json.dumps(content, indent=1) + "\n"


if __name__ == "__main__":
    DIRECTORY.mkdir(parents=True, exist_ok=True)
    for file, made in files():
        (DIRECTORY / f"{file}.json").write_text(text(made), encoding="utf-8")
