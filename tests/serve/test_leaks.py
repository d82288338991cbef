"""Whatever is broken behind the service, its replies name no path, no file and no line of code."""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_service import local_app, served
from running_service import CHAT, QUESTION, add_document

from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from kvlink_core.store.local import LocalStorage

#: What no reply may have in it: places, files of ours and of the store, classes of exceptions, code.
LEAK = re.compile(
    r"/tmp|/home|/usr|\.py\b|\.parquet|\.json\b|_delta_log|shards?/|catalog/|jobs/|Traceback|File \"|line \d+|"
    r"Errno|OSError|Error:|Exception"
)


def _each(store: Path, folder: str, change: Callable[[Path], None]) -> None:
    for path in sorted((store / folder).rglob("*")):
        if path.is_file():
            change(path)


def _torn(path: Path) -> None:
    data = path.read_bytes()
    path.unlink()  # readers may have it mapped
    path.write_bytes(data[: len(data) // 2])


def _gone(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder)


def _replaced(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.write_text("x")


def _raising(*names: str) -> Callable[[Path, pytest.MonkeyPatch], None]:
    def break_it(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(self: LocalStorage, *args: object, **kwargs: object) -> Any:
            raise OSError(28, "No space left on device", f"{store}/shards/x.parquet")

        for name in names:
            monkeypatch.setattr(LocalStorage, name, fail)

    return break_it


FAULTS: dict[str, Callable[[Path, pytest.MonkeyPatch], None]] = {
    "nothing": lambda store, _: None,
    "shards torn": lambda store, _: _each(store, "shards", _torn),
    "shards gone": lambda store, _: _gone(store / "shards"),
    "shards and tokens gone": lambda store, _: _gone(store / "shards", store / "tokens"),
    "catalog torn": lambda store, _: _each(store, "catalog", _torn),
    "catalog gone": lambda store, _: _gone(store / "catalog"),
    "jobs torn": lambda store, _: _each(store, "jobs", _torn),
    "a file instead of jobs": lambda store, _: _replaced(store / "jobs"),
    "marker torn": lambda store, _: _torn(store / "store.json"),
    "store gone": lambda store, _: _gone(store),
    "disk full": _raising("publish"),
    "disk unreadable": _raising("read", "names", "entries", "tails", "open_ranges"),
    "everything fails": _raising("read", "names", "entries", "tails", "open_ranges", "publish", "remove", "now"),
}


@pytest.fixture
def service(tiny_model: LoadedModel, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    where = tmp_path / "store"
    store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    add_document(tiny_model, store, "plan", "Acme plans a bridge.")
    store.close()
    # Nothing may hide the store's faults.
    with served(local_app(tiny_model, where, **{"tiers.enabled": False, "documents.give_up_after_s": 0})) as url:
        yield url, where


def requests(job: str) -> list[tuple[str, str, Any]]:
    def ask(*documents: dict[str, Any], **fields: Any) -> dict[str, Any]:
        return {"model": "tiny", "messages": QUESTION, "documents": documents, "max_tokens": 3} | fields

    return [
        ("POST", CHAT, ask({"id": "plan"})),
        ("POST", CHAT, ask({"id": "plan"}, stream=True)),
        ("POST", CHAT, ask({"id": "nosuch"})),
        ("POST", CHAT, ask({"id": "../../etc"}, linker="/etc/passwd")),
        ("POST", CHAT, ask({"text": "Sent along."}, linker="epic:k=2")),
        ("POST", "/v1/completions", {"model": "tiny", "prompt": "x", "documents": [{"id": "plan"}], "max_tokens": 3}),
        ("GET", "/v1/documents", None),
        ("GET", "/v1/documents/plan", None),
        ("GET", "/v1/documents/nosuch", None),
        ("GET", f"/v1/jobs/{job}", None),
        ("GET", "/v1/jobs/none", None),
        ("POST", "/v1/documents", {"documents": [{"id": "new", "text": "It came late."}]}),
        ("DELETE", "/v1/documents/plan", None),
    ]


@pytest.mark.parametrize("fault", FAULTS)
def test_no_reply_names_a_path(service: tuple[str, Path], monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    url, store = service
    with httpx.Client(base_url=url, timeout=60) as client:
        first = client.post("/v1/documents", json={"documents": [{"id": "old", "text": "It was there."}]})
        job = first.json()["id"]
        while client.get(f"/v1/jobs/{job}").json()["finished_at"] is None:
            time.sleep(0.01)
        FAULTS[fault](store, monkeypatch)
        seen: dict[int, int] = {}
        for method, path, body in requests(job):
            response = client.request(method, path, json=body)
            seen[response.status_code] = seen.get(response.status_code, 0) + 1
            if response.status_code >= 400 or (body and body.get("stream")):
                said = response.text.replace(path, "")  # what was asked for may be quoted
                assert not LEAK.search(said), (method, path, said)
                assert str(store) not in said
            if method == "POST" and response.status_code == 202:
                new = client.get(f"/v1/jobs/{response.json()['id']}").text
                assert not LEAK.search(new), new
        assert seen.keys() <= {200, 202, 400, 404, 500, 503}
        if fault == "nothing":
            assert seen == {200: 8, 202: 1, 400: 1, 404: 3}
        monkeypatch.undo()
