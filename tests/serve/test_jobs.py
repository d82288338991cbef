"""Jobs outlive whoever accepted them: their files in a directory and in a bucket, and the queue that takes them up."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from moto.server import ThreadedMotoServer
from store_places import FINGERPRINT, Place, local_place, make_cache, s3_place

from kvlink_core.errors import StoreUnavailableError
from kvlink_core.store.lifecycle import StoreKeeper, collect, verify
from kvlink_core.store.storage import Storage, open_storage
from serve.documents import DocumentService
from serve.job_files import JobFiles, JobState, JobTexts
from serve.settings import DocumentSettings
from serve.wire import ApiError, Job, JobDocument, ModelCard, NewDocument, StoredPart

MINE = FINGERPRINT.digest
ID = "job_" + "0a" * 16


@pytest.fixture(params=["local", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    if request.param == "local":
        yield local_place(tmp_path / "a store")
        return
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield s3_place(f"http://{host}:{port}")
    server.stop()


def files(place: Place) -> JobFiles:
    place.open(create=True).close()
    return JobFiles(open_storage(place.url, place.options))


def texts(*ids: str, at: float = 1.5, fingerprint: str = MINE) -> JobTexts:
    documents = tuple(NewDocument(i, f"Text of {i}. äé\U0001f600", "Title" if i == "a" else None) for i in ids)
    return JobTexts(fingerprint=fingerprint, codec="raw", created_at=at, documents=documents)


def test_what_is_kept_is_found_again_and_only_by_its_own(place: Place) -> None:
    jobs = files(place)
    second = ID.replace("0a", "0b")
    jobs.accept("acme", ID, texts("a", "b", at=2.0))
    jobs.accept("other", second, texts("c", at=1.0))
    jobs.accept("acme", ID.replace("0a", "0c"), texts("d", fingerprint="another model"))

    again = files(place)  # as another process sees it
    found = again.unfinished(MINE, "raw")
    assert [(job.namespace, job.id, job.texts, job.state) for job in found] == [
        ("other", second, texts("c", at=1.0), None),
        ("acme", ID, texts("a", "b", at=2.0), None),
    ]
    queued = (JobDocument("a", "queued"), JobDocument("b", "queued"))
    assert again.find("acme", ID) == Job(ID, "queued", 2, None, queued)
    assert again.find("other", ID) is None

    done = JobDocument("a", "done", (StoredPart("a#0", 3, 12), StoredPart("a#1", 4, 16)))
    failed = JobDocument("b", "failed", error=ApiError(400, "no text", "empty_document", "documents", 1.5))
    half = JobState(created_at=2.0, finished_at=None, documents=(done, JobDocument("b", "queued")))
    again.note("acme", ID, half)
    assert jobs.find("acme", ID) == Job(ID, "running", 2, None, half.documents)
    assert [job.state for job in jobs.unfinished(MINE, "raw") if job.id == ID] == [half]
    jobs.finish("acme", ID, JobState(created_at=2.0, finished_at=9.5, documents=(done, failed)))
    assert again.find("acme", ID) == Job(ID, "failed", 2, 9, (done, failed))
    assert [job.id for job in again.unfinished(MINE, "raw")] == [second]
    assert place.names("jobs/acme") == sorted([f"{'0a' * 16}.state.json", f"{'0c' * 16}.texts.json"])


def test_finished_jobs_go_and_others_stay(place: Place) -> None:
    jobs = files(place)
    ended = JobState(created_at=1.0, finished_at=2.0, documents=())
    ids = [f"job_{n:032x}" for n in range(4)]
    for namespace, job_id in (("a", ids[0]), ("a", ids[1]), ("b", ids[2])):
        jobs.accept(namespace, job_id, texts("x"))
        jobs.finish(namespace, job_id, ended)
    jobs.accept("a", ids[3], texts("x"))
    jobs.note("a", ids[3], JobState(created_at=1.0, finished_at=None, documents=()))
    assert jobs.clean(days=1, most=1) == 1
    assert sum(jobs.find("a", job_id) is not None for job_id in ids[:2]) == 1
    assert jobs.find("b", ids[2]) is not None
    assert jobs.clean(days=-1, most=1) == 2
    assert [(job.namespace, job.id) for job in jobs.unfinished(MINE, "raw")] == [("a", ids[3])]


def test_who_looks_after_the_store_leaves_jobs_alone_until_they_are_nobodys(tmp_path: Path) -> None:
    place = local_place(tmp_path / "store")
    with place.open(create=True) as store:
        store.commit(store.write_shard([("a", make_cache(5, 1))]))
    jobs = JobFiles(open_storage(place.url))
    live, lost = ID, ID.replace("0a", "0b")
    for job_id in (live, lost):
        jobs.accept("acme", job_id, texts("a"))
    jobs.note("acme", live, JobState(created_at=1.0, finished_at=None, documents=()))
    folder = tmp_path / "store" / "jobs" / "acme"
    torn, mine = folder / f".tmp-{'ab' * 16}", folder / "notes.json"
    torn.write_text("{")
    mine.write_text("somebody's own")
    month_ago = time.time() - 31 * 86400
    for path in (folder / f"{'0a' * 16}.texts.json", folder / f"{'0b' * 16}.texts.json", torn, mine):
        os.utime(path, (month_ago, month_ago))
    with StoreKeeper.open(place.url) as keeper:
        assert verify(keeper).sound
        gone = collect(keeper, timedelta(0), dry_run=False)
        assert gone.unfinished == [f"jobs/acme/{torn.name}", f"jobs/acme/{'0b' * 16}.texts.json"]
        assert gone.shards == []
    assert sorted(os.listdir(folder)) == [f"{'0a' * 16}.state.json", f"{'0a' * 16}.texts.json", "notes.json"]
    assert [job.id for job in jobs.unfinished(MINE, "raw")] == [live]


def test_damaged_files_are_nobodys_job(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    place = local_place(tmp_path / "store")
    jobs = files(place)
    jobs.accept("acme", ID, texts("a"))
    for damaged in (b"", b"{", b"[]", b'{"format":2}', b'{"format":1,"documents":"x"}', b"\xff"):
        place.write(f"jobs/acme/{'0a' * 16}.texts.json", damaged)
        assert jobs.unfinished(MINE, "raw") == []
        assert jobs.find("acme", ID) is None
    assert "not a job of this version" in caplog.text


# The queue on them.


class Encoders:
    """Stores nothing, but says so; ``stop`` holds it up before a batch that has this document."""

    def __init__(self, stop: str | None = None) -> None:
        self.asked: list[list[str]] = []
        self.stop = stop
        self.stopped = asyncio.Event()

    async def card(self) -> ModelCard:
        return ModelCard("m", 0, 100, MINE, ("full",), "full")

    async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        if self.stop in [d.id for d in documents]:
            self.stopped.set()
            await asyncio.Event().wait()
        self.asked.append([d.id for d in documents])
        return tuple(JobDocument(d.id, "done") for d in documents)

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...]:
        return ()


def life(place: Place, engine: Encoders, work: Callable[[DocumentService], Awaitable[Any]]) -> Any:
    """A deployment from its start to its sudden end: what it did not write down is lost."""

    async def go() -> Any:
        place.open(create=True).close()

        def open_keeper() -> StoreKeeper:
            return StoreKeeper.open(place.url, storage_options=place.options)

        service = DocumentService(engine, open_keeper, DocumentSettings())
        service.start()
        return await asyncio.wait_for(work(service), 60)

    return asyncio.run(go())


async def ended(service: DocumentService, job_id: str) -> Job:
    while True:
        now = await service.job("n", job_id)
        assert isinstance(now, Job), now
        if now.finished_at is not None:
            return now
        await asyncio.sleep(0.01)


def test_a_job_is_carried_on_by_who_comes_after(place: Place) -> None:
    ids = [f"{n:02}" for n in range(40)]

    async def die(service: DocumentService) -> str:
        job = await service.add("n", [NewDocument(i, "x") for i in ids])
        assert isinstance(job, Job)
        later = await service.add("n", [NewDocument("later", "x")])
        assert isinstance(later, Job)
        await first.stopped.wait()
        return job.id

    async def carry_on(service: DocumentService) -> Job:
        seen = await service.job("n", job_id)  # at once, whoever is at work
        assert isinstance(seen, Job)
        assert seen.finished_at is None or seen.status == "done"
        missing = await service.job("other", job_id)
        unknown = await service.job("other", "job_" + "f" * 32)
        assert isinstance(missing, ApiError)
        assert isinstance(unknown, ApiError)
        assert missing.message.replace(job_id, "") == unknown.message.replace("job_" + "f" * 32, "")
        done = await ended(service, job_id)
        while len(second.asked) < 3:  # the job that came after it
            await asyncio.sleep(0.01)
        return done

    first = Encoders(stop="20")
    job_id = life(place, first, die)
    assert first.asked == [ids[:16]]
    second = Encoders()
    done = life(place, second, carry_on)
    assert [(d.id, d.status) for d in done.documents] == [(i, "done") for i in ids]
    assert second.asked == [ids[16:32], ids[32:], ["later"]]
    assert life(place, Encoders(), lambda service: ended(service, job_id)) == done


def test_what_was_deleted_does_not_come_back_with_the_next_deployment(tmp_path: Path) -> None:
    place = local_place(tmp_path / "store")

    async def die(service: DocumentService) -> str:
        job = await service.add("n", [NewDocument("first", "x")])
        later = await service.add("n", [NewDocument("gone", "x"), NewDocument("kept", "x")])
        assert isinstance(job, Job)
        assert isinstance(later, Job)
        await asyncio.sleep(0.1)
        assert not isinstance(await service.delete("n", "gone"), ApiError)
        return later.id

    class Away(Encoders):
        async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
            raise StoreUnavailableError("away")

    job_id = life(place, Away(), die)
    engine = Encoders()
    done = life(place, engine, lambda service: ended(service, job_id))
    assert [(d.id, d.status) for d in done.documents] == [("gone", "failed"), ("kept", "done")]
    assert engine.asked == [["first"], ["kept"]]


def test_a_job_that_cannot_be_kept_is_not_accepted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = local_place(tmp_path / "store")

    def full(self: JobFiles, *args: object) -> None:
        raise StoreUnavailableError(f"cannot write to {place.url}: no space left on device")

    async def work(service: DocumentService) -> None:
        monkeypatch.setattr(JobFiles, "accept", full)
        refused = await service.add("n", [NewDocument("a", "x")])
        assert isinstance(refused, ApiError)
        assert (refused.status, refused.code) == (503, "store_unavailable")
        assert place.url not in refused.message
        monkeypatch.undo()
        accepted = await service.add("n", [NewDocument("a", "x")])
        assert isinstance(accepted, Job)
        assert (await ended(service, accepted.id)).status == "done"

    life(place, Encoders(), work)


def test_an_end_that_cannot_be_written_down_is_not_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Told earlier, a client could replace the document, and a new deployment would bring the old one back."""
    monkeypatch.setattr("serve.job_queue._WAITS_S", (0.01,))
    failures = iter([StoreUnavailableError("away")] * 5)
    finish = JobFiles.finish

    def sometimes(self: JobFiles, namespace: str, job_id: str, state: JobState) -> None:
        for error in failures:
            seen.append(self.find(namespace, job_id))
            raise error
        finish(self, namespace, job_id, state)

    seen: list[Job | None] = []
    monkeypatch.setattr(JobFiles, "finish", sometimes)

    async def work(service: DocumentService) -> Job:
        job = await service.add("n", [NewDocument("a", "x")])
        assert isinstance(job, Job)
        while len(seen) < 3:
            await asyncio.sleep(0.01)
        told = await service.job("n", job.id)
        assert isinstance(told, Job)
        assert told.finished_at is None or len(seen) == 5
        return await ended(service, job.id)

    assert life(local_place(tmp_path / "store"), Encoders(), work).status == "done"
    assert [job.finished_at for job in seen if job] == [None] * 5


@pytest.mark.parametrize(
    "job_id",
    [
        *["../../../etc/passwd", "job_../../store", "job_" + "0a" * 16 + ".texts.json", "job_", "", "."],
        *["0a" * 16, "job_" + "0A" * 16, "job_*", "s3://bucket/x", "job_" + "0a" * 16 + "\0"],
    ],
)
def test_an_id_of_a_request_never_becomes_a_path(tmp_path: Path, job_id: str) -> None:
    place = local_place(tmp_path / "store")
    files(place).accept("acme", ID, texts("a"))

    class Watched:
        def __init__(self, storage: Storage) -> None:
            self._storage = storage
            self.paths: list[str] = []

        def __getattr__(self, name: str) -> Any:
            def call(path: str) -> Any:
                self.paths.append(path)
                return getattr(self._storage, name)(path)

            return call

    watched: Any = Watched(open_storage(place.url))
    assert JobFiles(watched).find("acme", job_id) is None
    assert watched.paths == ["jobs/acme"]
