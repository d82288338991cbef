"""A pruned store from end to end: precompute's actor writes it, sessions and the service answer from it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from command import Kvlink

from kvlink_core.compress import get_codec, pruning_of
from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.engine.generate import Generation
from kvlink_core.errors import PrunedCacheError
from kvlink_core.linking import get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.models.describe import describe_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, DocumentCache, DocumentRef, Message
from pipeline.stages import EncoderSettings, ShardEncoder, row_from_json
from pipeline.tables import SCAN_SCHEMA
from serve.config import ServiceConfig
from serve.loading import open_namespaces

TEXTS = {"a": "Maria Lopez was born in Lima.", "b": "She lives in Oslo now.", "c": "!"}
ASK = [Message("user", "Where does she live?")]
GREEDY = SamplingParams(max_tokens=6)


def precompute(tmp_path: Path, model_dir: Path, model: LoadedModel, codec: str) -> str:
    """The store that an actor of precompute makes of ``TEXTS``."""
    url = str(tmp_path / "store")
    store = DocumentStore.open(url, fingerprint=model.fingerprint, create=True, codec=codec)
    rows = []
    for name, text in TEXTS.items():
        ids = model.layout.document_tokens(Document(name, text))
        rows.append({"chunk_id": name, "tokens": len(ids), "token_ids": np.array(ids, "<u4").tobytes()})
    settings = EncoderSettings(
        model=str(model_dir), device="cpu", dtype=None, fingerprint=describe_model(str(model_dir)).fingerprint.digest,
        store=url, namespace="default", codec=codec, storage_options={}, max_batch_tokens=256, shard_tokens=400,
        threads=None,
    )  # fmt: skip
    table = pa.Table.from_pylist(rows, schema=SCAN_SCHEMA)
    results = ShardEncoder(settings)(table).to_pylist()
    assert [r["reason"] for r in results] == [None] * len(TEXTS)
    store.commit([row_from_json(r["catalog"]) for r in results])
    store.close()
    return url


@pytest.mark.parametrize("scorer", ["random", "knorm", "compactor", "expected-attention", "repeat"])
def test_from_precompute_to_an_answer(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: LoadedModel, scorer: str
) -> None:
    spec = f"int4:keep=0.5,scorer={scorer}"
    url = precompute(tmp_path, tiny_model_dir, tiny_model, spec)
    codec = get_codec(spec)
    tokens = [tiny_model.layout.document_tokens(Document(n, t)) for n, t in TEXTS.items()]
    encoder = DocumentEncoder(tiny_model, prune=pruning_of(codec))
    expected = [codec.decode(codec.encode(cache)) for cache in encoder.encode(tokens)]
    store = DocumentStore.open(url, fingerprint=tiny_model.fingerprint, codec=spec)
    stored = store.load(list(store.lookup(TEXTS).values()))
    for found, mine in zip(stored, expected, strict=True):
        assert isinstance(found, DocumentCache)
        assert (found.kept is None) == (mine.kept is None)
        assert found.kept is None or torch.equal(found.kept, mine.kept)  # type: ignore[arg-type]
        torch.testing.assert_close(found.keys, mine.keys, rtol=1e-3, atol=1e-3)

    request = AnswerRequest(ASK, [DocumentRef(n) for n in TEXTS], "link-tokens", GREEDY)
    session = Session(tiny_model, store)
    answer = session.start(request)
    linker = get_linker("link-tokens")
    prompt = tiny_model.layout.build(ASK, tokens, links=linker.links(tiny_model.layout))
    linked = linker.link(tiny_model, prompt, expected, reserve=GREEDY.max_tokens)
    events = list(Generation(linked, GREEDY, max_tokens=GREEDY.max_tokens, stop_ids=tiny_model.stop_ids))
    assert answer.text() == "".join(e.text for e in events)
    assert [d.origin for d in answer.documents] == ["store"] * 3
    assert [d.tokens for d in answer.documents] == [len(t) for t in tokens]
    assert session.counters.corrupt_payloads == 0
    with pytest.raises(PrunedCacheError, match="reposition"):
        session.start(AnswerRequest(ASK, [DocumentRef("a")], "epic", GREEDY))
    # Computed in place a document is whole, and stands beside pruned ones.
    mixed = [DocumentRef("a"), Document("new", "Sent along."), DocumentRef("b")]
    assert [d.origin for d in session.start(AnswerRequest(ASK, mixed)).documents] == ["store", "encoded", "store"]


def test_the_service_and_the_commands_take_it(
    tmp_path: Path, tiny_model_dir: Path, tiny_model: LoadedModel, kvlink: Kvlink
) -> None:
    spec = "int4:keep=0.25,scorer=knorm"
    url = precompute(tmp_path, tiny_model_dir, tiny_model, spec)
    settings = ServiceConfig.model_validate(
        {"store": url, "model": str(tiny_model_dir), "codec": spec, "tiers": {"recompute": "never"}}
    )
    request = AnswerRequest(ASK, [DocumentRef("a"), DocumentRef("b")], "reposition", GREEDY)
    ours = Session(tiny_model, DocumentStore.open(url, fingerprint=tiny_model.fingerprint, codec=spec)).start(request)
    with open_namespaces(settings, tiny_model).use("default") as opened:
        served = opened.session.start(request)
        assert [d.origin for d in served.documents] == ["store", "store"]
        assert served.text() == ours.text()

    asked = kvlink(
        "ask", "Where?", "--store", url, "--model", str(tiny_model_dir), "--codec", spec, "-i", "a", "--linker",
        "reposition",
    )  # fmt: skip
    assert asked.returncode == 0
    shown = kvlink("store", "inspect", url, "a")
    assert "keep=0.25" in " ".join(shown.stdout.split())
    assert "sound: read and checked" in shown.stdout
    assert kvlink("store", "verify", url).returncode == 0
    assert kvlink("store", "rebuild", url, "--yes").returncode == 0
    assert kvlink("store", "compact", url, "--yes").returncode == 0
    assert kvlink("store", "export", url, str(tmp_path / "plain")).returncode == 0
    names = {json.loads(p.read_text())["document_id"] for p in (tmp_path / "plain").glob("?-*.json")}
    assert names == set(TEXTS)
