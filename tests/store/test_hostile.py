"""Hostile shards, end to end: each gives its named error, is computed again, and the answer stays the same."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import parquet_bytes as parquet
import pytest
from hostile_shards import HOSTILE, Hostile
from store_places import FINGERPRINT, Place, make_cache, same

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import PayloadCorruptError, PayloadForeignError
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.types import DocumentRef, Message

TESTS = Path(__file__).parent.parent


def harm(
    place: Place, store: DocumentStore, rows: list[CatalogRow], hostile: Hostile, *, name_it: bool = True
) -> CatalogRow:
    """Put the hostile file in the place of the first row's shard, or beside it and name it; returns the row."""
    good, other = (place.read(f"shards/{row.shard}") for row in rows)
    data = hostile.change(good, other)
    if not hostile.forged:
        place.write(f"shards/{rows[0].shard}", data)
        return rows[0]
    named = replace(rows[0], shard=parquet.name_of(data), created_at=rows[0].created_at + timedelta(seconds=1))
    place.write(f"shards/{named.shard}", data)
    place.write(f"tokens/{named.shard}", place.read(f"tokens/{rows[0].shard}"))
    if name_it:
        store._catalog.append([named])
    return named


@pytest.mark.parametrize("name", HOSTILE)
def test_each_gives_its_error(local: Place, name: str) -> None:
    hostile = HOSTILE[name]
    store = local.open(create=True, codec=hostile.codec)
    caches = [make_cache(5, 1), make_cache(5, 2)]
    rows = [store.write_shard([(i, c)])[0] for i, c in zip("ab", caches, strict=True)]
    store.commit(rows)
    row = harm(local, store, rows, hostile)
    for reader in (store, local.open(codec=hostile.codec)):
        found, other = reader.load([row, rows[1]])
        assert same(found, caches[0]) if hostile.error is None else type(found) is hostile.error, repr(found)
        assert same(other, caches[1])  # one bad payload harms no other
        tokens, _ = reader.token_ids([replace(rows[0]), rows[1]])
        assert tokens == caches[0].token_ids.tolist()


def test_two_row_groups_in_one_place(local: Place) -> None:
    """Found by the fuzzer: the document that is really there was served for both."""
    store = local.open(create=True)
    caches = [make_cache(5, 1), make_cache(5, 2)]
    rows = store.write_shard(list(zip("ab", caches, strict=True)))
    good = local.read(f"shards/{rows[0].shard}")
    tree, _ = parquet.read_struct(parquet.footer_of(good))
    groups = parquet.get(tree, 4)[1]
    groups[0] = groups[1]
    data = parquet.with_footer(good, parquet.write_struct(tree))
    local.write(f"shards/{parquet.name_of(data)}", data)
    first, second = store.load([replace(row, shard=parquet.name_of(data)) for row in rows])
    assert type(first) is PayloadCorruptError
    assert same(second, caches[1])


def test_a_foreign_row_beside_ours(local: Place) -> None:
    """Who asks for one document by two rows gets it for the right one alone."""
    store = local.open(create=True)
    (row,) = store.write_shard([("a", make_cache(5, 1))])
    wrong = [replace(row, codec="int8"), replace(row, tokens=6), replace(row, token_digest="0" * 64)]
    for rows in ([row, *wrong], [*wrong, row]):
        found = store.load(rows)
        assert [type(f) is PayloadForeignError for f in found] == [r is not row for r in rows]


@pytest.fixture(scope="module")
def answers(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The answer of a sound store."""
    return ask(tiny_model, fill(tiny_model, tmp_path_factory.mktemp("sound") / "store", "raw")[0])[0]


def fill(model: LoadedModel, path: Path, codec: str) -> tuple[DocumentStore, list[CatalogRow]]:
    """Two documents of as many tokens, each in a shard of its own."""
    store = DocumentStore.open(str(path), fingerprint=model.fingerprint, create=True, codec=codec)
    texts = ["Maria was born in Lima.", "Pedro was born in Oslo."]
    tokens = [list(text.encode()) for text in texts]
    caches = DocumentEncoder(model).encode(tokens)
    rows = [store.write_shard([(i, c)])[0] for i, c in zip("ab", caches, strict=True)]
    store.commit(rows)
    return store, rows


def ask(model: LoadedModel, store: DocumentStore) -> tuple[str, Session, list[str | None]]:
    session = Session(model, store)
    request = AnswerRequest(
        [Message("user", "Where?")], [DocumentRef("a"), DocumentRef("b")], sampling=SamplingParams(max_tokens=8)
    )
    answer = session.start(request)
    return answer.text(), session, [d.origin for d in answer.documents]


@pytest.mark.parametrize("name", HOSTILE)
def test_the_answer_is_the_same(tiny_model: LoadedModel, answers: str, tmp_path: Path, name: str) -> None:
    from store_places import local_place

    hostile = HOSTILE[name]
    store, rows = fill(tiny_model, tmp_path / "store", hostile.codec)
    with store:
        harm(local_place(tmp_path / "store"), store, rows, hostile)
        text, session, origins = ask(tiny_model, store)
        assert text == answers
        harmed = hostile.error is not None
        assert origins == ["reencoded-corrupt" if harmed else "store", "store"]
        assert session.counters.corrupt_payloads == int(harmed)


LIMITED = """
import json, resource, sys
from store_places import FINGERPRINT
from kvlink_core.errors import PayloadError
from kvlink_core.store import DocumentStore
url, codec, extra = sys.argv[1], sys.argv[2], int(sys.argv[3])
with DocumentStore.open(url, fingerprint=FINGERPRINT, codec=codec) as store:
    rows = list(store.lookup(json.load(sys.stdin)).values())
    store.load(rows[:1])  # threads and libraries are there now
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + extra, held + extra))
    for row in rows:
        (found,) = store.load([row])
        # Without memory Arrow and NumPy raise MemoryError, which would be reported as damage: so it must not occur.
        print(json.dumps([row.document_id, type(found).__name__, "emory" in str(found)]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
@pytest.mark.parametrize("codec", ["raw", "lossless"])
def test_nothing_is_allocated_that_is_only_claimed(local: Place, codec: str) -> None:
    """Under a limit of 64 MiB more, every error is the one that it is without."""
    store = local.open(create=True, codec=codec)
    expected, named = {}, []
    for number, (name, hostile) in enumerate(HOSTILE.items()):
        if hostile.codec == codec:
            caches = [make_cache(5, 100 + 2 * number), make_cache(5, 101 + 2 * number)]
            rows = [store.write_shard([(name, cache)])[0] for cache in caches]
            named.append(harm(local, store, rows, hostile, name_it=False))
            expected[name] = "DocumentCache" if hostile.error is None else hostile.error.__name__
    store.commit(named)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, local.url, codec, str(64 * 2**20)],
        input=json.dumps(list(expected)), capture_output=True, text=True, env=environment, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert {name: kind for name, kind, _ in found} == expected
    assert not [name for name, _, memory in found if memory]
    assert FINGERPRINT.dtype == "float32"
