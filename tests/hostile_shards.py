"""Ways to damage a shard, or to forge one, each with the error that it must give."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import parquet_bytes as parquet
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from kvlink_core.errors import FormatVersionError, PayloadCorruptError, PayloadError, PayloadForeignError

#: From a shard, and the shard of another document with as many tokens, to what is put in its place.
Change = Callable[[bytes, bytes], bytes]


@dataclass(frozen=True)
class Hostile:
    """A damage.

    Attributes:
        change: makes the file.
        error: what reading it must give; ``None`` where the damage harms nothing that is served.
        forged: under the name that the new footer hashes to, which the catalog then names.
        codec: of the shard.
    """

    change: Change
    error: type[PayloadError] | None = PayloadCorruptError
    forged: bool = False
    codec: str = "raw"


def cut(share: float) -> Change:
    """The first part of the file; a negative number of bytes less."""
    return lambda good, _: good[: int(share)] if share < 0 or share > 1 else good[: int(share * len(good))]


def flip(place: Callable[[bytes], int]) -> Change:
    def change(good: bytes, _: bytes) -> bytes:
        at = place(good) % len(good)
        return good[:at] + bytes([good[at] ^ 64]) + good[at + 1 :]

    return change


def chunk(data: bytes, column: int) -> tuple[int, int, int]:
    """Where a column of the first document begins, where its page's content does, and where it ends."""
    tree, _ = parquet.read_struct(parquet.footer_of(data))
    meta = parquet.get(parquet.get(parquet.get(tree, 4)[1][0], 1)[1][column], 3)
    begin = parquet.get(meta, 9)
    return begin, parquet.read_struct(data, begin)[1], begin + parquet.get(meta, 7)


def in_footer(change: Callable[[parquet.Struct], object]) -> Change:
    def apply(good: bytes, _: bytes) -> bytes:
        tree, _end = parquet.read_struct(parquet.footer_of(good))
        change(tree)
        return parquet.with_footer(good, parquet.write_struct(tree))

    return apply


def in_manifest(change: Callable[[dict[str, Any]], object]) -> Change:
    def apply(tree: parquet.Struct) -> None:
        pair = parquet.metadata(tree)[b"kvlink.manifest"]
        manifest = json.loads(pair[2])
        change(manifest)
        pair[2] = json.dumps(manifest).encode()

    return in_footer(apply)


def pair(key: str, value: bytes) -> Change:
    return in_footer(lambda tree: parquet.metadata(tree)[key.encode()].__setitem__(2, value))


def in_chunk(field: int, value: int) -> Change:
    """A number in what the footer says of the keys' chunk."""

    def apply(tree: parquet.Struct) -> None:
        parquet.put(parquet.get(parquet.get(parquet.get(tree, 4)[1][0], 1)[1][2], 3), field, value)

    return in_footer(apply)


def page_header(field: int, value: int, column: int = 2) -> Change:
    """A number in the header of a page, in as many bytes as it had: it only claims to be another."""

    def change(good: bytes, _: bytes) -> bytes:
        begin, content, end = chunk(good, column)
        header, _end = parquet.read_struct(good, begin)
        parquet.put(header if field < 4 else parquet.get(header, 5), field if field < 4 else 1, value)
        return good[:begin] + (parquet.write_struct(header) + good[content:end])[: end - begin] + good[end:]

    return change


def value_length(length: int) -> Change:
    def change(good: bytes, _: bytes) -> bytes:
        _, content, _ = chunk(good, 2)
        return good[:content] + length.to_bytes(4, "little") + good[content + 4 :]

    return change


def other_values(good: bytes, other: bytes) -> bytes:
    """Keys and values of another document, under the manifest of this one."""
    begin, _, _ = chunk(good, 2)
    _, _, end = chunk(good, 3)
    return good[:begin] + other[begin:end] + good[end:]


def bomb(good: bytes, _: bytes) -> bytes:
    """A frame of a few kilobytes that would become half a gigabyte, checksummed as it should be."""
    frame = pa.Codec("zstd").compress(bytes(2**29), asbytes=True)
    return swap_values(good, lambda value: frame)


def small_bomb(good: bytes, _: bytes) -> bytes:
    """A frame, long enough to be one, of which twice as many bytes come out as must."""
    return swap_values(good, lambda value: pa.Codec("zstd").compress(value[:40] * (len(value) // 20), asbytes=True))


def swap_values(good: bytes, new: Callable[[bytes], bytes]) -> bytes:
    """The shard with other values in its first document's keys, all that speaks of them made to fit."""
    tree, _ = parquet.read_struct(parquet.footer_of(good))
    group = parquet.get(tree, 4)[1][0]
    begin, at, end = chunk(good, 2)
    values = []
    while at < end:
        length = int.from_bytes(good[at : at + 4], "little")
        values.append(new(good[at + 4 : at + 4 + length]))
        at += 4 + length
    written = parquet.page(len(values), parquet.binary(values))
    shift = len(written) - (end - begin)
    keys = parquet.get(parquet.get(group, 1)[1][2], 3)
    for field in (6, 7):
        parquet.put(keys, field, len(written))
    after = parquet.get(parquet.get(group, 1)[1][3], 3)
    parquet.put(after, 9, parquet.get(after, 9) + shift)
    entry = parquet.metadata(tree)[b"kvlink.manifest"]
    manifest = json.loads(entry[2])
    joined = b"".join(values)
    manifest["documents"][0]["columns"]["k"] = {"bytes": len(joined), "checksum": xxhash.xxh3_128_hexdigest(joined)}
    entry[2] = json.dumps(manifest).encode()
    return parquet.with_footer(good[:begin] + written + good[end:], parquet.write_struct(tree))


def no_frame(good: bytes, _: bytes) -> bytes:
    return swap_values(good, lambda value: (b"\x28\xb5\x2f\xfd" + bytes(len(value)))[: len(value) - 1])


def another_model(good: bytes, other: bytes) -> bytes:
    """Of a fingerprint that is sound, and not the one that is asked for."""
    digest = hashlib.sha256(b"{}").hexdigest()
    return pair("kvlink.fingerprint", b"{}")(in_manifest(lambda m: m.update(fingerprint=digest))(good, other), other)


def somebody_elses(*_: bytes) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table({"a": [1, 2], "b": ["x", "y"]}), sink)
    return sink.getvalue()


def first(entry: dict[str, Any]) -> dict[str, Any]:
    return entry["documents"][0]  # type: ignore[no-any-return]


HUGE = 2**31 - 1

HOSTILE: dict[str, Hostile] = {
    **{f"cut to {name}": Hostile(cut(where)) for name, where in {
        "nothing": 0.0, "its mark": 4, "ten bytes": 10, "a quarter": 0.25, "half": 0.5, "most": 0.9,
        "all but the footer's length": -8, "all but the mark": -4, "all but a byte": -1,
    }.items()},
    "flipped: opening mark": Hostile(flip(lambda d: 1), None),
    "flipped: layer number": Hostile(flip(lambda d: chunk(d, 0)[1] + 1), None),
    "flipped: header of token ids": Hostile(flip(lambda d: chunk(d, 1)[0] + 3)),
    "flipped: levels of token ids": Hostile(flip(lambda d: chunk(d, 1)[1] + 4)),
    "flipped: token ids": Hostile(flip(lambda d: chunk(d, 1)[2] - 3)),
    "flipped: header of keys": Hostile(flip(lambda d: chunk(d, 2)[0] + 3)),
    "flipped: length of a key": Hostile(flip(lambda d: chunk(d, 2)[1] + 1)),
    "flipped: keys": Hostile(flip(lambda d: chunk(d, 2)[1] + 40)),
    "flipped: last key": Hostile(flip(lambda d: chunk(d, 2)[2] - 1)),
    "flipped: values": Hostile(flip(lambda d: chunk(d, 3)[2] - 7)),
    "flipped: schema": Hostile(flip(lambda d: d.rindex(b"token_ids"))),
    "flipped: manifest": Hostile(flip(lambda d: d.rindex(b'"checksum"') + 2)),
    "flipped: footer's length": Hostile(flip(lambda d: -8)),
    "flipped: closing mark": Hostile(flip(lambda d: -2)),
    "another document's file": Hostile(lambda good, other: other),
    "another document's file, named": Hostile(lambda good, other: other, PayloadForeignError, forged=True),
    "another document's values": Hostile(other_values),
    "another document's values, named": Hostile(other_values, forged=True),
    "a value's length too long": Hostile(value_length(HUGE)),
    "a value's length too short": Hostile(value_length(1)),
    "a footer of two gigabytes": Hostile(lambda good, _: good[:-8] + (HUGE).to_bytes(4, "little") + b"PAR1"),
    "a page of two gigabytes": Hostile(page_header(2, HUGE)),
    "a stored page of two gigabytes": Hostile(page_header(3, HUGE)),
    "a page of two thousand million values": Hostile(page_header(5, HUGE)),
    "token ids of two thousand million rows": Hostile(page_header(5, HUGE, column=1)),
    "a chunk of an exabyte": Hostile(in_chunk(7, 2**60), forged=True),
    "a chunk of an exabyte, plain": Hostile(in_chunk(6, 2**60), forged=True),
    "a chunk of many values": Hostile(in_chunk(5, 2**40), forged=True),
    "a chunk before the file": Hostile(in_chunk(9, -100), forged=True),
    "a chunk behind the file": Hostile(in_chunk(9, 2**40), forged=True),
    "a compression that there is not": Hostile(in_chunk(4, 77), forged=True),
    "a type that there is not": Hostile(in_chunk(1, 77), forged=True),
    "a claim of many tokens": Hostile(in_manifest(lambda m: first(m).update(tokens=HUGE)), PayloadForeignError, True),
    "a claim of many layers": Hostile(in_manifest(lambda m: m.update(layers=HUGE)), forged=True),
    "a claim of wide heads": Hostile(in_manifest(lambda m: m.update(head_dim=HUGE, kv_heads=HUGE)), forged=True),
    "a claim of many bytes": Hostile(in_manifest(lambda m: first(m)["columns"]["k"].update(bytes=2**62)), forged=True),
    "a claim of negative bytes": Hostile(in_manifest(lambda m: first(m)["columns"]["k"].update(bytes=-1)), forged=True),
    "another checksum": Hostile(in_manifest(lambda m: first(m)["columns"]["v"].update(checksum="0" * 32)), forged=True),
    "another dtype": Hostile(in_manifest(lambda m: m.update(dtype="float16")), forged=True),
    "a manifest without end": Hostile(pair("kvlink.manifest", b"[" * 100_000), forged=True),
    "a manifest of numbers without end": Hostile(pair("kvlink.manifest", b"1" * 100_000), forged=True),
    "an unknown field": Hostile(in_manifest(lambda m: m.update(pickle="gASV")), forged=True),
    "a newer format": Hostile(pair("kvlink.format", b"2"), FormatVersionError, forged=True),
    "a format without end": Hostile(pair("kvlink.format", b"9" * 10_000), forged=True),
    "a codec of the future": Hostile(
        in_manifest(lambda m: m.update(codec={"name": "int3", "params": {}})), FormatVersionError, forged=True
    ),
    "another fingerprint": Hostile(in_manifest(lambda m: m.update(fingerprint="0" * 64)), forged=True),
    "another model": Hostile(another_model, PayloadForeignError, forged=True),
    "another tenant": Hostile(in_manifest(lambda m: m.update(namespace="theirs")), PayloadForeignError, forged=True),
    "somebody else's Parquet": Hostile(somebody_elses, PayloadForeignError, forged=True),
    "no Parquet": Hostile(lambda *_: b"PAR1 but not really", forged=False),
    "columns in another order": Hostile(in_footer(lambda t: parquet.get(t, 2)[1].reverse()), forged=True),
    "row groups without end": Hostile(
        in_footer(lambda t: parquet.put(t, 4, [parquet.STRUCT, parquet.get(t, 4)[1] * 5000])), forged=True
    ),
    "a zip of death": Hostile(bomb, forged=True, codec="lossless"),
    "a frame that is too much": Hostile(small_bomb, forged=True, codec="lossless"),
    "a frame that is none": Hostile(no_frame, forged=True, codec="lossless"),
}  # fmt: skip
