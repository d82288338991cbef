"""The whole job on a local Ray: what it stores, what it skips, and what a kill leaves behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import ray
import torch
from deltalake import DeltaTable

from kvlink_core.chunking import chunk_document
from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import DuplicateDocumentError, KVLinkError, PayloadCorruptError, StoreUnavailableError
from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentCache
from pipeline import job
from pipeline.config import PrecomputeConfig
from pipeline.stages import ShardEncoder
from pipeline.summary import Summary

pytestmark = [
    pytest.mark.ray,
    pytest.mark.usefixtures("ray_session"),
    # Ray Data warns of its own settings when it sets them.
    pytest.mark.filterwarnings("ignore::DeprecationWarning:ray"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path) -> dict[str, Any]:
    return {
        "input": [str(tmp_path / "corpus")],
        "store": str(tmp_path / "store"),
        "model": str(tiny_model_dir),
        "chunk_tokens": 128,
        "threads": 1,
    }


def write(tmp_path: Path, name: str, rows: list[Any]) -> None:
    (tmp_path / "corpus").mkdir(exist_ok=True)
    (tmp_path / "corpus" / name).write_text("".join(json.dumps(r) + "\n" for r in rows))


def run(settings: dict[str, Any], **changes: Any) -> Summary:
    return job.run(PrecomputeConfig(**(settings | changes)))


def catalog(store: str) -> list[str]:
    """Document ids of all rows of the catalog, superseded ones and duplicates included."""
    ids: list[str] = pa.table(DeltaTable(f"{store}/catalog").to_pyarrow_table())["document_id"].to_pylist()
    return ids


def assert_equals_core(store: DocumentStore, model: LoadedModel, documents: list[Document]) -> None:
    """All documents are there, whole, and are what the encoder alone computes for their text."""
    rows = store.lookup([d.id for d in documents])
    assert len(rows) == len(documents)
    tokens = [model.layout.document_tokens(d) for d in documents]
    computed = DocumentEncoder(model).encode(tokens)
    for stored, mine in zip(store.load([rows[d.id] for d in documents]), computed, strict=True):
        assert isinstance(stored, DocumentCache)
        assert torch.equal(stored.token_ids, mine.token_ids)
        torch.testing.assert_close(stored.keys, mine.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stored.values, mine.values, rtol=1e-5, atol=1e-5)


def test_a_corpus_of_all_sorts_and_then_again(
    tmp_path: Path, settings: dict[str, Any], tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = " ".join(f"Sentence {i} of a long document." for i in range(12))
    write(tmp_path, "a.jsonl", [{"id": f"a{i}", "text": f"Text {i}.", "title": "T"} for i in range(20)])
    write(tmp_path, "b.jsonl", [{"id": "long", "text": long}, {"id": "bad"}, {"text": "No id."}])
    write(
        tmp_path,
        "c.jsonl",
        [{"id": "same", "text": "Text 3.", "title": "T"}, {"id": "a4", "text": "Text 4.", "title": "T"}],
    )
    (tmp_path / "corpus" / "d.txt").write_text("A text file.")
    (tmp_path / "corpus" / "e.pdf").write_text("?")
    chunks = chunk_document(
        "long", long, limit=128, count_tokens=lambda t: len(tiny_model.layout.document_tokens(Document("", t)))
    )
    assert len(chunks) > 2
    documents = [
        *(Document(f"a{i}", f"Text {i}.", "T") for i in range(20)),
        *(Document(c.id, c.text) for c in chunks),
        Document("b.jsonl:3", "No id."),
        Document("same", "Text 3.", "T"),
        Document("d.txt", "A text file."),
    ]

    crossed: list[pa.Table] = []
    take = job.Committer.take

    def spy(self: job.Committer, table: pa.Table) -> None:
        crossed.append(table)
        take(self, table)

    monkeypatch.setattr(job.Committer, "take", spy)
    summary = run(settings)

    assert (summary.files, summary.documents, summary.chunks) == (4, 26, len(documents))
    assert [Path(p).name for p in summary.files_ignored] == ["e.pdf"]
    assert [(f.id, f.code) for f in summary.failed] == [("bad", "no_text")]
    assert (summary.repeated, summary.shared, summary.already_there) == (1, 1, 0)
    assert summary.encoded == len(documents) - 1
    store = DocumentStore.open(settings["store"], fingerprint=tiny_model.fingerprint)
    assert_equals_core(store, tiny_model, documents)
    assert summary.tokens == sum(r.tokens for r in store.lookup([d.id for d in documents]).values())
    # Keys and values stay where they are computed: what crosses Ray's object store is a small row for each chunk.
    assert sum(t.num_rows for t in crossed) == summary.encoded
    assert sum(t.nbytes for t in crossed) / summary.encoded < 1024 < summary.payload_bytes / summary.encoded

    shards = sorted(p.name for p in Path(settings["store"], "shards").iterdir())
    again = run(settings)
    assert (again.encoded, again.encoded_tokens, again.commits, again.tokens_per_s) == (0, 0, 0, 0.0)
    assert again.already_there == again.chunks == len(documents)
    assert sorted(p.name for p in Path(settings["store"], "shards").iterdir()) == shards
    assert sorted(catalog(settings["store"])) == sorted(d.id for d in documents)


def test_nothing_is_computed_when_an_id_has_two_texts(tmp_path: Path, settings: dict[str, Any]) -> None:
    write(tmp_path, "a.jsonl", [{"id": "a", "text": "One."}])
    write(tmp_path, "b.jsonl", [{"id": "b", "text": "Fine."}, {"id": "a", "text": "Two."}])
    with pytest.raises(DuplicateDocumentError, match=r"'a' has two different texts, at .*a\.jsonl:1 and .*b\.jsonl:2"):
        run(settings)
    assert catalog(settings["store"]) == []
    assert not list(Path(settings["store"]).glob("shards/*.parquet"))


def test_a_store_that_fails_half_way_stops_the_job_and_what_was_done_stays_also_when_the_corpus_changes(
    tmp_path: Path, settings: dict[str, Any], tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, "a.jsonl", [{"id": f"{i:02}", "text": f"Text {i}."} for i in range(12)])

    class Failing(ShardEncoder):
        def __call__(self, table: pa.Table) -> pa.Table:
            if "11" in table["chunk_id"].to_pylist():
                self._broken = StoreUnavailableError("no space left.")
            return super().__call__(table)

    monkeypatch.setattr(job, "ShardEncoder", Failing)
    with pytest.raises(KVLinkError, match=r"^no space left\.$") as raised:
        run(settings, shard_mb=0.01)
    assert raised.value.code == "store_unavailable"
    done = catalog(settings["store"])
    assert 0 < len(done) < 12
    assert {"00", "01", "02"} <= set(done)
    monkeypatch.undo()
    # One text is another now, one is gone, one comes again under another id.
    documents = {f"{i:02}": f"Text {i}." for i in range(12) if i != 1} | {"00": "Newer.", "again": "Text 2."}
    write(tmp_path, "a.jsonl", [{"id": i, "text": text} for i, text in documents.items()])
    summary = run(settings)
    assert (summary.already_there, summary.encoded) == (len(done) - 2, 12 - len(done) + 1)
    assert (summary.shared, summary.replaced, summary.stale) == (1, 1, [])
    store = DocumentStore.open(settings["store"], fingerprint=tiny_model.fingerprint)
    documents["01"] = "Text 1."  # what is gone from the corpus is still in the store
    assert_equals_core(store, tiny_model, [Document(i, text) for i, text in documents.items()])


def test_what_is_damaged_is_replaced_when_asked_and_former_texts_are_named(
    tmp_path: Path, settings: dict[str, Any], tiny_model: LoadedModel
) -> None:
    long = " ".join(f"Sentence {i} of a long document." for i in range(12))
    write(
        tmp_path, "a.jsonl", [{"id": "a", "text": "Text."}, {"id": "same", "text": "Text."}, {"id": "b", "text": "B."}]
    )
    write(tmp_path, "b.jsonl", [{"id": "long", "text": long}])
    before = [Document("a", "Text."), Document("same", "Text."), Document("b", "B."), Document("long", "Short.")]
    caches = DocumentEncoder(tiny_model).encode([tiny_model.layout.document_tokens(d) for d in before])
    store = DocumentStore.open(settings["store"], fingerprint=tiny_model.fingerprint, create=True)
    for document, cache in zip(before, caches, strict=True):
        store.commit(store.write_shard([(document.id, cache)]))
    rows = store.lookup(["a", "same"])
    for folder in ("shards", "tokens"):
        for path in Path(settings["store"], folder).iterdir():
            path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(PayloadCorruptError):
        store.token_ids([rows["a"]])

    summary = run(settings, replace=True)
    assert (summary.already_there, summary.replaced, summary.shared) == (0, 3, 1)
    assert summary.encoded == summary.chunks - 1
    assert (summary.stale, summary.failed) == (["long"], [])
    store.refresh()
    assert_equals_core(store, tiny_model, before[:3])
    found = store.lookup([d.id for d in before[:3]])
    assert store.token_ids(list(found.values())) == [c.token_ids.tolist() for c in caches[:3]]


def test_an_actor_killed_between_its_shard_and_its_answer(
    tmp_path: Path, settings: dict[str, Any], tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = [Document(f"{i:02}", f"Text {i}.") for i in range(24)]
    write(tmp_path, "a.jsonl", [{"id": d.id, "text": d.text} for d in documents])
    marker = tmp_path / "died"

    class Dying(ShardEncoder):
        def __call__(self, table: pa.Table) -> pa.Table:
            results = super().__call__(table)
            if not marker.exists():
                marker.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            return results

    monkeypatch.setattr(job, "ShardEncoder", Dying)
    summary = run(settings, shard_mb=0.01, commit_interval_s=0)
    assert marker.exists()
    assert summary.shards > 2
    assert summary.encoded == 24
    assert sorted(catalog(settings["store"])) == [d.id for d in documents]
    # Shards are named after their content, so the block that was done twice left one file, not two.
    assert len(list(Path(settings["store"]).glob("shards/*.parquet"))) == summary.shards
    store = DocumentStore.open(settings["store"], fingerprint=tiny_model.fingerprint)
    assert_equals_core(store, tiny_model, documents)


def test_a_driver_killed_half_way_and_run_again(
    tmp_path: Path, settings: dict[str, Any], tiny_model: LoadedModel
) -> None:
    documents = [Document(f"{i:03}", f"Text {i}. " * (1 + i % 5)) for i in range(150)]
    write(tmp_path, "a.jsonl", [{"id": d.id, "text": d.text} for d in documents])
    arguments = ["--input", settings["input"][0], "--store", settings["store"], "--model", settings["model"]]
    arguments += ["--chunk-tokens", "128", "--shard-mb", "0.02", "--commit-interval-s", "0", "--threads", "1"]
    arguments += ["--ray-address", ray.get_runtime_context().gcs_address]
    driver = subprocess.Popen(
        [sys.executable, str(ROOT / "pipeline" / "precompute.py"), *arguments],
        cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    log = Path(settings["store"], "catalog", "_delta_log")
    try:
        deadline = time.monotonic() + 90
        while len(list(log.glob("*.json"))) < 4:  # the first one makes the table
            assert driver.poll() is None, "it ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.01)
    finally:
        driver.kill()
        driver.wait()

    done = catalog(settings["store"])
    assert 0 < len(done) < len(documents)
    store = DocumentStore.open(settings["store"], fingerprint=tiny_model.fingerprint)
    assert_equals_core(store, tiny_model, [d for d in documents if d.id in set(done)])
    summary = run(settings)
    assert (summary.already_there, summary.encoded) == (len(done), len(documents) - len(done))
    assert sorted(catalog(settings["store"])) == [d.id for d in documents]
    store.refresh()
    assert_equals_core(store, tiny_model, documents)
