"""Documents at run time: added behind the request, listed, replaced, dropped. Real HTTP and store, no Ray."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pyarrow as pa
import pytest
from local_service import local_app, served
from running_service import CHAT, QUESTION

from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import StoreKeeper
from kvlink_core.types import Document, Message
from serve.documents import DocumentService
from serve.listing import Listing
from serve.settings import DocumentSettings
from serve.wire import ApiError, ApiException, Job, JobDocument, ModelCard, NewDocument

LONG = " ".join(f"Sentence number {n} of this long document." for n in range(20))


@dataclass(frozen=True)
class Api:
    url: str
    model: LoadedModel

    def call(self, method: str, path: str, **request: Any) -> httpx.Response:
        return httpx.request(method, f"{self.url}/v1{path}", timeout=60, **request)

    def add(self, *documents: dict[str, Any]) -> dict[str, Any]:
        """Add documents and wait for the end of the job."""
        response = self.call("POST", "/documents", json={"documents": documents})
        assert response.status_code == 202
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            job: dict[str, Any] = self.call("GET", f"/jobs/{response.json()['id']}").json()
            if job["finished_at"]:
                return job
            time.sleep(0.02)
        pytest.fail("the job did not end")

    def ids(self, **query: Any) -> list[str]:
        return [d["id"] for d in self.call("GET", "/documents", params=query).json()["data"]]

    def ask(self, *ids: str) -> httpx.Response:
        body = {"model": "tiny", "messages": QUESTION, "documents": [{"id": i} for i in ids], "max_tokens": 8}
        deadline = time.monotonic() + 10
        while (response := self.call("POST", CHAT.removeprefix("/v1"), json=body)).status_code == 404:
            assert time.monotonic() < deadline, response.text
            time.sleep(0.1)  # replicas look for what is new once a second
        return response

    def expected(self, *texts: str) -> str:
        request = AnswerRequest(
            [Message("user", QUESTION[0]["content"])],
            [Document("", text) for text in texts],
            sampling=SamplingParams(max_tokens=8),
        )
        return Session(self.model).start(request).text()


@pytest.fixture(scope="module")
def api(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Api]:
    settings = {"engine.chunk_tokens": 200, "ingress.max_document_bytes": 5000}
    with served(local_app(tiny_model, tmp_path_factory.mktemp("documents") / "store", **settings)) as url:
        yield Api(url, tiny_model)


def test_a_document_is_added_found_asked_replaced_and_dropped(api: Api) -> None:
    job = api.add({"id": "a/b c", "text": "The mill stands by the river.", "title": None})
    assert (job["status"], job["documents"][0]["status"]) == ("done", "done")
    (part,) = job["documents"][0]["parts"]
    found = api.call("GET", "/documents/a%2Fb%20c").json()
    assert (found["id"], found["tokens"], found["bytes"], found["chunks"]) == (
        "a/b c",
        part["tokens"],
        part["bytes"],
        1,
    )
    assert found["tokens"] == len(api.model.layout.document_tokens(Document("", "The mill stands by the river.")))
    reply = api.ask("a/b c").json()
    assert reply["choices"][0]["message"]["content"] == api.expected("The mill stands by the river.")
    assert reply["usage"]["prompt_tokens_details"]["cached_tokens"] == found["tokens"]

    assert api.call("GET", "/documents/a%2Fb%20c").json()["tiers"] == ["host", "store"]

    assert api.add({"id": "a/b c", "text": "The mill has burnt down."})["status"] == "done"
    deadline = time.monotonic() + 10
    while api.ask("a/b c").json()["choices"][0]["message"]["content"] != api.expected("The mill has burnt down."):
        assert time.monotonic() < deadline
        time.sleep(0.1)

    dropped = api.call("DELETE", "/documents/a%2Fb%20c")
    assert dropped.json() == {"id": "a/b c", "object": "document.deleted", "deleted": True}
    assert api.call("GET", "/documents/a%2Fb%20c").status_code == 404
    assert api.call("DELETE", "/documents/a%2Fb%20c").status_code == 404


def test_a_long_document_is_cut_as_precompute_does_and_dropped_whole(api: Api) -> None:
    job = api.add({"id": "long", "text": LONG}, {"id": "long#77", "text": "Of its own."})
    parts = [part["id"] for part in job["documents"][0]["parts"]]
    assert parts == [f"long#{n}" for n in range(len(parts))]
    assert len(parts) > 2
    found = api.call("GET", "/documents/long").json()
    assert found["chunks"] == len(parts)
    assert found["tokens"] == sum(part["tokens"] for part in job["documents"][0]["parts"])
    assert api.ask("long#0", "long#1").status_code == 200

    # A shorter version leaves no chunk of the longer one behind.
    api.add({"id": "long", "text": "Short now."})
    assert api.ids(prefix="long") == ["long", "long#77"]
    api.add({"id": "long", "text": LONG})
    assert api.call("DELETE", "/documents/long").status_code == 200
    assert api.ids(prefix="long") == ["long#77"]


def test_what_is_the_same_is_not_computed_again(api: Api) -> None:
    text = "Said twice."
    first = api.add({"id": "one", "text": text})["documents"][0]["parts"]
    second = api.add({"id": "two", "text": text}, {"id": "one", "text": text})
    assert [d["parts"][0]["tokens"] for d in second["documents"]] == [first[0]["tokens"]] * 2
    assert {"one", "two"} <= set(api.ids())


def test_pages(api: Api) -> None:
    names = [f"page-{n:02}" for n in range(7)] + ["page-ä", "page-\U0001f600"]
    api.add(*({"id": name, "text": f"Text of {name}."} for name in reversed(names)))
    seen: list[str] = []
    after = ""
    while True:
        page = api.call("GET", "/documents", params={"prefix": "page-", "limit": 4, "after": after}).json()
        seen += [d["id"] for d in page["data"]]
        after = page["last_id"]
        if not page["has_more"]:
            break
    assert seen == sorted(names)
    assert api.ids(prefix="page-", after="page-05") == sorted(names)[6:]
    assert api.ids(prefix="zzz") == []


@pytest.mark.parametrize(
    ("documents", "code", "param"),
    [
        ([], "invalid_value", "documents"),
        ([{"id": "a"}], "missing_parameter", "documents[0].text"),
        ([{"text": "x"}], "missing_parameter", "documents[0].id"),
        ([{"id": "", "text": "x"}], "invalid_value", "documents[0].id"),
        ([{"id": "a" * 1001, "text": "x"}], "invalid_value", "documents[0].id"),
        ([{"id": "a", "text": " "}], "empty_document", "documents[0]"),
        ([{"id": "a", "text": "x"}, {"id": "a", "text": "y"}], "duplicate_document", None),
        ([{"id": "a", "text": "x" * 5001}], "invalid_value", "documents[0].text"),
        ([{"id": str(n), "text": "x"} for n in range(65)], "invalid_value", "documents"),
        ([{"id": "a", "text": "x", "path": "/etc/passwd"}], "unknown_parameter", "documents[0].path"),
    ],
)
def test_what_cannot_be_added_is_refused_at_once(api: Api, documents: list[Any], code: str, param: str | None) -> None:
    response = api.call("POST", "/documents", json={"documents": documents})
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, code, param)


def test_one_bad_document_fails_alone(api: Api) -> None:
    title = "t" * 600  # longer than a chunk may be
    job = api.add({"id": "good", "text": "Sound."}, {"id": "bad", "text": "x", "title": title})
    assert job["status"] == "failed"
    good, bad = job["documents"]
    assert (good["status"], bad["status"]) == ("done", "failed")
    assert bad["error"]["code"] == "invalid_corpus"
    assert "good" in api.ids()
    assert "bad" not in api.ids()


# The deployment alone, on an engine that can be held up or away.


class Encoders:
    def __init__(self) -> None:
        self.asked: list[tuple[str, list[str]]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.faults: list[ApiError] = []

    async def card(self) -> ModelCard:
        return ModelCard("m", 0, 100, "ab" * 32, ("full",), "full")

    async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        await self.go.wait()
        self.asked.append((namespace, [d.id for d in documents]))
        if self.faults:
            raise ApiException(self.faults.pop())
        return tuple(JobDocument(d.id, "done") for d in documents)

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...]:
        raise ApiException(ApiError(503, "away", "engine_unavailable"))


def run(tmp_path: Path, model: LoadedModel, work: Any, **settings: Any) -> Encoders:
    async def go() -> Encoders:
        DocumentStore.open(str(tmp_path / "s"), fingerprint=model.fingerprint, create=True).close()
        engine = Encoders()
        service = DocumentService(engine, lambda: StoreKeeper.open(str(tmp_path / "s")), DocumentSettings(**settings))
        await work(service, engine)
        return engine

    return asyncio.run(go())


async def ended(service: DocumentService, job: Job | ApiError) -> Job:
    assert isinstance(job, Job)
    while True:
        now = await service.job("n", job.id)
        assert isinstance(now, Job)
        if now.finished_at is not None:
            return now
        await asyncio.sleep(0.01)


def test_a_store_that_is_away_is_tried_again(
    tmp_path: Path, tiny_model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serve.job_queue._WAITS_S", (0.0,))
    away = ApiError(503, "away", "store_unavailable")

    async def patient(service: DocumentService, engine: Encoders) -> None:
        engine.faults = [away] * 9
        assert (await ended(service, await service.add("n", [NewDocument("a", "x")]))).status == "done"

    async def hasty(service: DocumentService, engine: Encoders) -> None:
        engine.faults = [away, away]
        job = await ended(service, await service.add("n", [NewDocument("a", "x")]))
        assert job.status == "failed"
        assert job.documents[0].error == away

    assert len(run(tmp_path, tiny_model, patient).asked) == 10
    assert len(run(tmp_path, tiny_model, hasty, give_up_after_s=0).asked) == 1


def test_what_waits_is_bounded_and_a_deleted_document_does_not_come_back(
    tmp_path: Path, tiny_model: LoadedModel
) -> None:
    async def work(service: DocumentService, engine: Encoders) -> None:
        engine.go.clear()
        first = await service.add("n", [NewDocument(f"{n}", "x" * 100_000) for n in range(12)])
        second = await service.add("n", [NewDocument("late", "x" * 100)])
        full = await service.add("n", [NewDocument("more", "x" * 1_000_000)])
        assert isinstance(full, ApiError)
        assert (full.status, full.code) == (503, "overloaded")
        await asyncio.sleep(0.05)  # the first batch is on its way, the rest waits
        deleting = asyncio.create_task(service.delete("n", "late"))
        await asyncio.sleep(0.05)
        engine.go.set()
        assert not isinstance(await deleting, ApiError)
        assert (await ended(service, first)).status == "done"
        late = await ended(service, second)
        assert late.documents[0].error is not None
        assert late.documents[0].error.code == "document_deleted"
        assert not isinstance(await service.add("n", [NewDocument("again", "x" * 1_000_000)]), ApiError)

    engine = run(tmp_path, tiny_model, work, max_pending_bytes=2_000_000)
    assert "late" not in [i for _, ids in engine.asked for i in ids]


def test_finished_jobs_are_forgotten(tmp_path: Path, tiny_model: LoadedModel) -> None:
    async def work(service: DocumentService, engine: Encoders) -> None:
        jobs = []
        for n in range(4):
            job = await service.add("n", [NewDocument(f"{n}", "x")])
            assert isinstance(job, Job)
            await ended(service, job)
            jobs.append(job.id)
        known = [isinstance(await service.job("n", job), Job) for job in jobs]
        assert known == [False, False, True, True]

    run(tmp_path, tiny_model, work, max_jobs=2)


def test_places_are_one_document() -> None:
    rows = [
        (f"{name}@{place}", 10 + place, 100, 1_700_000_000_000_000)
        for name in ("a", "b#0", "b#1")
        for place in range(3)
    ]
    names = ["document_id", "tokens", "nbytes", "created_at"]
    table = pa.table({n: list(column) for n, column in zip(names, zip(*rows, strict=True), strict=True)})
    table = table.set_column(3, "created_at", table["created_at"].cast(pa.timestamp("us", "UTC")))
    listing = Listing(table, by_place=True)
    page = listing.page(after="", prefix="", limit=10)
    assert [(d.id, d.tokens, d.places) for d in page.documents] == [("a", 10, 3), ("b#0", 10, 3), ("b#1", 10, 3)]
    assert not page.has_more
    assert [d.id for d in listing.page(after="a", prefix="", limit=1).documents] == ["b#0"]
    found = listing.find("b")
    assert found is not None
    assert (found.chunks, found.tokens, found.places) == (2, 20, 3)
    assert listing.stored_ids("b") == [f"b#{n}@{place}" for n in range(2) for place in range(3)]
    assert listing.find("c") is None
