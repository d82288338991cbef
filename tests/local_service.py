"""The service in this process, over real HTTP and a real store, without Ray."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from processes import free_ports

from kvlink_core.engine import Engine
from kvlink_core.models import LoadedModel
from kvlink_core.store import DocumentStore
from kvlink_core.store.lifecycle import StoreKeeper
from serve.config import ServiceConfig
from serve.documents import DocumentService
from serve.ingress import create_app
from serve.keys import KeyRing
from serve.loading import engine_settings, model_card, open_namespaces
from serve.server import EngineServer
from serve.wire import ApiError, ApiException, EngineRequest, Event, JobDocument, ModelCard, NewDocument


class Quiet:
    """Metrics that nobody reads."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


class LocalEngine:
    """An ``EngineClient`` that is a replica itself."""

    def __init__(self, server: EngineServer) -> None:
        self.server = server

    async def card(self) -> ModelCard:
        return await self.server.card()

    async def health(self) -> None:
        await self.server.ping()

    def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        return self.server.generate(request)

    async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        answer = await self.server.add_documents(namespace, documents)
        if isinstance(answer, ApiError):
            raise ApiException(answer)
        return answer

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...]:
        answer = await self.server.document_tiers(namespace, ids)
        if isinstance(answer, ApiError):
            raise ApiException(answer)
        return answer


class LocalDocuments:
    """A ``DocumentsClient`` that is the deployment itself."""

    def __init__(self, service: DocumentService) -> None:
        self.service = service

    def __getattr__(self, name: str) -> Any:
        method = getattr(self.service, name)

        async def ask(*args: Any, **kwargs: Any) -> Any:
            answer = await method(*args, **kwargs)
            if isinstance(answer, ApiError):
                raise ApiException(answer)
            return answer

        return ask


def local_app(model: LoadedModel, where: Path, **settings: Any) -> FastAPI:
    """The application over the store at ``where``, which is made if need be. To be used in one event loop."""
    DocumentStore.open(str(where), fingerprint=model.fingerprint, create=True).close()
    # A tiny model computes about as fast as it reads: never, so that it is known where a cache comes from.
    config = ServiceConfig.model_validate({"store": str(where), "tiers.recompute": "never", **settings})
    server = EngineServer(
        open_namespaces(config, model),
        Engine(model, engine_settings(config)),
        model_card(model, config),
        Quiet(),
        stuck_after_s=60.0,
        linker=config.linker,
    )
    server.takes_documents(model, chunk_tokens=config.engine.chunk_tokens, places=config.engine.places)
    engine = LocalEngine(server)
    documents: Any = LocalDocuments(DocumentService(engine, lambda: StoreKeeper.open(str(where)), config.documents))
    return create_app(
        engine,
        config.ingress,
        config.sampling,
        documents=documents,
        keys=KeyRing(Path(config.keys)) if config.keys else None,
        namespace=config.namespace,
    )


@contextmanager
def served(app: FastAPI) -> Iterator[str]:
    """The address at which an application answers."""
    (port,) = free_ports(1)
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=port, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()))
    thread.start()
    while not server.started and thread.is_alive():
        thread.join(0.01)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(10)
