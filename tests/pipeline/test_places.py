"""A document template that names the place: each chunk is stored once for each of the first places."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import SamplingParams
from kvlink_core.errors import ConfigError, DocumentPlaceError
from kvlink_core.models import LoadedModel, load_model
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.template import DocumentTemplate
from kvlink_core.types import DocumentRef, Message
from pipeline.job import check_places
from pipeline.plan import Planner
from pipeline.stages import encode_shard, key_rows, row_from_json
from pipeline.summary import Summary
from pipeline.tables import READ_SCHEMA

PLACED = {"document_template": "[{place+1}] {text}", "titled_document_template": "[{place+1}] {title}: {text}"}


@pytest.fixture(scope="module")
def directory(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    copy = Path(shutil.copytree(tiny_model_dir, tmp_path_factory.mktemp("placed") / "model"))
    layout = json.loads((copy / "kvlink.json").read_text())
    (copy / "kvlink.json").write_text(json.dumps(layout | PLACED))
    return copy


@pytest.fixture(scope="module")
def model(directory: Path) -> LoadedModel:
    return load_model(str(directory))


def keyed(directory: Path, texts: dict[str, str], *, places: int | None = 3, limit: int = 64) -> list[dict[str, Any]]:
    rows = [{"outcome": "ok", "place": f"f:{i}", "document_id": i, "text": t} for i, t in texts.items()]
    table = pa.Table.from_pylist(rows, schema=READ_SCHEMA)
    return list(key_rows(table, model=str(directory), limit=limit, places=places).to_pylist())


def planned(rows: list[dict[str, Any]], store: DocumentStore, places: int = 3) -> tuple[set[str], Summary]:
    planner = Planner(summary := Summary(), places=places)
    planner.add(rows)
    planner.check(bad_files="fail", title_column=None)
    return {piece.id for piece in planner.plan(store, codec="raw").encode.values()}, summary


def test_each_chunk_comes_once_for_each_place_and_is_cut_alike_at_all(directory: Path, model: LoadedModel) -> None:
    rows = keyed(directory, {"a": "Short.", "b": "One sentence here. " * 4}, places=12, limit=45)
    assert [r["chunk_id"] for r in rows[:12]] == [f"a@{place}" for place in range(12)]
    assert [r["chunk_id"] for r in rows[12:]] == [f"b#{chunk}@{place}" for chunk in range(2) for place in range(12)]
    assert model.layout.decode(np.frombuffer(rows[11]["token_ids"], "<u4").tolist()) == "[12] Short."
    assert max(r["tokens"] for r in rows) <= 45
    assert len({r["ticket"] for r in rows}) == len(rows)


def test_what_is_stored_for_a_place_is_served_there_by_id(directory: Path, model: LoadedModel, tmp_path: Path) -> None:
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=model.fingerprint, create=True)
    rows = keyed(directory, {"a": "Maria is in Lima.", "b": "She moved."}, places=2)
    assert planned(rows, store, 2)[0] == {"a@0", "a@1", "b@0", "b@1"}
    stored = encode_shard(DocumentEncoder(model), store, rows)
    store.commit([row_from_json(r["catalog"]) for r in stored])
    done, summary = planned(rows, store, 2)
    assert (done, summary.already_there, summary.documents, summary.chunks) == (set(), 4, 2, 4)
    session = Session(model, store)
    ask = [Message("user", "?")]
    for order in ("ab", "ba"):
        documents = [DocumentRef(i) for i in order]
        answer = session.start(AnswerRequest(ask, documents, "reposition", SamplingParams(max_tokens=1)))
        assert [d.origin for d in answer.documents] == ["store", "store"]
    with pytest.raises(DocumentPlaceError, match="'a' is not stored for place 2"):
        session.start(AnswerRequest(ask, [DocumentRef(i) for i in "aba"]))


def test_former_chunks_are_found_at_their_places(directory: Path, model: LoadedModel, tmp_path: Path) -> None:
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=model.fingerprint, create=True)
    former = keyed(directory, {"grown": "Short.", "shrunk": "One sentence here. " * 8, "same": "Same."}, limit=45)
    store.commit([row_from_json(r["catalog"]) for r in encode_shard(DocumentEncoder(model), store, former)])
    now = keyed(directory, {"grown": "One sentence here. " * 4, "shrunk": "Two sentences. Here. " * 3, "same": "Same."},
                limit=45)  # fmt: skip
    _, summary = planned(now, store)
    chunks = {r["chunk_id"] for r in former} - {r["chunk_id"] for r in now}
    assert chunks > {f"grown@{place}" for place in range(3)}
    assert summary.stale == sorted(chunks)


@pytest.mark.parametrize(
    ("places", "template", "says"),
    [
        (None, DocumentTemplate("{place} {text}", "{title} {text}"), "--places N stores each document N times"),
        (3, DocumentTemplate(), "one cache is good for all places. Leave it out"),
    ],
)
def test_places_are_asked_for_exactly_where_the_template_names_them(
    places: int | None, template: DocumentTemplate, says: str
) -> None:
    with pytest.raises(ConfigError, match=says):
        check_places(places, template)
    check_places(None if places else 3, template)
