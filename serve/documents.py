"""The documents deployment: jobs that store documents, and what is stored of a namespace.

One replica, so that a job is known whichever ingress asks, and so that what is done to one document is done in order.
It holds no model: a replica of the engine encodes and writes. It remembers jobs in memory: once it was replaced they
are unknown, and what was not stored must be sent again.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol, TypeVar

from kvlink_core.chunking import CHUNK_SEPARATOR
from kvlink_core.errors import UnknownDocumentError
from kvlink_core.store.lifecycle import Scope, StoreKeeper, delete
from serve.listing import Listing
from serve.settings import DocumentSettings
from serve.wire import (
    ApiError,
    ApiException,
    DocumentEntry,
    DocumentPage,
    Job,
    JobDocument,
    ModelCard,
    NewDocument,
    api_error,
)

logger = logging.getLogger("ray.serve")

T = TypeVar("T")

#: What is encoded between two answers of a replica, and committed together.
_BATCH_DOCUMENTS = 16
_BATCH_BYTES = 2**20

#: How long to wait before what failed because something was away is tried again.
_WAITS_S = (1.0, 2.0, 4.0, 8.0)


class Encoders(Protocol):
    """What is asked of the engine."""

    async def card(self) -> ModelCard:
        """What is served."""
        ...

    async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        """Encode and store. Raises ``ApiException`` when none was."""
        ...

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...]:
        """The tiers that hold all of these. Raises ``ApiException``."""
        ...


@dataclass(slots=True, eq=False)
class _Job:
    id: str
    namespace: str
    created_at: float
    waiting: deque[NewDocument]
    documents: dict[str, JobDocument]
    finished_at: float | None = None
    running: bool = False

    @property
    def view(self) -> Job:
        if self.finished_at is None:
            status = "running" if self.running else "queued"
        else:
            status = "failed" if any(d.status == "failed" for d in self.documents.values()) else "done"
        ended = None if self.finished_at is None else int(self.finished_at)
        return Job(self.id, status, int(self.created_at), ended, tuple(self.documents.values()))  # type: ignore[arg-type]


@dataclass(slots=True)
class _Known:
    version: int
    listing: Listing


@dataclass(slots=True)
class _Queue:
    jobs: OrderedDict[str, _Job] = field(default_factory=OrderedDict)  # all that are remembered, the oldest first
    waiting: deque[_Job] = field(default_factory=deque)
    nbytes: int = 0


class DocumentService:
    """Adds, lists and deletes documents. For one event loop.

    Args:
        engine: encodes.
        open_keeper: opens the store.
        settings: limits.
        codec: of the rows that the engine finds.
        retry_after_s: what clients are told to wait when too much waits.
    """

    def __init__(
        self,
        engine: Encoders,
        open_keeper: Callable[[], StoreKeeper],
        settings: DocumentSettings,
        *,
        codec: str = "raw",
        retry_after_s: float = 5.0,
    ) -> None:
        self._engine = engine
        self._open_keeper = open_keeper
        self._settings = settings
        self._codec = codec
        self._retry_after_s = retry_after_s
        self._keeper: StoreKeeper | None = None
        self._keeping = asyncio.Lock()  # a keeper is for one thread at a time
        self._changing = asyncio.Lock()  # what changes a document is done in order
        self._known: OrderedDict[str, _Known] = OrderedDict()
        self._queue = _Queue()
        self._worker: asyncio.Task[None] | None = None

    async def add(self, namespace: str, documents: Sequence[NewDocument]) -> Job | ApiError:
        """Queue documents to be stored; returns the job at once."""
        nbytes = sum(_size(d) for d in documents)
        if self._queue.nbytes + nbytes > self._settings.max_pending_bytes:
            message = "too many documents wait to be stored; try again."
            return ApiError(503, message, "overloaded", retry_after_s=self._retry_after_s)
        queued = {d.id: JobDocument(d.id, "queued") for d in documents}
        job = _Job(f"job_{secrets.token_hex(16)}", namespace, time.time(), deque(documents), queued)
        self._queue.jobs[job.id] = job
        self._queue.waiting.append(job)
        self._queue.nbytes += nbytes
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return job.view

    async def job(self, namespace: str, job_id: str) -> Job | ApiError:
        """A job of this namespace; another's is not there."""
        job = self._queue.jobs.get(job_id)
        if job is None or job.namespace != namespace:
            message = f"no such job: {job_id[:80]!r}; finished ones are forgotten after a while."
            return ApiError(404, message, "job_not_found")
        return job.view

    async def page(self, namespace: str, *, after: str, prefix: str, limit: int) -> DocumentPage | ApiError:
        """Some documents of a namespace, sorted by id."""
        try:
            return (await self._listing(namespace)).page(after=after, prefix=prefix, limit=limit)
        except Exception as error:  # it would reach the client as Ray's traceback
            return _fault("list documents", error)

    async def find(self, namespace: str, document_id: str) -> DocumentEntry | ApiError:
        """One document."""
        try:
            found = (await self._listing(namespace)).find(document_id)
            if found is None:
                return _unknown(document_id)
            return replace(found, tiers=await self._tiers(namespace, found))
        except Exception as error:  # as in page
            return _fault("find a document", error)

    async def _tiers(self, namespace: str, found: DocumentEntry) -> tuple[str, ...] | None:
        """Where a document is, as its home replica says; ``None`` where none says."""
        ids = [found.id] if found.chunks == 1 else [f"{found.id}{CHUNK_SEPARATOR}{n}" for n in range(found.chunks)]
        try:
            return await self._engine.document_tiers(namespace, ids) or None
        except ApiException:
            return None

    async def delete(self, namespace: str, document_id: str) -> DocumentEntry | ApiError:
        """Take a document and its parts out of the catalog; returns what it was."""
        try:
            async with self._changing:
                dropped = self._withdraw(namespace, document_id)
                listing = await self._listing(namespace)
                found = listing.find(document_id)
                if found is None:
                    entry = DocumentEntry(document_id, 0, 0, 0, None, int(time.time()))
                    return entry if dropped else _unknown(document_id)
                await self._delete(namespace, listing.stored_ids(document_id))
                return found
        except Exception as error:  # as in page
            return _fault("delete a document", error)

    def _withdraw(self, namespace: str, document_id: str) -> bool:
        """Take a document out of the jobs that wait: what was deleted must not come back."""
        dropped = False
        for job in self._queue.waiting:
            if job.namespace == namespace:
                kept = deque(d for d in job.waiting if d.id != document_id)
                if len(kept) < len(job.waiting):
                    self._queue.nbytes -= sum(_size(d) for d in job.waiting if d.id == document_id)
                    job.waiting = kept
                    deleted = ApiError(409, "the document was deleted before it was stored.", "document_deleted")
                    job.documents[document_id] = JobDocument(document_id, "failed", error=deleted)
                    dropped = True
        return dropped

    async def _work(self) -> None:
        """Store what waits, job after job."""
        while self._queue.waiting:
            job = self._queue.waiting[0]
            job.running = True
            while job.waiting:
                async with self._changing:
                    batch = _next_batch(job.waiting)
                    if batch:
                        await self._store(job, batch)
                        self._queue.nbytes -= sum(_size(d) for d in batch)
            job.finished_at = time.time()
            self._queue.waiting.popleft()
            self._forget()

    async def _store(self, job: _Job, batch: Sequence[NewDocument]) -> None:
        for document in batch:
            job.documents[document.id] = JobDocument(document.id, "running")
        try:
            results = await self._persistently(job.namespace, batch)
        except ApiException as error:
            results = tuple(JobDocument(d.id, "failed", error=error.error) for d in batch)
        job.documents |= {result.id: result for result in results}
        try:
            await self._drop_remains(job.namespace, [r for r in results if r.status == "done"])
        except Exception as error:  # it is stored; what is left of an earlier version does no harm to it
            logger.warning("job %s: parts of earlier versions are left", job.id, exc_info=error)

    async def _persistently(self, namespace: str, batch: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        for wait in (*_WAITS_S, None):
            try:
                return await self._engine.add_documents(namespace, batch)
            except ApiException as error:
                if error.error.status != 503 or wait is None:
                    raise
                await asyncio.sleep(wait)
        raise AssertionError("the last attempt returns or raises")

    async def _drop_remains(self, namespace: str, stored: Sequence[JobDocument]) -> None:
        """Chunks that an earlier, longer version of a document had and this one has not."""
        listing = await self._listing(namespace)
        remains = [
            part
            for document in stored
            for part in set(listing.stored_ids(document.id)) - {part.id for part in document.parts}
        ]
        if remains:
            await self._delete(namespace, remains)

    def _forget(self) -> None:
        """Forget the oldest finished jobs beyond the number that is remembered."""
        jobs = self._queue.jobs
        while len(jobs) - len(self._queue.waiting) > self._settings.max_jobs:
            jobs.popitem(last=False)

    async def _delete(self, namespace: str, stored_ids: Sequence[str]) -> None:
        scope = await self._scope(namespace)
        await self._with_keeper(lambda keeper: delete(keeper, scope, stored_ids, dry_run=False))
        self._known.pop(namespace, None)

    async def _listing(self, namespace: str) -> Listing:
        card = await self._engine.card()
        scope = await self._scope(namespace)

        def look(keeper: StoreKeeper) -> _Known:
            known = self._known.get(namespace)
            keeper.catalog.refresh()
            version = keeper.catalog.version
            if known is not None and known.version == version:
                return known
            return _Known(version, Listing.read(keeper, scope, by_place=card.by_place))

        known = self._known[namespace] = await self._with_keeper(look)
        self._known.move_to_end(namespace)
        while len(self._known) > 16:
            self._known.popitem(last=False)
        return known.listing

    async def _scope(self, namespace: str) -> Scope:
        return Scope(namespace, (await self._engine.card()).fingerprint, self._codec)

    async def _with_keeper(self, work: Callable[[StoreKeeper], T]) -> T:
        def run() -> T:
            if self._keeper is None:
                self._keeper = self._open_keeper()
            return work(self._keeper)

        async with self._keeping:
            return await asyncio.to_thread(run)


def _next_batch(waiting: deque[NewDocument]) -> list[NewDocument]:
    batch: list[NewDocument] = []
    size = 0
    while waiting and len(batch) < _BATCH_DOCUMENTS and (not batch or size + _size(waiting[0]) <= _BATCH_BYTES):
        batch.append(waiting.popleft())
        size += _size(batch[-1])
    return batch


def _size(document: NewDocument) -> int:
    return len(document.text.encode()) + len((document.title or "").encode()) + len(document.id.encode())


def _unknown(document_id: str) -> ApiError:
    error = UnknownDocumentError([document_id])
    return ApiError(404, f"no such document: {document_id[:200]!r}.", error.code, "id")


def _fault(what: str, error: Exception) -> ApiError:
    fault = api_error(error)
    logger.log(logging.ERROR if fault.status >= 500 else logging.INFO, "cannot %s", what, exc_info=error)
    return fault
