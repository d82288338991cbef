"""What a store promises, on every kind of storage."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
from store_places import FINGERPRINT, Place, make_cache, same

from kvlink_core.errors import (
    DuplicateDocumentError,
    EmptyDocumentError,
    FingerprintMismatchError,
    FormatVersionError,
    InputError,
    PayloadCorruptError,
    PayloadError,
    PayloadForeignError,
    PayloadMissingError,
    StoreNotFoundError,
    StoreUnavailableError,
)
from kvlink_core.fingerprint import token_digest
from kvlink_core.store import DocumentStore
from kvlink_core.types import DocumentCache


def fill(store: DocumentStore, count: int = 3, start: int = 0) -> dict[str, DocumentCache]:
    caches = {f"doc-{i}": make_cache(5 + i, seed=i) for i in range(start, start + count)}
    store.commit(store.write_shard(list(caches.items())))
    return caches


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_committed_is_loaded_bit_for_bit(place: Place, dtype: str) -> None:
    store = place.open(create=True, dtype=dtype)
    caches = {f"doc-{i}": make_cache(1 + 3 * i, i, getattr(torch, dtype)) for i in range(5)}
    store.commit(store.write_shard(list(caches.items())))
    other = place.open(dtype=dtype)
    wanted = ["doc-3", "doc-0", "doc-3", "doc-4"]
    rows = other.lookup(wanted)
    loaded = other.load([rows[i] for i in wanted])
    assert all(same(found, caches[i]) for found, i in zip(loaded, wanted, strict=True))
    assert other.token_ids([rows["doc-3"]]) == [caches["doc-3"].token_ids.tolist()]
    assert (rows["doc-3"].tokens, rows["doc-3"].nbytes) == (10, caches["doc-3"].nbytes)


def test_nothing_is_visible_before_the_commit(place: Place) -> None:
    store = place.open(create=True)
    rows = store.write_shard([("a", make_cache(4, 1))])
    reader = place.open()
    assert reader.lookup(["a"]) == {}
    store.commit(rows)
    assert store.lookup(["a"]) == {"a": rows[0]}
    assert reader.lookup(["a"]) == {}
    assert reader.refresh()
    assert reader.lookup(["a"]) == {"a": rows[0]}
    assert not reader.refresh()


def test_the_same_work_twice_adds_nothing(place: Place) -> None:
    store = place.open(create=True)
    fill(store)
    version, files = store.commit([]), place.names("shards")
    fill(place.open())
    assert store.commit([]) == version
    assert place.names("shards") == files  # the name is the content's


def test_the_newest_row_of_an_id_wins_whatever_the_clocks_say(place: Place) -> None:
    store = place.open(create=True)
    new, old = make_cache(4, 1), make_cache(6, 2)
    (first,) = store.write_shard([("a", old)])
    store.commit([replace(first, created_at=first.created_at + timedelta(days=1))])
    store.commit(store.write_shard([("a", new)]))
    for reader in (store, place.open()):
        (found,) = reader.load([reader.lookup(["a"])["a"]])
        assert same(found, new)
    assert store.lookup_tokens([first.token_digest]) == {}  # nobody's tokens any more


def test_another_id_shares_the_payload(place: Place) -> None:
    store = place.open(create=True)
    cache = make_cache(4, 1)
    rows = store.write_shard([("a", cache), ("same text", cache)])
    assert rows[0].shard == rows[1].shard
    assert rows[0].row_group == rows[1].row_group == 0
    store.commit(rows)
    (row,) = store.lookup_tokens([rows[0].token_digest]).values()
    store.commit([store.alias("later", row)])
    assert len(place.names("shards")) == 1
    found = place.open().lookup(["a", "same text", "later", "no such"])
    assert list(found) == ["a", "same text", "later"]
    assert all(same(c, cache) for c in store.load(list(found.values())))


def test_namespaces_are_apart(place: Place) -> None:
    ours, theirs = place.open(create=True), place.open(create=True, namespace="theirs")
    (row,) = theirs.write_shard([("secret", make_cache(4, 1))])
    theirs.commit([row])
    assert ours.refresh() is False
    assert ours.lookup(["secret"]) == {}
    assert ours.lookup_tokens([row.token_digest]) == {}
    assert isinstance(ours.load([row])[0], PayloadForeignError)
    # A forged row of our own namespace does not get at it either.
    assert isinstance(ours.load([replace(row, namespace="default")])[0], PayloadForeignError)
    with pytest.raises(PayloadForeignError):
        ours.commit([row])
    with pytest.raises(PayloadForeignError):
        ours.token_ids([row])


def test_a_row_of_other_tokens_gets_no_payload(place: Place) -> None:
    store = place.open(create=True)
    a, b = store.write_shard([("a", make_cache(4, 1)), ("b", make_cache(4, 2))])
    wrong = [replace(a, row_group=b.row_group), replace(a, row_group=7), replace(a, row_group=-1), replace(a, tokens=5)]
    assert [type(e) for e in store.load(wrong)] == [PayloadForeignError] * 4


def test_one_bad_payload_does_not_harm_the_others(place: Place) -> None:
    store = place.open(create=True)
    caches = fill(store, 2) | fill(store, 2, start=2)
    lost = store.lookup(["doc-2"])["doc-2"]
    place.delete(f"shards/{lost.shard}")
    for reader in (store, place.open()):
        rows = reader.lookup(caches)
        loaded = reader.load(list(rows.values()))
        assert [type(x) for x in loaded] == [DocumentCache, DocumentCache, PayloadMissingError, PayloadMissingError]
        assert same(loaded[1], caches["doc-1"])
        # Enough is left to compute it again, although nobody sent its text.
        assert reader.token_ids([lost]) == [caches["doc-2"].token_ids.tolist()]
    place.delete(f"tokens/{lost.shard}")
    with pytest.raises(PayloadMissingError):
        store.token_ids([lost])


@pytest.mark.parametrize("warm", [False, True])
def test_flipped_bytes_are_refused(place: Place, warm: bool) -> None:
    store = place.open(create=True)
    cache = fill(store, 1)["doc-0"]
    row = store.lookup(["doc-0"])["doc-0"]
    if warm:
        assert same(store.load([row])[0], cache)
    data = bytearray(place.read(f"shards/{row.shard}"))
    data[data.index(cache.values.numpy().tobytes()[:40]) + 13] ^= 1
    place.write(f"shards/{row.shard}", bytes(data))
    (found,) = store.load([row])
    assert isinstance(found, PayloadCorruptError)
    assert "checksum" in str(found)
    store.commit(store.write_shard([("doc-0", cache)]))  # computed again: the same name, sound now
    assert same(store.load([row])[0], cache)


@pytest.mark.parametrize("left", [0, 5, 11, 300, -1, -8])
def test_torn_shards_are_refused(place: Place, left: int) -> None:
    store = place.open(create=True)
    cache = fill(store, 1)["doc-0"]
    row = store.lookup(["doc-0"])["doc-0"]
    warm = place.open()
    assert same(warm.load([row])[0], cache)
    place.write(f"shards/{row.shard}", place.read(f"shards/{row.shard}")[:left])
    for reader in (store, warm):
        (found,) = reader.load([row])
        assert isinstance(found, PayloadError) or same(found, cache)
        assert store.token_ids([row]) == [cache.token_ids.tolist()]
    assert isinstance(store.load([row])[0], PayloadCorruptError | PayloadMissingError)


@pytest.mark.parametrize("shard", ["../../etc/passwd", "x.parquet", "", "A" * 64 + ".parquet", "0" * 64 + ".parquet\n"])
def test_a_shard_name_leads_nowhere_else(local: Place, shard: str) -> None:
    store = local.open(create=True)
    (row,) = store.write_shard([("a", make_cache(4, 1))])
    forged = replace(row, shard=shard)
    assert isinstance(store.load([forged])[0], PayloadCorruptError)
    with pytest.raises(PayloadCorruptError):
        store.token_ids([forged])


def test_a_damaged_payload_can_be_replaced(place: Place) -> None:
    store = place.open(create=True)
    (bad,) = store.write_shard([("a", make_cache(4, 1))])
    store.commit([bad])
    place.delete(f"shards/{bad.shard}")
    cache = make_cache(4, 1)
    again = DocumentCache(cache.token_ids, cache.keys * 1.0001, cache.values)  # another machine's arithmetic
    rows = store.write_shard([("a", again)])
    store.commit(rows)
    assert store.lookup(["a"])["a"].shard == bad.shard
    store.commit(rows, replace_payloads=True)
    assert same(store.load([store.lookup(["a"])["a"]])[0], again)


def test_another_models_store_is_refused_and_says_why(place: Place) -> None:
    fill(place.open(create=True))
    other = replace(FINGERPRINT, weights="xyz", template="{}")
    for create in (False, True):
        with pytest.raises(FingerprintMismatchError) as caught:
            place.open(fingerprint=other, create=create)
        assert "weights: abc != xyz" in str(caught.value)
        assert "template:" in str(caught.value)
        assert "rope" not in str(caught.value)
    assert place.open(fingerprint=None).fingerprint == FINGERPRINT
    (digest,) = place.names("fingerprints")
    place.write(f"fingerprints/{digest}", b"{}")
    with pytest.raises(FingerprintMismatchError, match="cannot be read"):
        place.open(fingerprint=other)


def test_no_store_there(place: Place) -> None:
    with pytest.raises(StoreNotFoundError, match="precompute"):
        place.open()


def test_creating_twice_is_one_store(place: Place) -> None:
    fill(place.open(create=True))
    assert set(place.open(create=True).lookup(["doc-0"])) == {"doc-0"}


def test_an_interrupted_creation_is_completed(place: Place) -> None:
    marker = place.open(create=True)._storage.read("store.json")
    for path in place.names("catalog/_delta_log"):
        place.delete(f"catalog/_delta_log/{path}")
    with pytest.raises(StoreNotFoundError, match="catalog"):
        place.open()
    assert len(fill(place.open(create=True))) == 3
    assert place.read("store.json") == marker


@pytest.mark.parametrize(
    ("marker", "error"),
    [
        (b'{"format":"kvlink-store","version":2}', FormatVersionError),
        (b'{"format":"kvlink-store","version":"1"}', StoreUnavailableError),
        (b'{"format":"other","version":1}', StoreUnavailableError),
        (b"[" * 100_000, StoreUnavailableError),
        (b"\xff\x00", StoreUnavailableError),
        (b"", StoreUnavailableError),
    ],
)
def test_a_strange_marker(local: Place, marker: bytes, error: type[Exception]) -> None:
    local.open(create=True)
    local.write("store.json", marker)
    for create in (False, True):
        with pytest.raises(error):
            local.open(create=create)


def test_a_directory_of_something_else_is_refused(place: Place) -> None:
    place.open(create=True)
    place.write("mine.txt", b"precious")
    place.delete("store.json")
    with pytest.raises(StoreUnavailableError, match="not empty"):
        place.open(create=True)
    assert place.read("mine.txt") == b"precious"


@pytest.mark.parametrize(
    ("entries", "error"),
    [
        ([("a", make_cache(3, 1)), ("a", make_cache(3, 2))], DuplicateDocumentError),
        ([("", make_cache(3, 1))], InputError),
        ([("x" * 1025, make_cache(3, 1))], InputError),
        ([("\ud800", make_cache(3, 1))], InputError),
        ([("a", make_cache(0, 1))], EmptyDocumentError),
        ([("a", make_cache(3, 1, torch.bfloat16))], FingerprintMismatchError),
    ],
)
def test_what_cannot_be_stored_is_refused(local: Place, entries: Any, error: type[Exception]) -> None:
    store = local.open(create=True)
    with pytest.raises(error):
        store.write_shard(entries)
    assert store.write_shard([]) == []
    assert "shards" not in local.names("")


def test_odd_ids_are_just_ids(place: Place) -> None:
    store = place.open(create=True)
    ids = ["a/../b", "ünï\u2028", "'; drop", "a\nb", "%2e", "x" * 1024, "null", " "]
    store.commit(store.write_shard([(name, make_cache(3, i)) for i, name in enumerate(ids)]))
    assert list(place.open().lookup(ids)) == ids
    assert store.lookup(["\ud800"]) == {}


def test_many_small_commits(place: Place) -> None:
    store, caches = place.open(create=True), {}
    for i in range(12):
        caches |= fill(store, 1, start=i)
    reader = place.open()
    rows = reader.lookup(caches)
    assert all(same(f, caches[i]) for i, f in zip(rows, reader.load(list(rows.values())), strict=True))
    digests = {token_digest(c.token_ids.numpy().astype("<u4").tobytes()) for c in caches.values()}
    assert {r.document_id for r in reader.lookup_tokens(digests).values()} == set(caches)
