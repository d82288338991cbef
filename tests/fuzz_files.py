"""Real shards of every codec, a storage to lay them in, and what damages them: for ``fuzz_store.py``."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import parquet_bytes as parquet
import pyarrow as pa
import torch
import xxhash
from store_places import FINGERPRINT, make_cache

from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.store.storage import Entry, Range, Tail
from kvlink_core.types import DocumentCache

CODECS = (
    "raw", "lossless", "lossless:zstd=0", "fp8", "fp8:zstd=3", "int8:group=8", "int8:keys=token,zstd=1", "int4",
    "int4:group=4,keys=token", "int4:zstd=1",
)  # fmt: skip


class Memory:
    """A storage of a few files that are not on any disk."""

    url = "memory"

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files

    def read(self, path: str) -> bytes:
        if path not in self.files:
            raise FileNotFoundError(path)
        return self.files[path]

    def names(self, path: str) -> list[str]:
        return [name.removeprefix(f"{path}/") for name in self.files if name.startswith(f"{path}/")]

    def entries(self, path: str) -> list[Entry]:
        return [Entry(name, len(data), 0.0) for name, data in self.files.items() if name.startswith(f"{path}/")]

    def tails(self, paths: list[str], length: int) -> list[Tail | Exception]:
        return [Tail(self.files[p][-length:], len(self.files[p])) for p in paths]

    def open_ranges(self, ranges: list[Range]) -> list[Any]:
        whole = [(self.files[r.path], r.end) for r in ranges]
        return [pa.BufferReader(data) if len(data) >= end else EOFError("short") for data, end in whole]


@dataclass
class Shard:
    """A real shard: its bytes, its rows, what they decode to, and the copy of its token ids."""

    data: bytes
    rows: list[CatalogRow]
    caches: list[DocumentCache]
    copy: bytes


def real_files(directory: Path) -> tuple[list[Shard], bytes, Path]:
    """Shards of every codec, a file of the catalog, and the store that it is from."""
    shards = []
    for dtype in ("bfloat16", "float32"):
        root, fingerprint = directory / dtype, replace(FINGERPRINT, dtype=dtype)
        for number, codec in enumerate(CODECS):
            with DocumentStore.open(str(root), fingerprint=fingerprint, create=True, codec=codec) as store:
                caches = [make_cache(n, 10 * number + n, getattr(torch, dtype)) for n in (3, 6)]
                rows = store.write_shard([("a", caches[0]), ("b", caches[1])])
                store.commit(rows)
                decoded = [c for c in store.load(rows) if isinstance(c, DocumentCache)]
                data, copy = ((root / d / rows[0].shard).read_bytes() for d in ("shards", "tokens"))
                shards.append(Shard(data, rows, decoded, copy))
    catalog = min(root.glob("catalog/*/*/*.parquet")).read_bytes()
    return shards, catalog, root


class Mutator:
    """Changes bytes, structures and JSON at random, mostly a little."""

    def __init__(self, chance: random.Random) -> None:
        self.chance = chance

    def number(self, value: int) -> int:
        odd = (0, 1, -1, 2, 255, 2**15, 2**31 - 1, -(2**31), 2**31, 2**32 - 1, 2**32, 2**40, 2**62, 2**63 - 1)
        near = (value + 1, value - 1, 2 * value, -value, value // 2, value + self.chance.randrange(-64, 64))
        return self.chance.choice((self.chance.choice(odd), self.chance.choice(near)))

    def bytes(self, good: bytes) -> bytes:
        data, chance = bytearray(good), self.chance
        if not data:
            return b"\0"
        place = chance.randrange(len(data))
        match chance.randrange(7):
            case 0:
                data[place] ^= 1 << chance.randrange(8)
            case 1:
                for _ in range(chance.randrange(1, 8)):
                    data[chance.randrange(len(data))] = chance.choice((0, 1, 127, 128, 255))
            case 2:
                del data[place:]
            case 3:
                source, length = chance.randrange(len(data)), chance.randrange(1, 64)
                data[place : place + length] = data[source : source + length]
            case 4:
                data[place:place] = chance.randbytes(chance.randrange(1, 64))
            case 5:
                del data[place : place + chance.randrange(1, 64)]
            case _:
                data[place : place + 4] = (self.number(0) % 2**32).to_bytes(4, "little")
        return bytes(data)

    def json(self, value: Any) -> Any:
        """A copy with one place changed."""
        chance = self.chance
        if isinstance(value, dict) and value and chance.random() < 0.9:
            key = chance.choice(list(value))
            changed = {k: self.json(v) if k == key else v for k, v in value.items()}
            match chance.randrange(12):
                case 0:
                    del changed[key]
                case 1:
                    changed[chance.choice(("x", "format", "tokens"))] = chance.choice((1, "x", None, {}))
            return changed
        if isinstance(value, list) and value and chance.random() < 0.9:
            place = chance.randrange(len(value))
            match chance.randrange(8):
                case 0:
                    return value[:place] + value[place + 1 :]
                case 1:
                    return value + [value[place]] * chance.choice((1, 2, 50))
            return [self.json(v) if i == place else v for i, v in enumerate(value)]
        if isinstance(value, int) and chance.random() < 0.8:
            return self.number(value)
        if isinstance(value, str) and value and chance.random() < 0.8:
            place = chance.randrange(len(value))
            return value[:place] + chance.choice(("", "0", "\0", "é", "../", value)) + value[place + 1 :]
        return chance.choice((None, True, 0, -1, 1.5, 10**400, "", "x" * 5000, [], {}, [[[[]]]], {"a": 1}))

    def text(self, data: bytes) -> bytes:
        """JSON changed as JSON, or as bytes, or nested without end."""
        match self.chance.randrange(8):
            case 0:
                return self.bytes(data)
            case 1:
                return data.replace(b"{", b'{"a":' * self.chance.choice((1, 200, 20_000)), 1)
        try:
            return json.dumps(self.json(json.loads(data))).encode()
        except ValueError:  # it was changed before
            return self.bytes(data)

    def struct(self, fields: parquet.Struct) -> None:
        """Change one place in a Thrift structure."""
        chance = self.chance
        if not fields:
            fields.append([1, parquet.I32, 0])
        field = chance.choice(fields)
        match chance.randrange(24):
            case 0:
                fields.remove(field)
                return
            case 1:
                fields.insert(chance.randrange(len(fields) + 1), list(field))
                return
            case 2:
                field[0] = chance.randrange(0, 20)
                return
            case 3:
                fields.append([field[0] + chance.randrange(1, 20), parquet.I64, self.number(0)])
                return
        self._value(field)

    def _value(self, field: list[Any]) -> None:
        kind, value = field[1], field[2]
        if kind in (parquet.I16, parquet.I32, parquet.I64):
            field[2] = self.number(value)
        elif kind == parquet.BINARY:
            field[2] = self.text(value) if value.startswith(b"{") else self.bytes(value)
        elif kind in (parquet.TRUE, parquet.FALSE):
            field[2] = not value
        elif kind == parquet.STRUCT:
            self.struct(value)
        elif kind == parquet.LIST:
            element, values = value
            place = self.chance.randrange(len(values)) if values else 0
            match self.chance.randrange(8):
                case 0:
                    del values[place : place + 1]
                case 1 if values:
                    values.extend([values[place]] * self.chance.choice((1, 1, 300)))
                case _ if values:
                    inner = [0, element, values[place]]
                    self._value(inner)
                    values[place] = inner[2]

    def footer(self, data: bytes) -> bytes:
        """A Parquet file whose footer says something else."""
        tree, _ = parquet.read_struct(parquet.footer_of(data))
        for _ in range(self.chance.choice((1, 1, 1, 2, 4))):
            self.struct(tree)
        return parquet.with_footer(data, parquet.write_struct(tree))

    def page(self, data: bytes) -> bytes:
        """A Parquet file with a page header that says something else, the rest of the file where it was or not."""
        tree, _ = parquet.read_struct(parquet.footer_of(data))
        group = self.chance.choice(parquet.get(tree, 4)[1])
        column = self.chance.choice(parquet.get(group, 1)[1])
        at = parquet.get(parquet.get(column, 3), 9)
        header, end = parquet.read_struct(data, at)
        self.struct(header)
        new = parquet.write_struct(header)
        return data[:at] + new + data[end if self.chance.random() < 0.5 else at + len(new) :]

    def values(self, data: bytes) -> bytes:
        """A shard with other values, and checksums that match them: as its author could have written it."""
        tree, _ = parquet.read_struct(parquet.footer_of(data))
        names = [parquet.get(leaf, 4).decode() for leaf in parquet.get(tree, 2)[1][3:]]
        pair = parquet.metadata(tree)[b"kvlink.manifest"]
        manifest = json.loads(pair[2])
        changed = bytearray(data)
        for document, group in zip(manifest["documents"], parquet.get(tree, 4)[1], strict=True):
            for name, column in zip(names, parquet.get(group, 1)[1][2:], strict=True):
                meta = parquet.get(column, 3)
                _, at = parquet.read_struct(data, parquet.get(meta, 9))
                whole = xxhash.xxh3_128()
                for _ in range(manifest["layers"]):
                    length = int.from_bytes(data[at : at + 4], "little")
                    if length and self.chance.random() < 0.3:
                        for _ in range(self.chance.choice((1, 1, 3, 30))):
                            place = at + 4 + self.chance.randrange(length)
                            changed[place] = self.chance.choice((0, 127, 128, 255, self.chance.randrange(256)))
                    whole.update(bytes(changed[at + 4 : at + 4 + length]))
                    at += 4 + length
                document["columns"][name]["checksum"] = whole.hexdigest()
        pair[2] = json.dumps(manifest).encode()
        return parquet.with_footer(bytes(changed), parquet.write_struct(tree))
