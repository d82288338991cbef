"""Stores in a local directory and in a bucket of an S3 server on loopback."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
from moto.server import ThreadedMotoServer
from store_places import Place, local_place, s3_place


@pytest.fixture(scope="session")
def s3_server() -> Iterator[str]:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Each kind of place in turn."""
    if request.param == "local":
        made = local_place(tmp_path / "a store")
    else:
        made = s3_place(request.getfixturevalue("s3_server"))
    yield made
    for store in made.opened:
        store.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[Place]:
    made = local_place(tmp_path / "a store")
    yield made
    for store in made.opened:
        store.close()
