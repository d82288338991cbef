"""The proofs' own parts: clients that judge, a wire that fails, sums; and faults on a service in this process."""

from __future__ import annotations

import asyncio
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from local_service import local_app, served

from kvlink_core.models import LoadedModel
from serve.prove.clients import Askers, Outcome, leave_mid_stream, never_reading
from serve.prove.fault_run import first_good_run
from serve.prove.load_run import LoadResult, percentiles, sum_up
from serve.prove.material import Question, make_documents, make_model, make_questions, store_documents
from serve.prove.report import load_page
from serve.prove.wire import wire


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    return make_model(tmp_path_factory.mktemp("proof") / "model", small=True)


@pytest.fixture(scope="module")
def questions(model: LoadedModel) -> list[Question]:
    return make_questions(model, make_documents(12, sentences=4), 6, per_request=2, zipf=1.0, max_tokens=(8,), seed=1)


@pytest.fixture
def url(model: LoadedModel, tmp_path: Path) -> Iterator[str]:
    store_documents(model, str(tmp_path / "store"), make_documents(12, sentences=4), options=None, per_shard=4)
    with served(local_app(model, tmp_path / "store")) as address:
        yield address


def ask_all(url: str, questions: Sequence[Question]) -> list[Outcome]:
    async def ask() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            askers = Askers(client, "kvlink-proof", questions, seed=0)
            await askers.each_once()
            return askers.outcomes

    return asyncio.run(ask())


def test_the_service_gives_the_oracles_tokens_and_another_answer_is_called_wrong(
    url: str, questions: list[Question]
) -> None:
    assert {o.kind for o in ask_all(url, questions)} == {"right"}
    one = questions[0]
    # Other words; the same to the end but for the count; the document next to the one that was asked for.
    other = replace(one, documents=tuple(reversed(one.documents)))
    doubts = [replace(one, answer="no" + one.answer), replace(one, tokens=one.tokens + 1), other]
    assert [o.kind for o in ask_all(url, doubts)] == ["wrong"] * 3


def test_a_damaged_store_and_clients_that_leave_cost_nobody_a_right_answer(
    url: str, questions: list[Question], tmp_path: Path
) -> None:
    for shard in (tmp_path / "store").rglob("shards/*.parquet"):
        content = bytearray(shard.read_bytes())
        content[: len(content) // 2 : 997] = bytes(b ^ 0xFF for b in content[: len(content) // 2 : 997])
        shard.write_bytes(content)

    async def beside_others() -> list[Outcome]:
        async with httpx.AsyncClient(base_url=url, timeout=60) as client:
            askers = Askers(client, "kvlink-proof", questions, seed=0)
            async with never_reading(url, questions[0], "kvlink-proof", tokens=500), asyncio.TaskGroup() as group:
                leavers = [
                    group.create_task(leave_mid_stream(url, q, "kvlink-proof")) for _ in range(8) for q in questions
                ]
                group.create_task(askers.each_once())
            assert all(task.result() for task in leavers)
            return askers.outcomes

    outcomes = asyncio.run(beside_others())
    assert {o.kind for o in outcomes} == {"right"}
    assert "reencoded-corrupt" in {origin for o in outcomes for origin in o.origins}


def answering(*replies: bytes) -> Any:
    """A server that gives these bytes, one reply a connection, and hangs up."""
    waiting = list(replies)

    class Once(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65536)
            self.request.sendall(waiting.pop(0))

    return socketserver.ThreadingTCPServer(("127.0.0.1", 0), Once)


def test_what_is_no_answer_is_lost_unless_it_says_clearly_why(questions: list[Question]) -> None:
    one = replace(questions[0], answer="abc", tokens=1)
    head = b"HTTP/1.1 200 OK\r\nconnection: close\r\n\r\n"
    text = b'data: {"choices": [{"delta": {"content": "%s"}}]}\n\n'
    full = b'HTTP/1.1 503 x\r\nconnection: close\r\n%s\r\n{"error": {"code": "overloaded"}}'
    cases = [
        (head + text % b"ab" + b'data: {"error": {"code": "engine_unavailable"}}\n\n', "clear error"),
        (head + text % b"ab", "lost"),
        (head + text % b"ax" + b'data: {"error": {"code": "engine_unavailable"}}\n\n', "wrong"),
        (full % b"retry-after: 1\r\n", "clear error"),
        (full % b"", "lost"),
        (b"HTTP/1.1 500 x\r\nconnection: close\r\n\r\nInternal Server Error", "lost"),
        (b"", "lost"),
    ]
    with answering(*(reply for reply, _ in cases)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()

        async def ask() -> list[str]:
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{server.server_address[1]}") as client:
                return [(await Askers(client, "m", [one], seed=0).one()).kind for _ in cases]

        assert asyncio.run(ask()) == [kind for _, kind in cases]
        server.shutdown()
        thread.join()


def test_a_wire_is_slow_silent_or_cut_and_sound_again() -> None:
    class Echo(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            while data := self.request.recv(4096):
                self.request.sendall(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\n\r\n" + data[:1])

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with wire(server.server_address[1]) as line, httpx.Client(timeout=20) as client:
            address = f"http://127.0.0.1:{line.port}"
            for _ in range(2):
                assert client.get(address).text == "G"
            line.be("sound", delay_s=0.2)
            began = time.monotonic()
            assert client.get(address).text == "G"
            assert time.monotonic() - began > 0.2
            line.be("silent")
            with pytest.raises(httpx.ReadTimeout):
                client.get(address, timeout=0.5)
            line.be("refusing")
            with pytest.raises(httpx.TransportError):
                client.get(address)
            line.be("sound")
            assert client.get(address).text == "G"
        server.shutdown()
        thread.join()


def outcome(sent: float, kind: Any = "right", code: str = "200", *, gaps: Sequence[float] = (0.1,)) -> Outcome:
    return Outcome(sent, sent + 1, kind, code, 200, False, 0.5, list(gaps))


def test_all_is_well_from_the_first_of_ten_right_answers_on() -> None:
    outcomes = [outcome(float(n)) for n in range(30)]
    outcomes[4].kind = "clear error"
    outcomes[7].origins = ("encoded",)
    assert first_good_run(outcomes, lambda o: False) == 5.0
    assert first_good_run(outcomes, lambda o: "encoded" in o.origins) == 5.0
    assert first_good_run(outcomes, lambda o: o.sent < 9) == 9.0
    assert first_good_run(outcomes[:14], lambda o: False) is None


def test_a_load_is_held_to_its_conditions() -> None:
    flat = [{"engine 1": 1000, "proxy 2": 1000}] * 20
    growing = [{"engine 1": 1000 + 2 * n, "proxy 2": 1000} for n in range(20)]
    refused = [outcome(1.0, "clear error", "503 overloaded")]
    lost = [outcome(1.0, "lost", "ReadError")]

    def faults(share: float, outcomes: list[Outcome], samples: list[dict[str, int]]) -> list[str]:
        result = LoadResult(share, 1.0, 10.0)
        sum_up(result, outcomes, samples, 1.0, 0.2)
        return result.faults

    right = [outcome(1.0), outcome(2.0, gaps=(0.3, 0.3))]
    assert faults(0.5, right, flat) == []
    assert faults(1.2, right + refused, flat) == []
    assert faults(0.8, right + refused, flat) == ["1 errors below capacity"]
    assert faults(1.2, right + lost, flat) == ["1 requests lost without a clear error"]
    assert faults(1.2, [outcome(1.0, "clear error", "event engine_unavailable")], flat) == [
        "errors other than 503: event engine_unavailable"
    ]
    assert faults(0.5, right, growing) == ["engine 1 grew by 2.6%"]
    result = LoadResult(0.5, 1.0, 10.0)
    sum_up(result, right, flat, 1.0, 0.2)
    assert result.goodput == 0.1
    from kvlink_core.benchmark.results import Hardware

    assert "| 0.5 | 1.00 | 2 | 2 | 0 | 0 | 0 |" in load_page(
        2.0, [result], Hardware(cpu="x", cores=2, threads=1, memory_gib=1.0), "command"
    )


def test_percentiles_are_by_nearest_rank() -> None:
    assert percentiles([n / 1000 for n in range(100)], (50, 99)) == [50.0, 99.0]
    assert percentiles([], (50,)) == []
