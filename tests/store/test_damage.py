"""Whatever happens to a shard's bytes, what comes out is what went in, or a named error."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace

import pyarrow as pa
import pytest
from store_places import Place, make_cache, same

from kvlink_core.errors import PayloadCorruptError, PayloadError

CACHES = [make_cache(4, 1), make_cache(5, 2)]


def damaged(good: bytes, random_: random.Random) -> bytes:
    data = bytearray(good)
    footer = len(good) - int.from_bytes(good[-8:-4], "little") - 8
    match random_.randrange(6):
        case 0:
            data[random_.randrange(len(data))] ^= 1 << random_.randrange(8)
        case 1:
            for _ in range(random_.randrange(1, 8)):
                data[random_.randrange(len(data))] = random_.choice([0, 127, 128, 255])
        case 2:
            del data[random_.randrange(len(data)) :]
        case 3:
            start, source, length = random_.randrange(len(data)), random_.randrange(len(data)), random_.randrange(64)
            data[start : start + length] = data[source : source + length]
        case 4:
            for _ in range(random_.randrange(1, 5)):
                data[random_.randrange(footer, len(data))] = random_.randrange(256)
        case _:
            place = random_.randrange(len(data))
            data[place:place] = random_.randbytes(random_.randrange(1, 64))
    return bytes(data)


def test_every_byte_counts_or_does_no_harm(local: Place) -> None:
    store = local.open(create=True)
    rows = store.write_shard([("a", CACHES[0]), ("b", CACHES[1])])
    path = f"shards/{rows[0].shard}"
    good = local.read(path)
    refused = 0
    for position in range(0, len(good), 11):  # data, page headers, footer, its length, the magic
        data = bytearray(good)
        data[position] ^= 1 << position % 8
        local.write(path, bytes(data))
        with local.open() as reader:
            found = reader.load(rows)
        assert all(same(f, c) or isinstance(f, PayloadError) for f, c in zip(found, CACHES, strict=True)), position
        refused += any(isinstance(f, PayloadError) for f in found)
    # All but the opening magic, the layer numbers and a few header fields that say nothing new.
    assert refused > 0.95 * (len(good) // 11)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("forged", [False, True])
def test_random_damage(local: Place, seed: int, forged: bool) -> None:
    """``forged``: under the name that the damaged footer hashes to, so that it gets past the first check."""
    store = local.open(create=True)
    rows = store.write_shard([("a", CACHES[0]), ("b", CACHES[1])])
    good = local.read(f"shards/{rows[0].shard}")
    random_ = random.Random(seed)
    before = pa.default_memory_pool().max_memory()
    outcomes = set()
    for _ in range(150):
        data = damaged(good, random_)
        shard = rows[0].shard
        if forged:
            length = int.from_bytes(data[-8:-4], "little")
            shard = hashlib.sha256(data[-8 - length : -8]).hexdigest() + ".parquet"
        local.write(f"shards/{shard}", data)
        found = store.load([replace(row, shard=shard) for row in rows])
        if forged:
            local.delete(f"shards/{shard}")
        assert all(same(f, c) or isinstance(f, PayloadError) for f, c in zip(found, CACHES, strict=True))
        outcomes |= {type(f) for f in found}
    assert PayloadCorruptError in outcomes
    # Nothing was allocated on a damaged file's word.
    assert pa.default_memory_pool().max_memory() <= max(before, 2**23)


def test_unverified_reading_is_asked_for(local: Place) -> None:
    """``verify=False`` trusts the values, and still neither lengths nor token ids."""
    trusting = local.open(create=True, verify=False)
    (row,) = trusting.write_shard([("a", CACHES[0])])
    good = local.read(f"shards/{row.shard}")
    keys, tokens = CACHES[0].keys.numpy().tobytes(), CACHES[0].token_ids.numpy().astype("<u4").tobytes()
    for stored, always_refused in ((keys, False), (tokens, True)):
        data = bytearray(good)
        data[good.index(stored[:16]) + 2] ^= 4
        local.write(f"shards/{row.shard}", bytes(data))
        with local.open() as careful:
            assert isinstance(careful.load([row])[0], PayloadCorruptError)
        assert isinstance(trusting.load([row])[0], PayloadCorruptError) == always_refused
