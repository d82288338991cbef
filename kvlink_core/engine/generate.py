"""Prefill what is pending of a linked cache, then decode token by token.

The engine knows a linked cache and nothing of where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from kvlink_core.engine.sampling import Sampler, SamplingParams
from kvlink_core.engine.text import TextStream
from kvlink_core.linking import LinkedCache

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A step of an answer.

    Attributes:
        text: text that became certain with this step; may be "".
        token_ids: the tokens of this step (the end-of-answer token is not among them).
        finish_reason: set on the last event.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None


class Generation:
    """One answer. Constructing it runs the prefill and samples the first token; iterating yields the events.

    Args:
        linked: the linked cache; owned by this generation from now on.
        params: validated sampling parameters.
        max_tokens: tokens to generate at most; at most ``params.max_tokens`` and the slots that are reserved.
        stop_ids: token ids that end the answer.
    """

    def __init__(
        self, linked: LinkedCache, params: SamplingParams, *, max_tokens: int, stop_ids: frozenset[int]
    ) -> None:
        assert max_tokens >= 1
        self._linked = linked
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._sampler = Sampler(params)
        self._text = TextStream(linked.model.layout, params.stop)
        self.completion_tokens = 0
        pending = linked.pending
        self._next = self._sampler.sample(linked.compute(linked.token_ids[pending], pending))

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield one event per token; stop early by no longer iterating."""
        position = self._linked.prompt.length
        while True:
            token = self._next
            if token in self._stop_ids:
                yield TokenEvent(self._text.finish(), (), "stop")
                return
            self.completion_tokens += 1
            text = self._text.push(token)
            if self._text.stopped:
                yield TokenEvent(text, (token,), "stop")
                return
            if self.completion_tokens == self._max_tokens:
                yield TokenEvent(text + self._text.finish(), (token,), "stop" if self._text.stopped else "length")
                return
            yield TokenEvent(text, (token,))
            logits = self._linked.compute(torch.tensor([token]), torch.tensor([position]))
            self._next = self._sampler.sample(logits)
            position += 1
