"""The service under test: a real Ray Serve over a store of three documents, one of them damaged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from processes import free_ports

from kvlink_core.encode import DocumentEncoder
from kvlink_core.models import LoadedModel
from kvlink_core.session import AnswerRequest, SamplingParams, Session
from kvlink_core.store import DocumentStore
from kvlink_core.types import Document, Message

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
        # Escaped to ASCII: a test may send what UTF-8 cannot hold.
        content, headers = json.dumps(body), {"content-type": "application/json"}
        return httpx.post(self.url + CHAT, content=content, headers=headers, timeout=60)

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


def deploy(name: str, route_prefix: str, arguments: dict[str, str]) -> None:
    """Build and run the application as ``serve run serve.app:build_app`` does; returns when it answers."""
    from ray import serve
    from ray.serve._private.api import call_user_app_builder_with_args_if_necessary

    from serve.app import build_app

    app = call_user_app_builder_with_args_if_necessary(build_app, arguments)
    serve.run(app, name=name, route_prefix=route_prefix)


@contextmanager
def running_service(model: LoadedModel, model_dir: Path, folder: Path) -> Iterator[Service]:
    """The application of ``serve run serve.app:build_app store=... model=...``, on a free port."""
    from ray import serve

    where = folder / "store"
    store = DocumentStore.open(str(where), fingerprint=model.fingerprint, create=True)
    shards = {name: add_document(model, store, name, text) for name, text in TEXTS.items()}
    damaged = next(where.rglob(f"shards/*{shards['broken'].removesuffix('.parquet').split('/')[-1]}*"))
    content = bytearray(damaged.read_bytes())
    content[len(content) // 3] ^= 0xFF
    damaged.write_bytes(content)

    (port,) = free_ports(1)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    arguments = {
        "store": str(where),
        "model": str(model_dir),
        "engine.max_running": str(MAX_RUNNING),
        "engine.max_waiting": str(MAX_WAITING),
        "ingress.max_body_bytes": "100000",
        # A tiny model computes faster than anything can be read, and these tests want to see what was read.
        "tiers.recompute": "never",
        "tiers.host_bytes": "64 MiB",
    }
    deploy("kvlink", "/", arguments)
    try:
        yield Service(f"http://127.0.0.1:{port}", model, where)
    finally:
        serve.shutdown()
