"""The work of tasks and actors, without Ray."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.errors import CorpusError, EmptyDocumentError
from kvlink_core.models import LoadedModel
from kvlink_core.models.describe import describe_model
from kvlink_core.store import CatalogRow, DocumentStore
from kvlink_core.types import Document, DocumentCache
from pipeline.reading import Columns
from pipeline.sources import find_files
from pipeline.stages import EncoderSettings, ShardEncoder, cut_shards, encode_shard, key_rows, row_from_json
from pipeline.tables import READ_SCHEMA, RESULT_SCHEMA, SCAN_SCHEMA, read_files, select_rows


def scan(tmp_path: Path, model_dir: Path, rows: Sequence[Any], *, limit: int = 64) -> list[dict[str, Any]]:
    path = tmp_path / "c.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    files = pa.Table.from_pylist([asdict(f) for f in find_files([str(path)]).files])
    read = pa.concat_tables(read_files(files, columns=Columns(), options={}, rows_per_block=2))
    assert read.schema == READ_SCHEMA
    keyed = key_rows(read, model=str(model_dir), limit=limit)
    assert keyed.schema == SCAN_SCHEMA
    return keyed.to_pylist()


def test_documents_are_tokenized_as_the_layout_does(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: LoadedModel
) -> None:
    rows = scan(tmp_path, tiny_model_dir, [{"id": "a", "text": "One."}, {"id": "b", "text": "Two.", "title": "T"}])
    expected = [
        tiny_model.layout.document_tokens(Document("a", "One.")),
        tiny_model.layout.document_tokens(Document("b", "Two.", "T")),
    ]
    assert [np.frombuffer(r["token_ids"], "<u4").tolist() for r in rows] == expected
    assert [(r["chunk_id"], r["tokens"], r["titled"]) for r in rows] == [("a", 7, False), ("b", 10, True)]


def test_long_documents_become_chunks_within_the_limit_title_included(tmp_path: Path, tiny_model_dir: Path) -> None:
    text = "This is a sentence. " * 10
    rows = scan(tmp_path, tiny_model_dir, [{"id": "a", "text": text, "title": "T"}], limit=50)
    assert [r["chunk_id"] for r in rows] == [f"a#{i}" for i in range(5)]
    assert all(r["tokens"] <= 50 for r in rows)
    assert {r["document_id"] for r in rows} == {"a"}
    assert len({r["ticket"] for r in rows}) == 5


def test_bad_rows_and_documents_travel_as_rows_with_reasons(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = scan(
        tmp_path,
        tiny_model_dir,
        [
            {"id": "a"},
            {"id": "b", "text": "Fine. But long", "title": "t" * 99},
            {"id": "c", "text": "Good."},
            {"id": "d" * 5000, "text": "Good."},
        ],
    )
    assert [(r["document_id"], r["outcome"], r["code"]) for r in rows] == [
        ("a", "bad-row", "no_text"),
        ("b", "bad-row", "invalid_corpus"),
        ("c", "ok", None),
        ("d" * 5000, "bad-row", "invalid_id"),
    ]
    assert "no room for text" in rows[1]["reason"]


def test_a_bad_file_is_a_row_and_the_next_file_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.parquet").write_bytes(b"no")
    (tmp_path / "b.txt").write_text("yes")
    files = pa.Table.from_pylist([asdict(f) for f in find_files([str(tmp_path)]).files])
    rows = pa.concat_tables(read_files(files, columns=Columns(), options={})).to_pylist()
    assert [(r["outcome"], r["document_id"]) for r in rows] == [("bad-file", None), ("ok", "b.txt")]


def test_select_keeps_exactly_the_tickets(tmp_path: Path, tiny_model_dir: Path) -> None:
    rows = scan(tmp_path, tiny_model_dir, [{"id": str(i), "text": f"Text {i}."} if i != 3 else {} for i in range(20)])
    wanted = [r for r in rows if r["chunk_id"] in {"0", "7", "19"}]
    tickets = np.array(sorted(r["ticket"] for r in wanted), dtype="S16")
    table = pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)
    assert select_rows(table, tickets=tickets)["chunk_id"].to_pylist() == ["0", "7", "19"]
    assert select_rows(table.slice(1, 1), tickets=tickets).num_rows == 0
    assert select_rows(table.slice(0, 0), tickets=tickets).num_rows == 0


def test_shards_are_cut_by_tokens() -> None:
    shards = cut_shards([{"tokens": t} for t in (3, 3, 4, 11, 1)], 10)
    assert [[r["tokens"] for r in s] for s in shards] == [[3, 3, 4], [11], [1]]
    assert list(cut_shards([], 10)) == []


@pytest.fixture
def settings(tmp_path: Path, tiny_model_dir: Path) -> EncoderSettings:
    description = describe_model(str(tiny_model_dir))
    url = str(tmp_path / "store")
    DocumentStore.open(url, fingerprint=description.fingerprint, create=True)
    return EncoderSettings(
        model=str(tiny_model_dir),
        device="cpu",
        dtype=None,
        fingerprint=description.fingerprint.digest,
        store=url,
        namespace="default",
        codec="raw",
        storage_options={},
        max_batch_tokens=256,
        shard_tokens=40,
        threads=None,
    )


def test_an_actor_stores_what_the_core_computes_and_returns_small_rows(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: LoadedModel, settings: EncoderSettings
) -> None:
    rows = scan(tmp_path, tiny_model_dir, [{"id": str(i), "text": f"Document number {i}." * (i + 1)} for i in range(8)])
    results = ShardEncoder(settings)(pa.Table.from_pylist(rows, schema=SCAN_SCHEMA))
    assert results.schema == RESULT_SCHEMA
    catalog = [row_from_json(r) for r in results["catalog"].to_pylist()]
    assert [r.document_id for r in catalog] == [r["chunk_id"] for r in rows]
    assert len({r.shard for r in catalog}) > 1  # twice 40 tokens is less than all of it
    store = DocumentStore.open(settings.store, fingerprint=tiny_model.fingerprint)
    assert store.lookup([r.document_id for r in catalog]) == {}  # invisible until committed
    tokens = [np.frombuffer(r["token_ids"], "<u4").tolist() for r in rows]
    for stored, mine in zip(store.load(catalog), DocumentEncoder(tiny_model).encode(tokens), strict=True):
        assert isinstance(stored, DocumentCache)
        assert torch.equal(stored.token_ids, mine.token_ids)
        torch.testing.assert_close(stored.keys, mine.keys, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(stored.values, mine.values, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "code", "says"),
    [
        ({"fingerprint": "0" * 64}, "invalid_config", "fingerprint differs. Give all nodes the same files"),
        ({"model": "/nowhere"}, "model_not_found", "no model at '/nowhere'"),
        ({"store": "/nowhere"}, "store_not_found", "/nowhere"),
    ],
)
def test_an_actor_that_cannot_start_says_so_in_rows(
    settings: EncoderSettings, change: dict[str, Any], code: str, says: str
) -> None:
    rows = [{"chunk_id": c, "tokens": 1, "token_ids": b"\1\0\0\0", "token_digest": c} for c in "ab"]
    results = ShardEncoder(replace(settings, **change))(pa.Table.from_pylist(rows)).to_pylist()
    assert [(r["chunk_id"], r["fatal"], r["code"], r["catalog"]) for r in results] == [
        ("a", True, code, None),
        ("b", True, code, None),
    ]
    assert says in results[0]["reason"]


def test_a_node_without_the_model_says_so(tmp_path: Path) -> None:
    (row,) = scan(tmp_path, Path("/nowhere"), [{"text": "A."}, {"text": "B."}])
    assert (row["outcome"], row["code"]) == ("fatal", "model_not_found")


class PickyEncoder:
    """Chokes on documents that begin with a given token."""

    def __init__(self, encoder: DocumentEncoder, poison: set[int]) -> None:
        self._encoder, self._poison = encoder, poison

    def encode(self, documents: Sequence[Sequence[int]]) -> list[DocumentCache]:
        if any(d[0] in self._poison for d in documents):
            raise RuntimeError("out of\nluck")
        return self._encoder.encode(documents)


def test_one_bad_document_fails_alone(tiny_model: LoadedModel, settings: EncoderSettings) -> None:
    store = DocumentStore.open(settings.store, fingerprint=tiny_model.fingerprint)
    token_lists = [[1, 2], [99, 2], [], [4, 5, 6]]
    rows = [
        {"chunk_id": str(i), "token_digest": "d", "tokens": len(t), "token_ids": np.array(t, "<u4").tobytes()}
        for i, t in enumerate(token_lists)
    ]

    class Encoder(PickyEncoder):
        def encode(self, documents: Sequence[Sequence[int]]) -> list[DocumentCache]:
            if [] in documents:
                raise EmptyDocumentError("no tokens")
            return super().encode(documents)

    results = encode_shard(Encoder(DocumentEncoder(tiny_model), {99}), store, rows)  # type: ignore[arg-type]
    assert [r.get("code") for r in results] == [None, "encode_error", "empty_document", None]
    assert results[1]["reason"] == "out of luck"
    assert [row_from_json(r["catalog"]).document_id for r in results if "catalog" in r] == ["0", "3"]


def test_when_nothing_works_any_more_the_job_stops(tiny_model: LoadedModel, settings: EncoderSettings) -> None:
    store = DocumentStore.open(settings.store, fingerprint=tiny_model.fingerprint)
    rows = [{"chunk_id": c, "tokens": 1, "token_ids": b"\x63\0\0\0", "token_digest": c} for c in "ab"]
    with pytest.raises(RuntimeError, match="out of"):
        encode_shard(PickyEncoder(DocumentEncoder(tiny_model), {99}), store, rows)  # type: ignore[arg-type]


def test_a_document_that_the_store_refuses_fails_alone(
    tiny_model: LoadedModel, settings: EncoderSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = DocumentStore.open(settings.store, fingerprint=tiny_model.fingerprint)
    write_shard = store.write_shard

    def refuse(entries: Sequence[tuple[str, DocumentCache]]) -> list[CatalogRow]:
        if any(document_id == "b" for document_id, _ in entries):
            raise CorpusError("too large")
        return write_shard(entries)

    monkeypatch.setattr(store, "write_shard", refuse)
    rows = [
        {"chunk_id": c, "tokens": 1, "token_ids": np.array([i], "<u4").tobytes(), "token_digest": c}
        for i, c in enumerate("abc")
    ]
    results = encode_shard(DocumentEncoder(tiny_model), store, rows)
    assert [r.get("reason") for r in results] == [None, "too large", None]
    assert [row_from_json(r["catalog"]).document_id for r in results if "catalog" in r] == ["a", "c"]
