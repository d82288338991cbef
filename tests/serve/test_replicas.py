"""Two replicas: documents go where they are hot, a dead replica loses no request, a cut stream says so."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from running_service import CHAT, QUESTION, Service, add_document, deploy

from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, Message
from serve.keys import create_key

pytestmark = pytest.mark.ray

TEXTS = {f"doc{n}": f"The mill number {n} stands by the river." for n in range(8)}
APP = "two"


@dataclass(frozen=True)
class Two:
    url: str
    model: LoadedModel
    key: str

    @property
    def headers(self) -> dict[str, str]:
        return {"authorization": f"Bearer {self.key}"}

    def body(self, *ids: str, **fields: Any) -> dict[str, Any]:
        documents = [{"id": i} for i in ids]
        return {"model": "tiny", "messages": QUESTION, "documents": documents, "max_tokens": 40} | fields

    def ask(self, *ids: str, **fields: Any) -> httpx.Response:
        return httpx.post(self.url + CHAT, json=self.body(*ids, **fields), headers=self.headers, timeout=120)

    def expected(self, *ids: str, max_tokens: int = 40) -> str:
        request = AnswerRequest(
            [Message("user", QUESTION[0]["content"])],
            [Document("", TEXTS[i]) for i in ids],
            sampling=SamplingParams(max_tokens=max_tokens),
        )
        return Session(self.model).start(request).text()

    def replicas(self, deployment: str = "engine") -> list[psutil.Process]:
        """Processes of a deployment's replicas."""
        found = []
        for process in psutil.process_iter(["cmdline"]):
            line = " ".join(process.info["cmdline"] or ())
            if line.startswith(f"ray::ServeReplica:{APP}:{deployment}"):
                found.append(process)
        return sorted(found, key=lambda p: p.pid)

    def wait_for_two(self) -> list[psutil.Process]:
        from ray import serve

        deadline = time.monotonic() + 90
        while time.monotonic() < deadline:
            states = serve.status().applications[APP].deployments["engine"].replica_states
            if states.get("RUNNING") == 2 and len(states) == 1 and len(found := self.replicas()) == 2:
                return found
            time.sleep(0.2)
        pytest.fail(f"not two replicas: {states}")


@pytest.fixture(scope="module")
def two(
    service: Service, tiny_model: LoadedModel, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Two]:
    """A second application beside that of the other tests, below a prefix, with keys."""
    from ray import serve

    folder = tmp_path_factory.mktemp("two")
    store = DocumentStore.open(str(folder / "store"), fingerprint=tiny_model.fingerprint, namespace="acme", create=True)
    for name, text in TEXTS.items():
        add_document(tiny_model, store, name, text)
    store.close()
    _, key = create_key(folder / "keys.json", namespace="acme", role="admin")
    deploy(
        APP,
        "/two",
        {
            "store": str(folder / "store"),
            "model": str(tiny_model_dir),
            "keys": str(folder / "keys.json"),
            "tiers.recompute": "never",
            "tiers.host_bytes": "64MiB",
            "engine.num_cpus": "0.5",
            "engine.max_running": "8",
            "engine.max_waiting": "64",
            "engine.autoscaling.min_replicas": "2",
            "engine.autoscaling.max_replicas": "2",
        },
    )
    running = Two(f"{service.url}/two", tiny_model, key)
    running.wait_for_two()
    yield running
    serve.delete(APP)


def test_below_a_prefix_the_keys_count_as_well(two: Two) -> None:
    assert httpx.get(f"{two.url}/v1/models", timeout=60).status_code == 401
    assert httpx.get(f"{two.url}/v1/models", headers=two.headers, timeout=60).status_code == 200
    assert httpx.get(f"{two.url}/healthz", timeout=60).status_code == 200


def test_documents_are_added_through_the_deployments(two: Two) -> None:
    body = {"documents": [{"id": "new", "text": "It came late."}]}
    job = httpx.post(f"{two.url}/v1/documents", json=body, headers=two.headers, timeout=60).json()
    deadline = time.monotonic() + 60
    while job["status"] not in ("done", "failed") and time.monotonic() < deadline:
        time.sleep(0.1)
        job = httpx.get(f"{two.url}/v1/jobs/{job['id']}", headers=two.headers, timeout=60).json()
    assert job["status"] == "done"
    page = httpx.get(f"{two.url}/v1/documents", headers=two.headers, timeout=60).json()
    assert {d["id"] for d in page["data"]} == {*TEXTS, "new"}
    assert httpx.delete(f"{two.url}/v1/documents/new", headers=two.headers, timeout=60).status_code == 200


def test_a_set_of_documents_goes_to_one_replica(two: Two) -> None:
    def shares(*ids: str) -> list[float]:
        """Which share of the work each replica did."""
        processes = two.replicas()
        before = [sum(p.cpu_times()[:2]) for p in processes]
        for _ in range(4):
            assert two.ask(*ids, max_tokens=120).status_code == 200
        spent = [sum(p.cpu_times()[:2]) - b for p, b in zip(processes, before, strict=True)]
        return [s / sum(spent) for s in spent]

    # By chance alone: 1 in 8 for each of them.
    for ids in (["doc0"], ["doc0", "doc1", "doc2"], ["doc7"]):
        assert max(shares(*ids)) > 0.75


def test_a_killed_replica_loses_no_request(two: Two) -> None:
    victims = two.wait_for_two()
    names = [f"doc{n % 8}" for n in range(12)]
    with ThreadPoolExecutor(len(names)) as pool:
        answers = [pool.submit(two.ask, name, max_tokens=150) for name in names]
        time.sleep(0.4)
        victims[0].kill()
        replies = [answer.result() for answer in answers]
    assert {r.status_code for r in replies} == {200}
    expected = {name: two.expected(name, max_tokens=150) for name in set(names)}
    assert [r.json()["choices"][0]["message"]["content"] for r in replies] == [expected[name] for name in names]


def test_a_job_survives_the_deployments_that_work_on_it(two: Two) -> None:
    engines = two.wait_for_two()
    body = {"documents": [{"id": f"job-{n}", "text": f"Document {n}. " * 8} for n in range(40)]}
    job = httpx.post(f"{two.url}/v1/documents", json=body, headers=two.headers, timeout=60)
    assert job.status_code == 202
    (documents,) = two.replicas("documents")
    documents.kill()
    engines[0].kill()
    url, deadline = f"{two.url}/v1/jobs/{job.json()['id']}", time.monotonic() + 120
    while time.monotonic() < deadline:
        answer = httpx.get(url, headers=two.headers, timeout=120)
        assert answer.status_code == 200, answer.text
        if answer.json()["finished_at"]:
            break
        time.sleep(0.2)
    assert answer.json()["status"] == "done"
    assert [d["id"] for d in answer.json()["documents"]] == [d["id"] for d in body["documents"]]
    assert two.replicas("documents") != [documents]
    reply = two.ask("job-39", max_tokens=4)
    assert reply.json()["kvlink"]["documents"][0]["origin"] in ("store", "host", "disk")


def test_a_stream_that_is_cut_ends_with_an_error_event(two: Two) -> None:
    two.wait_for_two()
    ended: list[list[str]] = []
    started = threading.Barrier(3)

    def read(name: str) -> None:
        lines: list[str] = []
        body = two.body(name, max_tokens=1800, stream=True)
        with httpx.stream("POST", two.url + CHAT, json=body, headers=two.headers, timeout=120) as response:
            for line in response.iter_lines():
                if line:
                    lines.append(line)
                if line and len(lines) == 4:
                    started.wait(60)
        ended.append(lines)

    readers = [threading.Thread(target=read, args=(name,)) for name in ("doc0", "doc1")]
    for reader in readers:
        reader.start()
    started.wait(60)
    for process in two.replicas():
        process.kill()
    for reader in readers:
        reader.join(60)
    assert len(ended) == 2
    for lines in ended:
        last = json.loads(lines[-1].removeprefix("data: "))
        assert last["error"]["code"] == "engine_unavailable"
        assert "data: [DONE]" not in lines
    two.wait_for_two()
    assert two.ask("doc0").status_code == 200


def test_a_replica_that_is_taken_away_finishes_its_streams(two: Two) -> None:
    from ray import serve

    processes = two.wait_for_two()
    lines: list[str] = []
    begun = threading.Event()

    def read() -> None:
        body = two.body("doc3", max_tokens=1200, stream=True)
        with httpx.stream("POST", two.url + CHAT, json=body, headers=two.headers, timeout=120) as response:
            for line in response.iter_lines():
                lines.append(line)
                if len(lines) > 4:
                    begun.set()

    reader = threading.Thread(target=read)
    reader.start()
    assert begun.wait(60)
    serve.delete(APP, _blocking=False)
    reader.join(90)
    assert lines[-2:] == ["data: [DONE]", ""]
    psutil.wait_procs(processes, timeout=60)
    assert not any(p.is_running() for p in processes)
