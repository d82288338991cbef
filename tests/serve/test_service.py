"""The service as users meet it: real Ray Serve, a real store, real clients."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from kvlink_core.encode import DocumentEncoder
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, Message

pytestmark = pytest.mark.ray

TEXTS = {
    "harbour": "The harbour of Arlen was finished in 1904 by the engineer Ida Brandt.",
    "bridge": "The bridge across the Arl is painted green every seven years.",
    "broken": "This one is stored, and then its shard is damaged.",
}
CHAT = "/v1/chat/completions"
QUESTION = [{"role": "user", "content": "Who built the harbour?"}]
MAX_RUNNING, MAX_WAITING = 8, 8


@dataclass(frozen=True)
class Service:
    url: str
    model: LoadedModel
    store: Path

    def ask(self, *documents: dict[str, Any], **fields: Any) -> httpx.Response:
        body = {"model": "tiny", "messages": QUESTION, "documents": documents, "max_tokens": 12} | fields
        return httpx.post(self.url + CHAT, json=body, timeout=60)

    def expected(self, *texts: str, max_tokens: int = 12, linker: str = "link-tokens") -> str:
        """What the core answers in this process, with nothing stored."""
        request = AnswerRequest(
            messages=[Message("user", QUESTION[0]["content"])],
            documents=[Document("", text) for text in texts],
            linker=linker,
            sampling=SamplingParams(max_tokens=max_tokens),
        )
        return Session(self.model).start(request).text()


def add_document(model: LoadedModel, store: DocumentStore, name: str, text: str) -> str:
    """Store one document in a shard of its own; returns the shard's name."""
    tokens = model.layout.document_tokens(Document(name, text))
    rows = store.write_shard([(name, DocumentEncoder(model).encode([tokens])[0])])
    store.commit(rows)
    return rows[0].shard


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def service(
    ray_session: None, tiny_model: LoadedModel, tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Service]:
    """The application of ``serve run serve.app:build_app store=... model=...``, on a free port."""
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serve.app import build_app

    where = tmp_path_factory.mktemp("service") / "store"
    store = DocumentStore.open(str(where), fingerprint=tiny_model.fingerprint, create=True)
    shards = {name: add_document(tiny_model, store, name, text) for name, text in TEXTS.items()}
    damaged = next(where.rglob(f"shards/*{shards['broken'].removesuffix('.parquet').split('/')[-1]}*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged.write_bytes(content)

    port = free_port()
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {
        "store": str(where),
        "model": str(tiny_model_dir),
        "engine.max_running": str(MAX_RUNNING),
        "engine.max_waiting": str(MAX_WAITING),
        "ingress.max_body_bytes": "100000",
    }
    app = call_user_app_builder_with_args_if_necessary(build_app, arguments)
    serve.run(app, name="kvlink")
    yield Service(f"http://127.0.0.1:{port}", tiny_model, where)
    serve.shutdown()


def running(service: Service) -> int:
    from ray import serve

    count: int = serve.get_deployment_handle("engine", "kvlink").running.remote().result(timeout_s=30)
    return count


def test_stored_documents_are_linked_and_the_answer_is_the_core_s(service: Service) -> None:
    body = service.ask({"id": "harbour"}, {"id": "bridge"}).json()
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], TEXTS["bridge"])
    documents = body["kvlink"]["documents"]
    assert [(d["id"], d["origin"]) for d in documents] == [("harbour", "store"), ("bridge", "store")]
    usage = body["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == sum(d["tokens"] for d in documents) > 0
    assert usage["prompt_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] + body["kvlink"]["computed_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_text_is_encoded_in_place_unless_the_store_has_it(service: Service) -> None:
    body = service.ask({"text": TEXTS["harbour"]}, {"id": "mine", "text": "Something new."}).json()
    assert [(d["id"], d["origin"]) for d in body["kvlink"]["documents"]] == [(None, "store"), ("mine", "encoded")]
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], "Something new.")


@pytest.mark.parametrize("linker", ["full", "reposition", "link-tokens"])
def test_the_linker_is_selected_per_request(service: Service, linker: str) -> None:
    body = service.ask({"id": "harbour"}, linker=linker).json()
    assert body["kvlink"]["linker"] == linker
    assert (body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0) is (linker == "full")
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], linker=linker)


def test_a_damaged_shard_is_recomputed_counted_and_reported(service: Service) -> None:
    body = service.ask({"id": "broken"}).json()
    assert body["kvlink"]["documents"][0]["origin"] == "reencoded-corrupt"
    assert body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["broken"])


def test_a_document_stored_later_is_found_without_a_restart(service: Service) -> None:
    assert service.ask({"id": "later"}).status_code == 404
    store = DocumentStore.open(str(service.store), fingerprint=service.model.fingerprint)
    add_document(service.model, store, "later", "It came late.")
    deadline = time.monotonic() + 10  # looks for new documents are rate-limited
    while (response := service.ask({"id": "later"})).status_code == 404 and time.monotonic() < deadline:
        time.sleep(0.3)
    assert response.json()["kvlink"]["documents"][0]["origin"] == "store"


def test_the_openai_client(service: Service) -> None:
    client = openai.OpenAI(base_url=service.url + "/v1", api_key="unused", max_retries=0)
    extra = {"documents": [{"id": "harbour"}], "linker": "reposition"}
    question: Any = QUESTION
    whole = client.chat.completions.create(model="tiny", messages=question, max_tokens=8, extra_body=extra)
    expected = service.expected(TEXTS["harbour"], max_tokens=8, linker="reposition")
    assert whole.choices[0].message.content == expected
    assert whole.usage is not None
    assert whole.usage.prompt_tokens_details is not None
    assert whole.usage.prompt_tokens_details.cached_tokens
    stream = client.chat.completions.create(
        model="tiny",
        messages=question,
        max_completion_tokens=8,
        stream=True,
        stream_options={"include_usage": True},
        extra_body=extra,
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == expected
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"
    assert chunks[-1].usage == whole.usage
    assert [m.id for m in client.models.list()] == ["tiny"]
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="tiny", messages=question, extra_body={"documents": [{"id": "nope"}]})
    assert (missing.value.code, missing.value.param) == ("document_not_found", "documents")
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages=question, temperature=-1)


def test_sampling_is_reproducible_by_seed(service: Service) -> None:
    def sample(seed: int) -> str:
        fields = {"temperature": 1.5, "top_p": 0.95, "top_k": 50, "seed": seed, "max_tokens": 20}
        return str(service.ask({"id": "bridge"}, **fields).json()["choices"][0]["message"]["content"])

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_stop_strings_end_the_answer_and_are_not_part_of_it(service: Service) -> None:
    whole = service.expected(TEXTS["harbour"])
    stop = whole[4:6]
    choice = service.ask({"id": "harbour"}, stop=[stop]).json()["choices"][0]
    assert choice == choice | {"finish_reason": "stop"}
    assert choice["message"]["content"] == whole[: whole.index(stop)]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "code", "said"),
    [
        ({"documents": [{"id": "harbour"}, {"id": "nope"}]}, 404, "document_not_found", "'nope'"),
        ({"documents": [{"id": "a", "text": " "}]}, 400, "empty_document", "no text"),
        (
            {"documents": [{"id": "a", "text": "x"}, {"id": "a", "text": "y"}]},
            400,
            "duplicate_document",
            "two different texts",
        ),
        ({"messages": [{"role": "user", "content": " "}]}, 400, "empty_question", "ask something"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, 400, "invalid_request", "'user'"),
        ({"model": "gpt-4"}, 404, "model_not_found", "'gpt-4'"),
        ({"linker": "glue"}, 400, "unknown_linker", "'glue'"),
        ({"documents": [{"text": "long " * 500}]}, 400, "context_length_exceeded", "2048"),
        ({"temperature": -0.5}, 400, "invalid_value", "temperature"),
        ({"temperature": 2.5}, 400, "invalid_value", "temperature"),
        ({"top_p": 0}, 400, "invalid_value", "top_p"),
        ({"top_k": -1}, 400, "invalid_value", "top_k"),
        ({"max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"max_tokens": 10**12}, 400, "invalid_value", "max_tokens"),
        ({"seed": 2**64}, 400, "invalid_value", "seed"),
        ({"stop": list("abcde")}, 400, "invalid_value", "stop"),
        ({"n": 3}, 400, "unsupported_parameter", "n:"),
        ({"beam_width": 3}, 400, "unknown_parameter", "beam_width"),
        ({"user": "x" * 200_000}, 413, "body_too_large", "100000"),
    ],
)
def test_bad_input_has_its_status_before_any_stream(
    service: Service, fields: dict[str, Any], status: int, code: str, said: str, stream: bool
) -> None:
    response = service.ask(**({"documents": [{"id": "harbour"}], "stream": stream} | fields))
    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (status, code)
    assert said in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_context_error_says_both_numbers(service: Service) -> None:
    error = service.ask({"text": "long " * 500}).json()["error"]
    numbers = [int(word) for word in error["message"].replace(".", " ").split() if word.isdigit()]
    assert 2048 in numbers
    assert any(2500 < number < 2700 for number in numbers)


@pytest.mark.parametrize(
    ("method", "path", "content", "status"),
    [
        ("POST", CHAT, b'{"model": "tiny", ', 400),
        ("POST", CHAT, b'{"model": "tiny", "messages": [], "temperature": Infinity}', 400),
        ("DELETE", CHAT, b"", 405),
        ("GET", "/v1/nothing", b"", 404),
    ],
)
def test_bad_http(service: Service, method: str, path: str, content: bytes, status: int) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.request(method, service.url + path, content=content, headers=headers, timeout=60)
    assert response.status_code == status
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_request_ids_are_echoed_once(service: Service) -> None:
    given = httpx.get(service.url + "/healthz", headers={"x-request-id": "mine-1"}, timeout=60)
    assert given.headers.get_list("x-request-id") == ["mine-1"]
    assert len(httpx.get(service.url + "/healthz", timeout=60).headers["x-request-id"]) > 8


def test_a_stream_is_server_sent_events(service: Service) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 5, "stream": True}
    with httpx.stream("POST", service.url + CHAT, json=body, timeout=60) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = list(response.iter_lines())
    assert lines[-2:] == ["data: [DONE]", ""]
    assert lines[1::2] == [""] * (len(lines) // 2)
    chunks = [json.loads(line[6:]) for line in lines[:-2:2]]
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"
    assert chunks[-1]["kvlink"]["computed_tokens"] > 0


def test_concurrent_requests_get_their_own_answers(service: Service) -> None:
    names = ["harbour", "bridge"] * 4
    with ThreadPoolExecutor(8) as pool:
        bodies = [r.json() for r in pool.map(lambda name: service.ask({"id": name}), names)]
    expected = {name: service.expected(TEXTS[name]) for name in set(names)}
    assert [b["choices"][0]["message"]["content"] for b in bodies] == [expected[name] for name in names]


def test_too_many_requests_get_503_and_are_told_to_come_back(service: Service) -> None:
    count = 3 * (MAX_RUNNING + MAX_WAITING)
    with ThreadPoolExecutor(count) as pool:
        responses = list(pool.map(lambda _: service.ask({"id": "harbour"}, max_tokens=40), range(count)))
    refused = [r for r in responses if r.status_code != 200]
    assert refused
    assert len(refused) < count
    for response in refused:
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "overloaded"
        assert int(response.headers["retry-after"]) >= 1
    assert httpx.get(service.url + "/healthz", timeout=60).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_its_request(service: Service, stream: bool) -> None:
    body = {"model": "tiny", "messages": QUESTION, "max_tokens": 20, "stream": stream, "temperature": 0}
    started = time.monotonic()
    httpx.post(service.url + CHAT, json=body, timeout=60)
    per_token = (time.monotonic() - started) / 20
    tokens = body["max_tokens"] = 1900
    if stream:
        with httpx.stream("POST", service.url + CHAT, json=body, timeout=60) as response:
            lines = response.iter_lines()  # kept: an iterator that is dropped closes the response
            next(lines)
            assert running(service) == 1
    else:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(service.url + CHAT, json=body, timeout=httpx.Timeout(60, read=0.5))
    left = time.monotonic()
    while running(service):
        assert time.monotonic() - left < 20
        time.sleep(0.02)
    assert time.monotonic() - left < 0.5 * tokens * per_token


def test_metrics_are_exported_with_the_field_s_names(service: Service) -> None:
    import ray

    assert service.ask({"id": "broken"}, {"id": "harbour"}).status_code == 200
    port = ray.nodes()[0]["MetricsExportPort"]
    expected = {
        "ray_kvlink_corrupt_payloads_total": 1,
        "ray_kvlink_lookup_requested_tokens_total": 1,
        "ray_kvlink_lookup_hit_tokens_total": 1,
        "ray_kvlink_recomputed_tokens_total": 1,
        "ray_kvlink_time_to_first_token_seconds_count": 1,
        "ray_kvlink_e2e_request_latency_seconds_count": 1,
        "ray_kvlink_requests_running": 0,
    }
    deadline = time.monotonic() + 40  # Ray exports every 10 s
    while True:
        page = httpx.get(f"http://127.0.0.1:{port}/metrics", timeout=30).text
        samples = [line for line in page.splitlines() if line.startswith("ray_kvlink_")]
        values = {line.split("{")[0]: float(line.split()[-1]) for line in samples}
        if all(values.get(name, -1) >= least for name, least in expected.items()):
            return
        assert time.monotonic() < deadline, values
        time.sleep(1)
