"""Two tenants on one service: neither reads nor probes the other's documents; only admins change them."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_service import local_app, served
from running_service import CHAT, QUESTION, add_document

from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from serve.keys import create_key

SECRET = "The vault of Globex opens with the number 4711."


@dataclass(frozen=True)
class Tenants:
    url: str
    keys: dict[str, str]
    store: Path

    def ask(self, who: str | None, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"authorization": f"Bearer {self.keys[who]}"} if who else {}
        return httpx.request(
            method, self.url + path, headers=headers | request.pop("headers", {}), timeout=60, **request
        )

    def chat(self, who: str | None, *documents: dict[str, Any], **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": QUESTION, "documents": documents, "max_tokens": 4} | fields
        return self.ask(who, "POST", CHAT, json=body)


@pytest.fixture(scope="module")
def tenants(tiny_model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tenants]:
    folder = tmp_path_factory.mktemp("tenants")
    keys = {
        f"{namespace}-{role}": create_key(folder / "keys.json", namespace=namespace, role=role)[1]
        for namespace in ("acme", "globex")
        for role in ("user", "admin")
    }
    where = folder / "store"
    for namespace, name, text in (("acme", "plan", "Acme plans a bridge."), ("globex", "secret", SECRET)):
        store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, namespace=namespace, create=True)
        add_document(tiny_model, store, name, text)
        store.close()
    settings = {"keys": str(folder / "keys.json"), "ingress.max_body_bytes": 100_000, "ingress.max_documents": 3}
    with served(local_app(tiny_model, where, **settings)) as url:
        yield Tenants(url, keys, where)


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("POST", CHAT),
        ("POST", "/v1/completions"),
        ("GET", "/v1/models"),
        ("GET", "/v1/models/tiny"),
        ("GET", "/v1/documents"),
        ("GET", "/v1/documents/plan"),
        ("DELETE", "/v1/documents/plan"),
        ("POST", "/v1/documents"),
        ("GET", "/v1/jobs/x"),
        ("GET", "/v1/nothing"),
    ],
)
def test_without_a_key_nothing_is_said(tenants: Tenants, method: str, path: str) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Bearer kvl_000000000000_x"}):
        response = tenants.ask(None, method, path, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"


def test_what_needs_no_key_says_nothing_of_documents(tenants: Tenants) -> None:
    for path in ("/", "/healthz", "/openapi.json"):
        response = tenants.ask(None, "GET", path)
        assert response.status_code == 200
        assert "Globex" not in response.text


def test_each_tenant_has_its_own(tenants: Tenants) -> None:
    mine = tenants.chat("acme-user", {"id": "plan"}).json()
    assert mine["kvlink"]["documents"][0]["origin"] in ("store", "host", "device", "disk")
    assert tenants.chat("globex-user", {"id": "secret"}).status_code == 200
    assert [d["id"] for d in tenants.ask("acme-user", "GET", "/v1/documents").json()["data"]] == ["plan"]
    assert tenants.ask("acme-user", "GET", "/v1/documents/plan").json()["tokens"] > 0


def test_another_s_document_is_no_different_from_none(tenants: Tenants) -> None:
    def answer(name: str) -> list[Any]:
        replies = [
            tenants.chat("acme-user", {"id": name}),
            tenants.ask("acme-user", "GET", f"/v1/documents/{name}"),
            tenants.ask("acme-admin", "DELETE", f"/v1/documents/{name}"),
        ]
        return [(r.status_code, r.text.replace(name, "NAME")) for r in replies]

    assert answer("secret") == answer("nosuch")
    assert {status for status, _ in answer("secret")} == {404}
    assert tenants.chat("globex-user", {"id": "secret"}).status_code == 200


def test_another_s_text_is_not_found_in_the_store(tenants: Tenants) -> None:
    origins = {
        who: tenants.chat(who, {"text": SECRET}).json()["kvlink"]["documents"][0]["origin"]
        for who in ("globex-user", "acme-user")
    }
    assert origins["globex-user"] != "encoded"
    assert origins["acme-user"] == "encoded"


Probe = Callable[[httpx.Client, str], httpx.Response]
PROBES: dict[str, tuple[str, Probe]] = {
    "find": ("secret", lambda client, name: client.get(f"/v1/documents/{name}")),
    "delete": ("secret", lambda client, name: client.delete(f"/v1/documents/{name}")),
    "ask": (
        "secret",
        lambda client, name: client.post(
            CHAT, json={"model": "tiny", "messages": QUESTION, "documents": [{"id": name}], "max_tokens": 4}
        ),
    ),
    "job": ("job", lambda client, name: client.get(f"/v1/jobs/{name}")),
}


@pytest.mark.parametrize("probe", PROBES)
def test_probing_what_is_another_s_takes_as_long_as_probing_nothing(tenants: Tenants, probe: str) -> None:
    theirs, ask = PROBES[probe]
    nothing = "nosuch"
    if theirs == "job":
        body = {"documents": [{"id": "theirs", "text": "Globex digs."}]}
        theirs = tenants.ask("globex-admin", "POST", "/v1/documents", json=body).json()["id"]
        wait_for(tenants, "globex-admin", theirs)
        nothing = "job_" + "0" * 32
    times: dict[str, list[float]] = {theirs: [], nothing: []}
    headers = {"authorization": f"Bearer {tenants.keys['acme-admin']}"}
    with httpx.Client(base_url=tenants.url, headers=headers, timeout=60) as client:
        for _ in range(40):
            for name, seen in times.items():
                began = time.perf_counter()
                assert ask(client, name).status_code == 404
                seen.append(time.perf_counter() - began)
    # Alternating, so that what else the machine does hits both; reading a payload would take several times as long.
    ratio = statistics.median(times[theirs]) / statistics.median(times[nothing])
    assert 0.6 < ratio < 1.7


@pytest.mark.parametrize(
    ("method", "path", "body"),
    [
        ("DELETE", "/v1/documents/plan", None),
        ("DELETE", "/v1/documents/nosuch", None),
        ("POST", "/v1/documents", {"documents": [{"id": "x", "text": "y"}]}),
        ("GET", "/v1/jobs/x", None),
    ],
)
def test_admin_calls_need_an_admin_key(tenants: Tenants, method: str, path: str, body: Any) -> None:
    response = tenants.ask("acme-user", method, path, json=body)
    assert (response.status_code, response.json()["error"]["code"]) == (403, "forbidden")


def test_a_job_is_its_tenant_s(tenants: Tenants) -> None:
    body = {"documents": [{"id": "mine", "text": "Acme paints it green."}]}
    job = tenants.ask("acme-admin", "POST", "/v1/documents", json=body).json()
    assert tenants.ask("acme-admin", "GET", f"/v1/jobs/{job['id']}").status_code == 200
    theirs = tenants.ask("globex-admin", "GET", f"/v1/jobs/{job['id']}")
    never = tenants.ask("globex-admin", "GET", "/v1/jobs/job_none")
    assert theirs.status_code == never.status_code == 404
    assert theirs.text.replace(job["id"], "job_none") == never.text


HOSTILE = [
    "../../etc/passwd",
    "/etc/passwd",
    "s3://bucket/x",
    "file:///etc/passwd",
    "..",
    "a\x00b",
    "$(id)",
    "{0}",
    "%2e%2e",
]


def test_no_name_from_a_request_becomes_a_file(tenants: Tenants) -> None:
    before = files(tenants.store.parent)
    documents = [{"id": name, "text": f"A text for {number}."} for number, name in enumerate(HOSTILE)]
    jobs = [
        tenants.ask("acme-admin", "POST", "/v1/documents", json={"documents": documents[i : i + 3]}).json()["id"]
        for i in range(0, len(documents), 3)
    ]
    for job in jobs:
        assert wait_for(tenants, "acme-admin", job)["status"] == "done"
    listed = {d["id"] for d in tenants.ask("acme-user", "GET", "/v1/documents").json()["data"]}
    assert set(HOSTILE) <= listed
    new = files(tenants.store.parent) - before
    assert new
    for path in new:
        assert path.startswith(("store/shards/", "store/tokens/", "store/catalog/", "store/jobs/acme/"))
        name = path.rsplit("/", 1)[1]
        assert not any(part in name for part in ("passwd", "bucket", "..", "$", "%"))
    for name in HOSTILE:
        assert tenants.chat("acme-user", {"id": name}).status_code == 200


def files(folder: Path) -> set[str]:
    return {os.path.relpath(os.path.join(where, name), folder) for where, _, names in os.walk(folder) for name in names}


def wait_for(tenants: Tenants, who: str, job_id: str) -> dict[str, Any]:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        job: dict[str, Any] = tenants.ask(who, "GET", f"/v1/jobs/{job_id}").json()
        if job["status"] in ("done", "failed"):
            return job
        time.sleep(0.05)
    pytest.fail("the job did not end")


def test_limits(tenants: Tenants) -> None:
    many = tenants.chat("acme-user", *[{"id": "plan"}] * 4)
    assert (many.status_code, many.json()["error"]["param"]) == (400, "documents")
    large = tenants.chat("acme-user", {"text": "x" * 100_001})
    assert (large.status_code, large.json()["error"]["code"]) == (413, "body_too_large")
    long = tenants.chat("acme-user", max_tokens=10**6)
    assert (long.status_code, long.json()["error"]["param"]) == (400, "max_tokens")
