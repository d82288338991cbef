"""The ingress's view of the engine, and the one that reaches it through Ray Serve.

``EngineClient`` is all that the HTTP side knows, so it is tested without Ray.
"""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from serve.wire import ApiError, ApiException, EngineRequest, Event, Failed, ModelCard, api_error

logger = logging.getLogger("ray.serve")

#: An engine that was heard from within this time is alive; asking a busy one would only add to its queue.
HEARD_RECENTLY_S = 5.0


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

    async def generate(self, request: EngineRequest) -> AsyncGenerator[Event, None]:
        """Events of one request. Closing or cancelling it cancels the replica's side too."""
        response = self._stream.generate.remote(request)
        done = False
        try:
            async for event in response:
                self._heard = time.monotonic()
                yield event
            done = True
        except Exception as error:  # Ray raises its own errors, the replica's and gRPC's: each must end the answer
            done = True
            yield Failed(self._fault(error))
        finally:
            if not done:
                response.cancel()

    async def _ask(self, method: str) -> Any:
        try:
            answer = await getattr(self._handle, method).remote()
        except Exception as error:  # as in generate
            raise ApiException(self._fault(error)) from error
        self._heard = time.monotonic()
        return answer

    def _fault(self, error: Exception) -> ApiError:
        """What Ray raises, as an error of ours."""
        if isinstance(error, BackPressureError):
            message = "the service is at its limit; try again."
            return ApiError(503, message, "overloaded", retry_after_s=self._retry_after_s)
        if isinstance(error, RayActorError | DeploymentUnavailableError):
            logger.warning("no engine: %s", error)
            message = "the engine stopped answering; try again."
            return ApiError(503, message, "engine_unavailable", retry_after_s=self._retry_after_s)
        logger.error("the engine raised", exc_info=error)
        return api_error(error)
