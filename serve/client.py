"""The ingress's view of the engine and of the documents, and the ones that reach them through Ray Serve.

``EngineClient`` and ``DocumentsClient`` are all that the HTTP side knows, so it is tested without Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any, Protocol

import grpc
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.wire import (
    ApiError,
    ApiException,
    DocumentEntry,
    DocumentPage,
    EngineRequest,
    Event,
    Failed,
    Job,
    JobDocument,
    ModelCard,
    NewDocument,
    api_error,
)

logger = logging.getLogger("ray.serve")

#: An engine that was heard from within this time is alive; asking a busy one would only add to its queue.
HEARD_RECENTLY_S = 5.0

#: How often a request is sent whose replica died before it answered. One that kills replicas must not kill them all.
ATTEMPTS = 3


class EngineClient(Protocol):
    """What the HTTP side asks of the engine."""

    async def card(self) -> ModelCard:
        """What is served. Raises ``ApiException`` when no engine answers."""
        ...

    async def health(self) -> None:
        """Return when an engine answers, raise ``ApiException`` when none does."""
        ...

    def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """Events of one request; closing the iterator abandons it. ``Failed`` is always the last event."""
        ...


class DocumentsClient(Protocol):
    """What the HTTP side asks of the documents deployment. All raise ``ApiException``; namespaces are the caller's."""

    async def add(self, namespace: str, documents: Sequence[NewDocument]) -> Job:
        """Queue documents to be stored."""
        ...

    async def job(self, namespace: str, job_id: str) -> Job:
        """How far a job is."""
        ...

    async def page(self, namespace: str, *, after: str, prefix: str, limit: int) -> DocumentPage:
        """Documents sorted by id."""
        ...

    async def find(self, namespace: str, document_id: str) -> DocumentEntry:
        """One document."""
        ...

    async def delete(self, namespace: str, document_id: str) -> DocumentEntry:
        """Drop a document; returns what it was."""
        ...


class RayEngine:
    """The engine behind a Serve deployment handle.

    Args:
        handle: the engine deployment's ``DeploymentHandle``.
        retry_after_s: what clients are told to wait when the engine is full or away.
    """

    def __init__(self, handle: Any, *, retry_after_s: float) -> None:
        self._handle = handle
        self._stream = handle.options(stream=True)
        self._retry_after_s = retry_after_s
        self._card: ModelCard | None = None
        self._heard = float("-inf")

    async def card(self) -> ModelCard:
        """The model card; asked once: another model means another ingress as well."""
        if self._card is None:
            self._card = await self._ask("card")
        return self._card

    async def health(self) -> None:
        """An event within the last seconds proves as much as a question would."""
        if time.monotonic() - self._heard > HEARD_RECENTLY_S:
            await self._ask("ping")

    async def add_documents(self, namespace: str, documents: Sequence[NewDocument]) -> tuple[JobDocument, ...]:
        """Encode and store documents. Raises ``ApiException`` when none was."""
        added: tuple[JobDocument, ...] = _checked(await self._ask("add_documents", namespace, tuple(documents)))
        return added

    async def document_tiers(self, namespace: str, ids: Sequence[str]) -> tuple[str, ...]:
        """The tiers of the replica that is these documents' home. Raises ``ApiException``."""
        tiers: tuple[str, ...] = _checked(await self._ask("document_tiers", namespace, tuple(ids)))
        return tiers

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """Events of one request. Closing or cancelling it cancels the replica's side too.

        Where a replica dies before its first event, another one is asked; the client notices nothing.
        """
        for attempt in range(1, ATTEMPTS + 1):
            response = self._stream.generate.remote(request)
            started = done = False
            try:
                async for event in response:
                    self._heard = time.monotonic()
                    started = True
                    yield event
                done = True
                return
            except Exception as error:  # Ray raises its own errors, the replica's and gRPC's: each must end the answer
                done = True
                if _lost(error) and not started and attempt < ATTEMPTS:
                    logger.warning("a replica died before it answered; asking another one: %s", type(error).__name__)
                    continue
                yield Failed(self._fault(error))
                return
            finally:
                if not done:
                    response.cancel()

    async def _ask(self, method: str, *args: Any) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                answer = await getattr(self._handle, method).remote(*args)
            except Exception as error:  # as in generate
                if _lost(error) and attempt < ATTEMPTS:
                    continue
                raise ApiException(self._fault(error)) from error
            self._heard = time.monotonic()
            return answer
        raise AssertionError("the last attempt returns or raises")

    def _fault(self, error: Exception) -> ApiError:
        """What Ray raises, as an error of ours."""
        return ray_fault(error, "engine", self._retry_after_s)


class RayDocuments:
    """The documents deployment behind a Serve deployment handle.

    A question is asked again of the one that follows one that died, a change is not: it may have been made.
    """

    def __init__(self, handle: Any, *, retry_after_s: float) -> None:
        self._handle = handle
        self._retry_after_s = retry_after_s

    async def add(self, namespace: str, documents: Sequence[NewDocument]) -> Job:
        """Queue documents to be stored."""
        job: Job = await self._ask("add", namespace, tuple(documents))
        return job

    async def job(self, namespace: str, job_id: str) -> Job:
        """How far a job is."""
        job: Job = await self._ask_again("job", namespace, job_id)
        return job

    async def page(self, namespace: str, *, after: str, prefix: str, limit: int) -> DocumentPage:
        """Documents sorted by id."""
        page: DocumentPage = await self._ask_again("page", namespace, after=after, prefix=prefix, limit=limit)
        return page

    async def find(self, namespace: str, document_id: str) -> DocumentEntry:
        """One document."""
        entry: DocumentEntry = await self._ask_again("find", namespace, document_id)
        return entry

    async def delete(self, namespace: str, document_id: str) -> DocumentEntry:
        """Drop a document; returns what it was."""
        entry: DocumentEntry = await self._ask("delete", namespace, document_id)
        return entry

    async def _ask_again(self, method: str, *args: Any, **kwargs: Any) -> Any:
        for _ in range(ATTEMPTS - 1):
            try:
                return await self._ask(method, *args, **kwargs)
            except ApiException as error:
                if not isinstance(error.__cause__, RayActorError):
                    raise
        return await self._ask(method, *args, **kwargs)

    async def _ask(self, method: str, *args: Any, **kwargs: Any) -> Any:
        try:
            answer = await getattr(self._handle, method).remote(*args, **kwargs)
        except Exception as error:  # as in RayEngine.generate
            raise ApiException(ray_fault(error, "documents", self._retry_after_s)) from error
        return _checked(answer)


def ray_fault(error: Exception, who: str, retry_after_s: float) -> ApiError:
    """What Ray raises when ``who`` (``engine`` or ``documents``) cannot answer."""
    if isinstance(error, BackPressureError):
        return ApiError(503, "the service is at its limit; try again.", "overloaded", retry_after_s=retry_after_s)
    if _lost(error) or isinstance(error, DeploymentUnavailableError):
        logger.warning("no %s: %s", who, error)
        message = f"the {who} stopped answering; try again."
        return ApiError(503, message, f"{who}_unavailable", retry_after_s=retry_after_s)
    logger.error("the %s raised", who, exc_info=error)
    return api_error(error)


def _lost(error: Exception) -> bool:
    """Whether the replica is gone, or the way to it. Serve translates some of gRPC's errors; a replica raises none."""
    if isinstance(error, grpc.aio.AioRpcError):
        return error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.CANCELLED, grpc.StatusCode.ABORTED)
    return isinstance(error, RayActorError)


def _checked(answer: Any) -> Any:
    """Errors come as values."""
    if isinstance(answer, ApiError):
        raise ApiException(answer)
    return answer
