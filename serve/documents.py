"""The documents deployment: jobs that store documents, and what is stored of a namespace.

One replica, so that what is done to one document is done in order. It holds no model: a replica of the engine encodes
and writes. Jobs are kept in the store (``job_files``): whoever comes after a replica that died carries them on.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from kvlink_core.chunking import CHUNK_SEPARATOR
from kvlink_core.errors import UnknownDocumentError
from kvlink_core.store.lifecycle import Scope, StoreKeeper, delete
from serve.job_files import JobFiles
from serve.job_queue import JobQueue
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

#: How long to wait before the store is asked again for the jobs of before.
_WAIT_S = 5.0

#: When a deployment that was replaced is certainly gone.
_DRAINED_S = 60.0


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


@dataclass(slots=True)
class _Known:
    version: int
    listing: Listing


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
        self._opening = asyncio.Lock()
        self._queue: JobQueue | None = None
        self._starting: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Carry on the jobs of before, as soon as engine and store answer. Needs an event loop that runs."""
        self._starting = asyncio.create_task(self._start())

    async def _start(self) -> None:
        # Once more when one that is being replaced has had the time to finish its requests: it may have taken a job.
        for wait in (0.0, _DRAINED_S):
            await asyncio.sleep(wait)
            while not await self._resume():
                await asyncio.sleep(_WAIT_S)

    async def _resume(self) -> bool:
        try:
            await (await self._jobs()).resume()
        except Exception as error:  # whoever adds a document is told
            logger.warning("the jobs of before cannot be carried on yet", exc_info=error)
            return False
        return True

    async def _jobs(self) -> JobQueue:
        """The queue, with the jobs of before in it. Raises ``ApiException`` or ``StoreError``."""
        async with self._opening:
            if self._queue is None:
                card = await self._engine.card()
                queue = JobQueue(
                    await self._files(),
                    fingerprint=card.fingerprint,
                    codec=self._codec,
                    store=self._store,
                    changing=self._changing,
                    settings=self._settings,
                    retry_after_s=self._retry_after_s,
                )
                await queue.resume()
                self._queue = queue
            return self._queue

    async def _files(self) -> JobFiles:
        return JobFiles(await self._with_keeper(lambda keeper: keeper.storage))

    async def add(self, namespace: str, documents: Sequence[NewDocument]) -> Job | ApiError:
        """Keep documents to be stored; returns the job once the store has it."""
        try:
            return await (await self._jobs()).add(namespace, documents)
        except Exception as error:  # it would reach the client as Ray's traceback
            return _fault("keep a job", error)

    async def job(self, namespace: str, job_id: str) -> Job | ApiError:
        """A job of this namespace; another's is not there."""
        try:
            # Files answer where there is no engine yet that could carry them on.
            queue = self._queue
            found = (await queue.find(namespace, job_id)) if queue else await self._find_file(namespace, job_id)
        except Exception as error:  # as in add
            return _fault("find a job", error)
        message = f"no such job: {job_id[:80]!r}; finished ones are forgotten after a while."
        return ApiError(404, message, "job_not_found") if found is None else found

    async def _find_file(self, namespace: str, job_id: str) -> Job | None:
        return await asyncio.to_thread((await self._files()).find, namespace, job_id)

    async def page(self, namespace: str, *, after: str, prefix: str, limit: int) -> DocumentPage | ApiError:
        """Some documents of a namespace, sorted by id."""
        try:
            return (await self._listing(namespace)).page(after=after, prefix=prefix, limit=limit)
        except Exception as error:  # as in add
            return _fault("list documents", error)

    async def find(self, namespace: str, document_id: str) -> DocumentEntry | ApiError:
        """One document."""
        try:
            found = (await self._listing(namespace)).find(document_id)
            if found is None:
                return _unknown(document_id)
            return replace(found, tiers=await self._tiers(namespace, found))
        except Exception as error:  # as in add
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
            queue = await self._jobs()
            async with self._changing:
                dropped = await queue.withdraw(namespace, document_id)
                listing = await self._listing(namespace)
                found = listing.find(document_id)
                if found is None:
                    entry = DocumentEntry(document_id, 0, 0, 0, None, int(time.time()))
                    return entry if dropped else _unknown(document_id)
                await self._delete(namespace, listing.stored_ids(document_id))
                return found
        except Exception as error:  # as in add
            return _fault("delete a document", error)

    async def _store(self, namespace: str, batch: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        results = await self._engine.add_documents(namespace, batch)
        try:
            await self._drop_remains(namespace, [r for r in results if r.status == "done"])
        except Exception as error:  # it is stored; what is left of an earlier version does no harm to it
            logger.warning("parts of earlier versions are left", exc_info=error)
        return results

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


def _unknown(document_id: str) -> ApiError:
    error = UnknownDocumentError([document_id])
    return ApiError(404, f"no such document: {document_id[:200]!r}.", error.code, "id")


def _fault(what: str, error: Exception) -> ApiError:
    fault = api_error(error)
    logger.log(logging.ERROR if fault.status >= 500 else logging.INFO, "cannot %s", what, exc_info=error)
    return fault
