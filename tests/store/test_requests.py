"""How often a bucket is asked: one round of range requests for a query, all of them at once."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from store_places import Place, make_cache, same
from werkzeug.serving import WSGIRequestHandler

DOCUMENTS = 20


@dataclass
class Server:
    """What the S3 server was asked to read under ``shards/``; it answers when as many are waiting as are expected."""

    ranges: list[tuple[str, str]] = field(default_factory=list)
    barrier: threading.Barrier = field(default_factory=lambda: threading.Barrier(1))

    def expect(self, count: int) -> None:
        self.ranges.clear()
        self.barrier = threading.Barrier(count, timeout=20)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    made, plain = Server(), WSGIRequestHandler.run_wsgi

    def run(handler: WSGIRequestHandler) -> None:
        if handler.command == "GET" and "/shards/" in handler.path and "list-type" not in handler.path:
            made.ranges.append((handler.path, handler.headers.get("Range", "")))
            made.barrier.wait()  # broken, and so an error, when the others don't come
        plain(handler)

    monkeypatch.setattr(WSGIRequestHandler, "run_wsgi", run)
    yield made
    made.barrier.abort()


@pytest.mark.parametrize("place", ["s3"], indirect=True)
def test_a_query_is_one_round_of_requests(place: Place, server: Server) -> None:
    caches = {f"doc-{i}": make_cache(3 + i, i, layers=24) for i in range(DOCUMENTS)}
    names = list(caches)
    writer = place.open(create=True)
    for start in range(0, DOCUMENTS, 5):  # four shards
        writer.commit(writer.write_shard([(n, caches[n]) for n in names[start : start + 5]]))
    reader = place.open()
    rows = list(reader.lookup(names).values())

    server.expect(4)  # what is asked once of a shard: its footer
    footers = reader._reader.footers(list(dict.fromkeys(r.shard for r in rows)))
    assert len(footers) == len(server.ranges) == 4

    server.expect(DOCUMENTS)
    loaded = reader.load(rows)
    assert all(same(found, caches[name]) for name, found in zip(names, loaded, strict=True))
    assert len(set(server.ranges)) == len(server.ranges) == DOCUMENTS  # of 24 layers each
    assert all(wanted.startswith("bytes=") for _, wanted in server.ranges)

    server.expect(3)  # a document named twice is read once
    assert len(reader.load([*rows[:3], *rows[:3]])) == 6
    assert len(server.ranges) == 3
