"""Prefill what is pending of a linked cache, then decode token by token.

The engine knows a linked cache and nothing of where it came from.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch

from kvlink_core.engine.sampling import Sampler, SamplingParams, TokenLogprobs
from kvlink_core.engine.text import TextStream
from kvlink_core.linking import LinkedCache
from kvlink_core.prompt import PromptLayout

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """A step of an answer.

    Attributes:
        text: text that became certain with this step; may be "".
        token_ids: the tokens of this step (the end-of-answer token is not among them).
        finish_reason: set on the last event.
        logprobs: one entry for each of ``token_ids``, where the request asked for them.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()


class Transcript:
    """What was generated for one answer, and the rules of how it ends."""

    def __init__(
        self, layout: PromptLayout, params: SamplingParams, *, max_tokens: int, stop_ids: frozenset[int]
    ) -> None:
        assert max_tokens >= 1
        self._max_tokens = max_tokens
        self._stop_ids = stop_ids
        self._text = TextStream(layout, params.stop)
        self.token_ids: list[int] = []

    def accept(self, token: int, logprobs: tuple[TokenLogprobs, ...] = ()) -> TokenEvent:
        """The event that the next token makes; the last one has a ``finish_reason``."""
        if token in self._stop_ids:
            return TokenEvent(self._text.finish(), (), "stop")
        self.token_ids.append(token)
        text = self._text.push(token)
        if self._text.stopped:
            return TokenEvent(text, (token,), "stop", logprobs)
        if len(self.token_ids) == self._max_tokens:
            text += self._text.finish()
            return TokenEvent(text, (token,), "stop" if self._text.stopped else "length", logprobs)
        return TokenEvent(text, (token,), None, logprobs)


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
        self._linked = linked
        self._sampler = Sampler(params)
        self._transcript = Transcript(linked.model.layout, params, max_tokens=max_tokens, stop_ids=stop_ids)
        pending = linked.pending
        self._logits = linked.compute(linked.token_ids[pending], pending)
        self._next = self._sampler.sample(self._logits)

    def __iter__(self) -> Iterator[TokenEvent]:
        """Yield one event per token; stop early by no longer iterating."""
        position = self._linked.prompt.length
        while True:
            token = self._next
            event = self._transcript.accept(token, self._sampler.logprobs(self._logits, token))
            yield event
            if event.finish_reason is not None:
                return
            self._logits = self._linked.compute(torch.tensor([token]), torch.tensor([position]))
            self._next = self._sampler.sample(self._logits)
            position += 1
