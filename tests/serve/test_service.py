"""Answers of the service as users meet it: real Ray Serve, a real store, real clients."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from running_service import CHAT, QUESTION, TEXTS, Service, add_document

from kvlink_core.engine import SamplingParams
from kvlink_core.session import AnswerRequest, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, Message

pytestmark = pytest.mark.ray

#: Where what is stored may have been found: another test may have asked for it before.
FOUND = {"store", "host"}


def test_stored_documents_are_linked_and_the_answer_is_the_core_s(service: Service) -> None:
    body = service.ask({"id": "harbour"}, {"id": "bridge"}).json()
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], TEXTS["bridge"])
    documents = body["kvlink"]["documents"]
    assert [d["id"] for d in documents] == ["harbour", "bridge"]
    assert {d["origin"] for d in documents} <= FOUND
    usage = body["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == sum(d["tokens"] for d in documents) > 0
    assert usage["prompt_tokens"] == usage["prompt_tokens_details"]["cached_tokens"] + body["kvlink"]["computed_tokens"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_text_is_encoded_in_place_unless_the_store_has_it(service: Service) -> None:
    body = service.ask({"text": TEXTS["harbour"]}, {"id": "mine", "text": "Something new."}).json()
    known, new = body["kvlink"]["documents"]
    assert (known["id"], known["origin"] in FOUND, new["id"], new["origin"]) == (None, True, "mine", "encoded")
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], "Something new.")
    again = service.ask({"text": TEXTS["harbour"]}, {"id": "mine", "text": "Something new."}).json()
    assert [d["origin"] for d in again["kvlink"]["documents"]] == ["host", "host"]  # kept since
    assert again["choices"] == body["choices"]


@pytest.mark.parametrize("linker", ["full", "reposition", "link-tokens"])
def test_the_linker_is_selected_per_request(service: Service, linker: str) -> None:
    body = service.ask({"id": "harbour"}, linker=linker).json()
    assert body["kvlink"]["linker"] == linker
    assert (body["usage"]["prompt_tokens_details"]["cached_tokens"] == 0) is (linker == "full")
    assert body["choices"][0]["message"]["content"] == service.expected(TEXTS["harbour"], linker=linker)


def test_documents_of_two_turns_are_the_core_s(service: Service) -> None:
    first = {"role": "user", "content": "Who?", "documents": [{"id": "harbour"}]}
    messages = [first, {"role": "assistant", "content": "Nobody."}, *QUESTION]
    body = service.ask({"text": "Something new."}, messages=messages).json()
    assert [d["id"] for d in body["kvlink"]["documents"]] == ["harbour", None]
    core = AnswerRequest(
        [
            Message("user", "Who?", [Document("", TEXTS["harbour"])]),
            Message("assistant", "Nobody."),
            Message("user", QUESTION[0]["content"]),
        ],
        [Document("", "Something new.")],
        sampling=SamplingParams(max_tokens=12),
    )
    assert body["choices"][0]["message"]["content"] == Session(service.model).start(core).text()
    messages = [*messages[:2], {**QUESTION[0], "documents": [{"id": "bridge"}]}]
    refused = service.ask({"text": "Something new."}, messages=messages)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "misplaced_documents")


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
        "ray_kvlink_requests_in_replica": 0,
        "ray_kvlink_tier_bytes": 1,
        "ray_kvlink_tier_capacity_bytes": 64 * 2**20,
        "ray_kvlink_tier_documents": 1,
        "ray_kvlink_loaded_bytes_total": 1,
        "ray_kvlink_store_circuit_open": 0,
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
