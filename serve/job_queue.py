"""The queue of the documents deployment: jobs one after the other, each written down before it is promised or told.

What is done twice does no harm, since what the store has already is neither encoded nor committed again. What is done
late would: a document that was deleted or replaced must not come back. So jobs are carried on in their order, and
whoever changes documents waits until what was done before is written down (``changing``, ``withdraw``).
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from itertools import chain, repeat

from serve.job_files import JobFiles, JobState, JobTexts, Unfinished, outcomes
from serve.settings import DocumentSettings
from serve.wire import ApiError, Job, JobDocument, NewDocument, api_error

logger = logging.getLogger("ray.serve")

#: What is encoded between two answers of a replica, and committed together.
_BATCH_DOCUMENTS = 16
_BATCH_BYTES = 2**20

#: How long to wait before what failed because something was away is tried again; the last one for ever.
_WAITS_S = (1.0, 2.0, 4.0, 8.0, 15.0, 30.0)

#: Finished jobs that are answered for without reading a file: clients ask again and again for those of just now.
_REMEMBERED = 256

#: Seconds between two looks for jobs that ended too long ago.
_CLEANING_S = 3600.0

Key = tuple[str, str]  # namespace and id


@dataclass(slots=True, eq=False)
class _Job:
    namespace: str
    id: str
    created_at: float
    waiting: deque[NewDocument]
    documents: dict[str, JobDocument]
    found: bool = False  # another process accepted it, and may be at work on it still
    running: bool = False
    told: bool = True  # whether what is known of it is written down

    def state(self, finished_at: float | None = None) -> JobState:
        documents = tuple(self.documents.values())
        return JobState(created_at=self.created_at, finished_at=finished_at, documents=documents)

    @property
    def view(self) -> Job:
        return self.state().view(self.id, running=self.running)

    @property
    def nbytes(self) -> int:
        return sum(map(_size, self.waiting))


class JobQueue:
    """Jobs of one model's documents. For one event loop.

    Args:
        files: where they are kept.
        fingerprint, codec: of the caches that they are to make.
        store: encodes and stores a batch. Raises ``ApiException`` when none of it was.
        changing: held while a batch is stored and written down.
        settings: limits.
        retry_after_s: what clients are told to wait when too much waits.
    """

    def __init__(
        self,
        files: JobFiles,
        *,
        fingerprint: str,
        codec: str,
        store: Callable[[str, Sequence[NewDocument]], Awaitable[tuple[JobDocument, ...]]],
        changing: asyncio.Lock,
        settings: DocumentSettings,
        retry_after_s: float,
    ) -> None:
        self._files = files
        self._fingerprint = fingerprint
        self._codec = codec
        self._store = store
        self._changing = changing
        self._settings = settings
        self._retry_after_s = retry_after_s
        self._waiting: deque[_Job] = deque()
        self._jobs: dict[Key, _Job] = {}  # that are not over
        self._ended: dict[Key, Job] = {}  # the newest of those that are
        self._nbytes = 0
        self._away_since: float | None = None
        self._cleaned = float("-inf")
        self._unclean = 0
        self._worker: asyncio.Task[None] | None = None

    async def resume(self) -> None:
        """Carry on the jobs that the store has. Raises ``StoreUnavailableError``."""
        found = await asyncio.to_thread(self._files.unfinished, self._fingerprint, self._codec)
        new = [each for each in found if not {(each.namespace, each.id)} & (self._jobs.keys() | self._ended.keys())]
        for each in new:
            self._queue(_resumed(each))
        if new:
            logger.info("%d jobs of before are carried on", len(new))
        await self._clean()

    async def add(self, namespace: str, documents: Sequence[NewDocument]) -> Job | ApiError:
        """Keep documents to be stored; returns the job once it is certain.

        Raises:
            StoreUnavailableError: it cannot be kept.
        """
        nbytes = sum(map(_size, documents))
        if self._nbytes + nbytes > self._settings.max_pending_bytes:
            message = "too many documents wait to be stored; try again."
            return ApiError(503, message, "overloaded", retry_after_s=self._retry_after_s)
        queued = {d.id: JobDocument(d.id, "queued") for d in documents}
        job = _Job(namespace, f"job_{secrets.token_hex(16)}", time.time(), deque(documents), queued)
        texts = JobTexts(
            fingerprint=self._fingerprint, codec=self._codec, created_at=job.created_at, documents=tuple(documents)
        )
        self._jobs[namespace, job.id] = job  # nobody else is to take it up
        self._nbytes += nbytes  # others ask meanwhile
        try:
            await asyncio.to_thread(self._files.accept, namespace, job.id, texts)
        except BaseException:
            del self._jobs[namespace, job.id]
            raise
        finally:
            self._nbytes -= nbytes
        self._queue(job)
        return job.view

    async def find(self, namespace: str, job_id: str) -> Job | None:
        """A job of this namespace. Raises ``StoreUnavailableError``."""
        job = self._jobs.get((namespace, job_id))
        if job is not None:
            return job.view
        ended = self._ended.get((namespace, job_id))
        return ended or await asyncio.to_thread(self._files.find, namespace, job_id)

    async def withdraw(self, namespace: str, document_id: str) -> bool:
        """Take a document out of what waits, since it is being deleted; whether it was there. ``changing`` is held.

        Raises:
            StoreUnavailableError: it cannot be written down, and the document must not be deleted yet.
        """
        dropped = False
        for job in self._waiting:
            gone = [d for d in job.waiting if job.namespace == namespace and d.id == document_id]
            if gone:
                self._nbytes -= sum(map(_size, gone))
                job.waiting = deque(d for d in job.waiting if d.id != document_id)
                deleted = ApiError(409, "the document was deleted before it was stored.", "document_deleted")
                job.documents[document_id] = JobDocument(document_id, "failed", error=deleted)
                job.told = False
                dropped = True
        for job in self._waiting:
            await self._tell(job)
        return dropped

    def _queue(self, job: _Job) -> None:
        self._jobs[job.namespace, job.id] = job
        self._waiting.append(job)
        self._nbytes += job.nbytes
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())

    async def _work(self) -> None:
        """Store what waits, job after job."""
        while self._waiting:
            job = self._waiting[0]
            job.running = True
            waits = chain(_WAITS_S, repeat(_WAITS_S[-1]))
            while job.waiting:
                async with self._changing:
                    again = await self._step(job)
                if again:
                    await asyncio.sleep(next(waits))
                else:
                    waits = chain(_WAITS_S, repeat(_WAITS_S[-1]))
            await self._end(job)

    async def _step(self, job: _Job) -> bool:
        """Store a batch of a job; true where that is to be tried again."""
        if job.found and not await self._catch_up(job):
            return True
        batch = _next_batch(job.waiting)
        for document in batch:
            job.documents[document.id] = JobDocument(document.id, "running")
        try:
            results = await self._store(job.namespace, batch) if batch else ()
            self._away_since = None
        except Exception as error:
            fault = api_error(error)
            if self._is_worth_waiting(fault):
                job.waiting.extendleft(reversed(batch))
                return True
            results = tuple(JobDocument(d.id, "failed", error=fault) for d in batch)
        self._nbytes -= sum(map(_size, batch))
        job.documents |= {result.id: result for result in results}
        job.told = False
        try:
            await self._tell(job)
        except Exception as error:  # written down before it is told to be over, or before anything is deleted
            logger.warning("job %s: how far it is cannot be written down yet", job.id, exc_info=error)
        return False

    def _is_worth_waiting(self, error: ApiError) -> bool:
        """What fails because something is away is tried again, for so long since it was last there."""
        if error.status != 503:
            return False
        now = time.monotonic()
        self._away_since = self._away_since or now
        return now - self._away_since < self._settings.give_up_after_s

    async def _catch_up(self, job: _Job) -> bool:
        """See what another process did of a job since; false where that cannot be known now."""
        try:
            state = await asyncio.to_thread(self._files.state, job.namespace, job.id)
        except Exception as error:
            logger.warning("job %s: how far it is cannot be read now", job.id, exc_info=error)
            return not self._is_worth_waiting(api_error(error))
        if state is not None:
            before = job.nbytes
            done = {d.id: d for d in state.documents if d.status in ("done", "failed")}
            job.documents |= done
            job.waiting = deque(d for d in job.waiting if d.id not in done)
            self._nbytes -= before - job.nbytes
        return True

    async def _tell(self, job: _Job) -> None:
        if not job.told:
            job.told = True
            try:
                await asyncio.to_thread(self._files.note, job.namespace, job.id, job.state())
            except BaseException:
                job.told = False
                raise

    async def _end(self, job: _Job) -> None:
        """A job is over once that is written down: told earlier, it could be begun again after what came later."""
        state = job.state(finished_at=time.time())
        for wait in chain(_WAITS_S, repeat(_WAITS_S[-1])):
            try:
                async with self._changing:
                    await asyncio.to_thread(self._files.finish, job.namespace, job.id, state)
                break
            except Exception as error:  # nothing else can be stored now either
                logger.warning("job %s: its end cannot be written down yet", job.id, exc_info=error)
                await asyncio.sleep(wait)
        self._waiting.popleft()
        del self._jobs[job.namespace, job.id]
        self._ended[job.namespace, job.id] = state.view(job.id, running=False)
        self._unclean += 1
        while len(self._ended) > min(_REMEMBERED, self._settings.max_jobs):
            del self._ended[next(iter(self._ended))]
        await self._clean()

    async def _clean(self) -> None:
        """Drop old jobs now and then."""
        now, most = time.monotonic(), self._settings.max_jobs
        if now - self._cleaned < _CLEANING_S and self._unclean <= most // 10:
            return
        self._cleaned, self._unclean = now, 0
        try:
            await asyncio.to_thread(self._files.clean, days=self._settings.job_days, most=most)
        except Exception as error:  # they are dropped another time
            logger.warning("old jobs are left", exc_info=error)


def _resumed(found: Unfinished) -> _Job:
    documents = dict(outcomes(found))
    over = {d.id for d in documents.values() if d.status in ("done", "failed")}
    documents |= {d.id: JobDocument(d.id, "queued") for d in found.texts.documents if d.id not in over}
    waiting = deque(d for d in found.texts.documents if d.id not in over)
    return _Job(found.namespace, found.id, found.texts.created_at, waiting, documents, found=True)


def _next_batch(waiting: deque[NewDocument]) -> list[NewDocument]:
    batch: list[NewDocument] = []
    size = 0
    while waiting and len(batch) < _BATCH_DOCUMENTS and (not batch or size + _size(waiting[0]) <= _BATCH_BYTES):
        batch.append(waiting.popleft())
        size += _size(batch[-1])
    return batch


def _size(document: NewDocument) -> int:
    return len(document.text.encode()) + len((document.title or "").encode()) + len(document.id.encode())
