"""How the next token is chosen."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from kvlink_core.errors import SamplingError

MAX_STOP_STRINGS = 16
MAX_NEW_TOKENS = 1_000_000
MAX_LOGPROBS = 20

#: Tokens that are sorted before all are.
_NUCLEUS = 1024


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """Sampling of one request.

    Attributes:
        temperature: 0 for greedy, up to 2.
        top_p: nucleus, in (0, 1].
        top_k: keep the k most likely tokens; 0 for all.
        seed: makes sampling reproducible; ``None`` draws one.
        max_tokens: tokens to generate at most.
        stop: strings at which the answer ends; they are not part of it.
        logprobs: report each token's log probability and those of this many most likely ones; ``None`` for neither.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_tokens: int = 128
    stop: tuple[str, ...] = ()
    logprobs: int | None = None

    def validate(self) -> None:
        """Refuse what has no meaning.

        Raises:
            SamplingError: naming the parameter and its range.
        """
        if not (math.isfinite(self.temperature) and 0 <= self.temperature <= 2):
            raise SamplingError(f"temperature must be from 0 to 2, not {self.temperature}.", param="temperature")
        if not (math.isfinite(self.top_p) and 0 < self.top_p <= 1):
            raise SamplingError(f"top_p must be above 0 and at most 1, not {self.top_p}.", param="top_p")
        if self.top_k < 0:
            raise SamplingError(f"top_k must be 0 (all tokens) or more, not {self.top_k}.", param="top_k")
        if self.seed is not None and not -(2**63) <= self.seed < 2**63:
            raise SamplingError(f"seed must fit in 64 bits, not {self.seed}.", param="seed")
        if not 1 <= self.max_tokens <= MAX_NEW_TOKENS:
            raise SamplingError(
                f"max_tokens must be from 1 to {MAX_NEW_TOKENS}, not {self.max_tokens}.", param="max_tokens"
            )
        if len(self.stop) > MAX_STOP_STRINGS or any(not s for s in self.stop):
            raise SamplingError(f"stop takes at most {MAX_STOP_STRINGS} strings, none empty.", param="stop")
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise SamplingError(
                f"log probabilities of 0 to {MAX_LOGPROBS} tokens can be had at each step, not {self.logprobs}.",
                param="logprobs",
            )


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """How likely a token was: natural logarithms of the model's own probabilities, before temperature and cuts.

    Attributes:
        logprob: of the token that was chosen.
        top: token ids and theirs, the most likely first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Sampler:
    """Draws tokens for one request; owns its random generator, so other requests cannot disturb it."""

    def __init__(self, params: SamplingParams) -> None:
        self.params = params
        self._generator = torch.Generator()  # on CPU: the same draws whatever the device
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)

    def logprobs(self, logits: torch.Tensor, token: int) -> tuple[TokenLogprobs, ...]:
        """Of a token that was chosen from ``logits``: one entry, or none where they are not asked for."""
        count = self.params.logprobs
        if count is None:
            return ()
        logs = torch.log_softmax(logits.double(), dim=-1)
        values, ids = logs.topk(min(count, logs.shape[-1]))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        return (TokenLogprobs(token, float(logs[token]), top),)

    def sample(self, logits: torch.Tensor) -> int:
        """The next token from float32 logits ``[vocabulary]``; not changed."""
        if self.params.temperature == 0:
            return int(logits.argmax())
        ids, probabilities = self._candidates(logits.cpu())
        # One number for each token: what a request draws depends on its seed and its logits alone.
        cumulative = probabilities.cumsum(0)
        drawn = torch.rand((), dtype=torch.float64, generator=self._generator) * cumulative[-1]
        at = int(torch.searchsorted(cumulative, drawn, right=True))
        if at == cumulative.shape[0]:  # rounded up to the whole
            at = int(torch.nonzero(probabilities)[-1])
        return at if ids is None else int(ids[at])

    def _candidates(self, logits: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor]:
        """Token ids, the most likely first, or ``None`` for all in their order; and what they are drawn with."""
        params = self.params
        largest = logits.max().double()

        def scaled(part: torch.Tensor) -> torch.Tensor:
            # The largest logit becomes 0 before dividing, so that no temperature, however near 0, can overflow.
            # In float64, so that the cumulative sum reaches 1.
            return (part.double() - largest) / params.temperature

        ids: torch.Tensor | None = None
        if params.top_k:
            values, ids = logits.topk(min(params.top_k, logits.shape[0]))
            probabilities = torch.softmax(scaled(values), dim=0)
        elif params.top_p < 1:
            # Sorting a vocabulary takes longer than all else; the nucleus is nearly always among the first.
            whole = torch.logsumexp(scaled(logits), dim=0)
            values, ids = logits.topk(min(_NUCLEUS, logits.shape[0]))
            probabilities = torch.exp(scaled(values) - whole)
            if float(probabilities.sum()) < params.top_p:
                values, ids = logits.sort(descending=True, stable=True)
                probabilities = torch.exp(scaled(values) - whole)
        else:
            probabilities = torch.softmax(scaled(logits), dim=0)
        if params.top_p < 1:
            # Keep the smallest set whose mass reaches top_p: drop a token when what stands before it suffices.
            before = probabilities.cumsum(0) - probabilities
            probabilities[before >= params.top_p] = 0
        return ids, probabilities
