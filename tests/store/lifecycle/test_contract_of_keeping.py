"""What each command promises, on every kind of storage."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from store_keeping import NOW, OURS, Caches, check, keeping, put
from store_places import Place, make_cache, same

from kvlink_core.errors import ConfigError, PayloadMissingError, StoreUnavailableError, UnknownDocumentError
from kvlink_core.store.lifecycle import (
    Scope,
    collect,
    compact,
    delete,
    expire,
    export,
    inspect_document,
    inspect_shard,
    list_documents,
    rebuild,
    stats,
    verify,
)
from kvlink_core.types import DocumentCache


def some(count: int, start: int = 0) -> Caches:
    return {f"doc-{i}": make_cache(3 + i % 5, seed=i) for i in range(start, start + count)}


def test_a_life(place: Place) -> None:
    """Every command after the other on one store; each does its work once, and nothing the second time."""
    store, theirs = place.open(create=True), place.open(create=True, namespace="theirs")
    caches = some(6)
    for i in range(0, 6, 2):
        put(store, dict(list(caches.items())[i : i + 2]))
    secret = {"doc-0": make_cache(4, 77), "secret": make_cache(5, 78)}
    put(theirs, secret)
    caches["doc-1"] = make_cache(9, 100)
    put(store, {"doc-1": caches["doc-1"]})
    reader = place.open()
    before = reader.lookup(caches)

    with keeping(place) as keeper:
        assert delete(keeper, OURS, ["doc-0", "no such"]).documents == 1  # a dry run
    check(place, caches)
    with keeping(place) as keeper:
        done = delete(keeper, OURS, ["doc-0", "no such"], dry_run=False)
        assert (done.documents, done.missing, done.examples) == (1, ["no such"], ["doc-0"])
        again = delete(keeper, OURS, ["doc-0", "no such"], dry_run=False)
        assert (again.documents, again.rows, again.missing) == (0, 0, ["doc-0", "no such"])
    del caches["doc-0"]
    check(place, caches)
    check(place, secret, "theirs")

    with keeping(place) as keeper:
        planned = compact(keeper)
        # The first shard has no living document any more: nothing of it moves, and it is for `gc` alone.
        assert (planned.before, planned.after, planned.documents, planned.dead) == (3, 1, 5, 0)
        assert len(place.names("shards")) == 5
        assert replace(compact(keeper, dry_run=False), done=False) == planned
        keeper.catalog.refresh()
        version = keeper.catalog.version
        assert compact(keeper, dry_run=False).before == 0
        keeper.catalog.refresh()
        assert keeper.catalog.version == version
    check(place, caches)
    check(place, secret, "theirs")
    # Who looked up before still reads where the documents were.
    assert all(
        same(found, caches[i])
        for i, found in zip(before, reader.load(list(before.values())), strict=True)
        if i in caches
    )

    with keeping(place) as keeper:
        planned_gc = collect(keeper, NOW)
        assert len(planned_gc.shards) == 4
        assert planned_gc.superseded == 1
        done_gc = collect(keeper, NOW, dry_run=False)
        assert (done_gc.shards, done_gc.nbytes) == (planned_gc.shards, planned_gc.nbytes)
        again_gc = collect(keeper, NOW, dry_run=False)
        assert (again_gc.shards, again_gc.catalog, again_gc.superseded) == ([], [], 0)
    assert place.names("shards") == place.names("tokens")
    assert len(place.names("shards")) == 2
    check(place, caches)
    check(place, secret, "theirs")

    with keeping(place) as keeper:
        version = keeper.catalog.read() and keeper.catalog.version
        assert rebuild(keeper, dry_run=False).added == 0
        assert keeper.catalog.read()
        assert keeper.catalog.version == version
        assert rebuild(keeper, from_shards=True, dry_run=False).documents == 7
    check(place, caches)
    check(place, secret, "theirs")

    with keeping(place) as keeper:
        assert expire(keeper, OURS, timedelta(hours=1), dry_run=False).documents == 0
        assert expire(keeper, OURS, NOW, dry_run=False).documents == 5
        assert expire(keeper, OURS, NOW, dry_run=False).documents == 0
    check(place, {})
    check(place, secret, "theirs")


def test_an_empty_store(place: Place) -> None:
    place.open(create=True)
    with keeping(place) as keeper:
        assert len(keeper.catalog.read()) == 0
        version = keeper.catalog.version
        assert list_documents(keeper, OURS).total == 0
        assert stats(keeper).total.documents == 0
        assert verify(keeper).sound
        assert delete(keeper, OURS, ["a"], dry_run=False).missing == ["a"]
        assert expire(keeper, OURS, NOW, dry_run=False).documents == 0
        assert collect(keeper, NOW, dry_run=False).shards == []
        assert compact(keeper, dry_run=False).before == 0
        assert rebuild(keeper, dry_run=False).documents == 0
        assert keeper.catalog.version == version
        with pytest.raises(UnknownDocumentError):
            inspect_document(keeper, OURS, "a")
    check(place, {})
    store, caches = place.open(), some(2)
    put(store, caches)
    check(place, caches)


def test_a_writer_and_a_reader_outlive_every_change(place: Place) -> None:
    """They opened the store before, and never again."""
    store, reader = place.open(create=True), place.open()
    caches = some(2)
    put(store, {"doc-0": caches["doc-0"]})
    put(store, {"doc-1": caches["doc-1"]})
    for step, change in enumerate((compact, rebuild, collect, delete)):
        with keeping(place) as keeper:
            if change is delete:
                delete(keeper, OURS, ["doc-0"], dry_run=False)
                del caches["doc-0"]
            elif change is rebuild:
                rebuild(keeper, from_shards=True, dry_run=False)
            elif change is collect:
                collect(keeper, timedelta(hours=1), dry_run=False)
            else:
                compact(keeper, dry_run=False)
        caches[f"new-{step}"] = make_cache(4, 500 + step)
        put(store, {f"new-{step}": caches[f"new-{step}"]})
        reader.refresh()
        rows = reader.lookup([*caches, "doc-0"])
        assert set(rows) == set(caches)
        assert all(same(found, caches[i]) for i, found in zip(rows, reader.load(list(rows.values())), strict=True))
    check(place, caches)


def test_what_is_listed_and_inspected(place: Place) -> None:
    store = place.open(create=True)
    put(store, {"b": make_cache(4, 1), "a": make_cache(5, 2), "a too": make_cache(5, 2)})
    put(store, {"a": make_cache(6, 3)})
    with keeping(place) as keeper:
        listing = list_documents(keeper, OURS)
        assert [r.document_id for r in listing.rows] == ["a", "a too", "b"]
        assert listing.rows == list(store.lookup(["a", "a too", "b"]).values())
        assert [r.document_id for r in list_documents(keeper, OURS, prefix="a", limit=1).rows] == ["a"]
        assert list_documents(keeper, OURS, prefix="a", limit=1).total == 2
        (info,) = inspect_document(keeper, OURS, "a")
        assert (info.row.tokens, [r.tokens for r in info.superseded], info.problem) == (6, [5], None)
        assert info.fingerprint == store.fingerprint
        (info,) = inspect_document(keeper, OURS, "a too")
        assert info.same_tokens == []  # "a" is another text now
        shard = inspect_shard(keeper, OURS, info.row.shard[:12])
        assert (shard.name, shard.ids) == (info.row.shard, {0: ["b"], 1: ["a too"]})
        assert shard.size == len(place.read(f"shards/{shard.name}"))
        found = stats(keeper)
        assert (found.total.documents, found.total.payloads, found.total.tokens) == (3, 3, 15)
        assert found.total.nbytes == sum(r.nbytes for r in listing.rows)
        assert found.superseded == 1
        assert found.ages["under an hour"] == found.total
        assert found.files
        assert (found.files.shards, found.files.unnamed) == (2, 0)


def test_namespaces_are_apart_in_every_command(place: Place, tmp_path: Path) -> None:
    ours, theirs = place.open(create=True), place.open(create=True, namespace="theirs")
    mine, secret = {"doc": make_cache(4, 1)}, {"secret": make_cache(5, 2)}
    put(ours, mine)
    (row,) = put(theirs, secret)
    # Even a row of our namespace that was forged to name their shard does not open it.
    ours._catalog.append([replace(row, namespace="default", document_id="forged")])
    with keeping(place) as keeper:
        assert [r.document_id for r in list_documents(keeper, OURS, prefix="s").rows] == []
        for name in (row.shard, row.shard[:8]):
            with pytest.raises(PayloadMissingError):
                inspect_shard(keeper, OURS, name)
        with pytest.raises(UnknownDocumentError):
            inspect_document(keeper, OURS, "secret")
        (forged,) = inspect_document(keeper, OURS, "forged")
        assert forged.problem is not None
        assert forged.manifest is None
        with pytest.raises(UnknownDocumentError):
            export(keeper, OURS, tmp_path / "out", document_ids=["secret"])
        assert set(export(keeper, OURS, tmp_path / "out").failures) == {"forged"}
        assert stats(keeper, OURS).groups[0].namespace == "default"
        assert len(stats(keeper, OURS).groups) == 1
        assert {p.namespace for p in verify(keeper).problems} == {"default"}
        assert verify(keeper, Scope("theirs")).sound
        assert delete(keeper, OURS, ["secret"], dry_run=False).missing == ["secret"]
        assert delete(keeper, OURS, ["forged"], dry_run=False).documents == 1
        expire(keeper, OURS, NOW, dry_run=False)
        compact(keeper, dry_run=False, dead=0)
        collect(keeper, NOW, dry_run=False)
        rebuild(keeper, from_shards=True, dry_run=False)
    check(place, {})
    check(place, secret, "theirs")
    with keeping(place) as keeper:
        for command in (list_documents, inspect_document, inspect_shard, delete):
            with pytest.raises(ConfigError):
                command(keeper, Scope(), *([] if command is list_documents else ["x"]))  # type: ignore[operator]


def test_exported_files_hold_the_numbers(place: Place, tmp_path: Path) -> None:
    store, caches = place.open(create=True, dtype="bfloat16"), {}
    for i, name in enumerate(["a/../b", "ünï\u2028", "x" * 300]):
        caches[name] = make_cache(4 + i, i, torch.bfloat16)
    put(store, caches)
    target = tmp_path / "out" / "deep"
    with keeping(place) as keeper:
        assert export(keeper, OURS, target).documents == 3
        names = sorted(p.name for p in target.iterdir())
        assert export(keeper, OURS, target, document_ids=["a/../b"]).documents == 1  # an earlier export is no obstacle
        assert sorted(p.name for p in target.iterdir()) == names
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "mine").write_text("precious")
        with pytest.raises(ConfigError, match="not empty"):
            export(keeper, OURS, tmp_path / "full")
    described = [json.loads(p.read_text()) for p in target.glob("*.json") if p.name != "kvlink-export.json"]
    assert {d["document_id"] for d in described} == set(caches)
    for d in described:
        found = DocumentCache(**load_file(target / d["file"]))
        assert same(found, caches[d["document_id"]])
        assert d["fingerprint_fields"]["model"] == "tiny"
    assert not list(tmp_path.glob("*.safetensors"))


def test_expiry_goes_by_the_latest_version(place: Place) -> None:
    store = place.open(create=True)
    (old,) = store.write_shard([("replaced", make_cache(4, 1))])
    (other,) = store.write_shard([("old", make_cache(4, 2))])
    long_ago = old.created_at - timedelta(days=10)
    store.commit([replace(old, created_at=long_ago), replace(other, created_at=long_ago)])
    new = {"replaced": make_cache(4, 3)}
    put(store, new)
    with keeping(place) as keeper:
        with pytest.raises(ConfigError):
            expire(keeper, OURS, timedelta(days=-1))
        assert expire(keeper, OURS, timedelta(days=11), dry_run=False).documents == 0
        done = expire(keeper, OURS, timedelta(days=9), dry_run=False)
    assert (done.documents, done.examples, done.rows) == (1, ["old"], 2)
    check(place, new)


def test_deleting_from_the_future(place: Place) -> None:
    """A writer whose clock is ahead does not keep its documents from being deleted, for good."""
    store = place.open(create=True)
    (row,) = store.write_shard([("a", make_cache(4, 1))])
    store.commit([replace(row, created_at=row.created_at + timedelta(days=3))])
    with keeping(place) as keeper:
        assert delete(keeper, OURS, ["a"], dry_run=False).documents == 1
    check(place, {})
    with keeping(place) as keeper:
        rebuild(keeper, from_shards=True, dry_run=False)
    check(place, {})


def test_a_lost_catalog_is_not_garbage(place: Place) -> None:
    store, caches = place.open(create=True), some(2)
    put(store, caches)
    for path in place.names("catalog/_delta_log"):
        place.delete(f"catalog/_delta_log/{path}")
    again = place.open(create=True)  # precompute makes a new, empty one
    assert again.lookup(caches) == {}
    for path in place.names(f"catalog/namespace=default/fingerprint={store.fingerprint.digest}"):
        place.delete(f"catalog/namespace=default/fingerprint={store.fingerprint.digest}/{path}")
    with keeping(place) as keeper:
        assert collect(keeper, NOW).nothing_named
        with pytest.raises(StoreUnavailableError, match="rebuild"):
            collect(keeper, NOW, dry_run=False)
        done = rebuild(keeper, dry_run=False)
        assert (done.documents, done.added, done.catalog) == (2, 2, "sound")
    check(place, caches)
