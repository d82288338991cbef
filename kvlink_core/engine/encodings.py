"""Documents that are encoded for their caches alone, beside requests and behind what they need."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from kvlink_core.engine.flat_runner import FlatRunner
from kvlink_core.engine.memory import Budget
from kvlink_core.engine.requests import Encoded, Encoding
from kvlink_core.engine.solo_runner import SoloRunner
from kvlink_core.errors import EmptyDocumentError, PromptTooLongError, RequestTooLargeError
from kvlink_core.models import LoadedModel


class Encodings:
    """A queue of which one document is under way at a time: they take little memory, and leave steps to requests.

    Args:
        model: the model.
        runner: encodes.
        budget: of its memory.
    """

    def __init__(self, model: LoadedModel, runner: FlatRunner | SoloRunner, budget: Budget) -> None:
        self._model = model
        self._runner = runner
        self._budget = budget
        self._waiting: deque[Encoding] = deque()
        self._begun: Encoding | None = None

    @property
    def begun(self) -> bool:
        """Whether one is under way, and holds memory."""
        return self._begun is not None

    @property
    def busy(self) -> bool:
        """Whether there is anything to encode."""
        return self.begun or bool(self._waiting)

    def submit(self, token_ids: Sequence[int], number: int) -> Encoding:
        """Queue a document. Raises as ``Engine.encode``."""
        tokens, limit = len(token_ids), self._model.context_length
        if not tokens:
            raise EmptyDocumentError("a document without tokens cannot be encoded.", param="documents")
        if tokens > limit:
            raise PromptTooLongError(tokens, limit, what="a document", reason=self._model.spec.context_reason)
        needs = self._runner.encoding_needs(tokens)
        if needs > self._budget.limit:
            raise RequestTooLargeError(needs, self._budget.limit)
        encoding = Encoding(token_ids, number)
        self._waiting.append(encoding)
        return encoding

    def begin(self, before: int) -> bool:
        """Begin with the next one, if there is one; false where it came before this number and there is no room.

        Then nobody behind it may take the memory that it waits for.
        """
        if not self.begun and self._waiting and self._waiting[0].number < before:
            if not self._runner.begin(self._waiting[0]):
                return False
            self._begun = self._waiting.popleft()
        return True

    def finish(self) -> list[Encoded]:
        """The one under way, when it is complete."""
        encoding = self._begun
        if encoding is None or (cache := self._runner.finish(encoding)) is None:
            return []
        self._begun = None
        return [Encoded(cache, encoding=encoding)]

    def drop(self) -> None:
        """Forget all of them."""
        self._waiting.clear()
        if self._begun is not None:
            self._runner.abandon(self._begun)
            self._begun = None
