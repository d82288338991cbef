"""Documents of a request are fetched as soon as a replica has it, whether or not it is its turn."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest
from local_service import Quiet
from running_service import TEXTS, add_document
from slow_store import SlowStore

from kvlink_core.engine import Engine, EngineSettings, EngineStats
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.store.tiers import TierSettings
from kvlink_core.types import Document, Message
from serve.app import FAST_PATH, build_app
from serve.config import ServiceConfig
from serve.namespaces import Namespaces, Opened
from serve.server import EngineServer
from serve.wire import EngineRequest, Event, ModelCard, Piece, WireDocument, WireMessage, WireSampling


class Held(Quiet):
    """Holds the engine between two steps, until it is let go."""

    def __init__(self) -> None:
        self.held, self.go = threading.Event(), threading.Event()

    def engine(self, stats: EngineStats) -> None:
        self.loaded = stats
        if stats.running:
            self.held.set()
            assert self.go.wait(30)


def asked(name: str, *documents: str) -> EngineRequest:
    sampling = WireSampling(temperature=0.0, top_p=1.0, top_k=0, seed=None, max_tokens=6, stop=())
    refs = tuple(WireDocument(i) for i in documents)
    return EngineRequest(name, (WireMessage("user", "Who?"),), refs, None, sampling, stream=True)


async def collect(server: EngineServer, request: EngineRequest) -> list[Event]:
    return [event async for event in server.generate(request)]


def test_documents_are_read_before_their_request_has_its_turn(tiny_model: LoadedModel, tmp_path: Path) -> None:
    store = DocumentStore.open(str(tmp_path / "store"), fingerprint=tiny_model.fingerprint, create=True)
    add_document(tiny_model, store, "harbour", TEXTS["harbour"])
    slow = SlowStore(store)
    session = Session(tiny_model, slow, TierSettings(host_bytes=2**24, recompute="never"))
    metrics = Held()
    namespaces = Namespaces(lambda name: Opened(session, slow, lambda: None), most=1)
    engine = Engine(tiny_model, EngineSettings(max_running=1))
    card = ModelCard("tiny", 0, tiny_model.context_length, "ab", ("link-tokens",), "link-tokens")
    server = EngineServer(namespaces, engine, card, metrics, stuck_after_s=60)

    async def go() -> str:
        first = asyncio.create_task(collect(server, asked("first")))
        await asyncio.to_thread(metrics.held.wait, 30)
        second = asyncio.create_task(collect(server, asked("second", "harbour")))
        async with asyncio.timeout(20):
            while await server.document_tiers("default", ["harbour"]) != ("host", "store"):
                await asyncio.sleep(0.005)
        assert slow.reads == [["harbour"]]
        assert metrics.loaded.running == 1
        assert not first.done()
        assert not second.done()
        metrics.go.set()
        await first
        return "".join(e.text for e in await second if isinstance(e, Piece))

    answer = asyncio.run(go())
    server.close()
    session.close()
    alone = AnswerRequest(
        [Message("user", "Who?")], [Document("", TEXTS["harbour"])], sampling=SamplingParams(max_tokens=6)
    )
    assert answer == Session(tiny_model).start(alone).text()
    assert slow.reads == [["harbour"]]  # and not again when its turn came


@pytest.mark.parametrize("fast", [True, False])
def test_a_replica_takes_some_that_wait_and_runs_on_the_fast_path(
    fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_SERVE_USE_GRPC_BY_DEFAULT", "0")  # whoever sets it means it
    settings = {"store": str(tmp_path), "check": False, "engine.max_running": 5, "engine.max_ahead": 3}
    config = ServiceConfig.model_validate({**settings, "fast_path": fast})
    ingress = build_app(config)
    (engine, _) = ingress._bound_deployment.init_args
    deployments = {d.name: d for d in (ingress._bound_deployment, engine._bound_deployment)}
    assert deployments["engine"].max_ongoing_requests == 8
    for deployment in deployments.values():
        environment = (deployment.ray_actor_options.get("runtime_env") or {}).get("env_vars", {})
        expected = {**FAST_PATH, "RAY_SERVE_USE_GRPC_BY_DEFAULT": "0"} if fast else {}
        assert environment == expected
