"""What goes into the engine and what comes out of it, and a request's state in between."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from kvlink_core.engine.generate import TokenEvent, Transcript
from kvlink_core.engine.sampling import Sampler, SamplingParams
from kvlink_core.errors import KVLinkError
from kvlink_core.linking import Linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A prompt and how to answer it.

    Attributes:
        prompt: laid out for ``linker``.
        linker: how its documents are linked.
        sampling: of the answer; ``sampling.max_tokens`` counts, and the prompt and the answer must fit the model.
        caches: one for each document of the prompt, in order, of the engine's model; ``None`` for a document to be
            encoded by the engine. Empty for a linker that uses none. They are read again after a preemption, and
            never written to.
        stop_ids: token ids that end the answer; ``None`` for the model's own.
        namespace: whose documents they are. Requests of another namespace share none of them: how fast an answer comes
            must not tell what others have.
    """

    prompt: Prompt
    linker: Linker
    sampling: SamplingParams = field(default_factory=SamplingParams)
    caches: Sequence[DocumentCache | None] = ()
    stop_ids: frozenset[int] | None = None
    namespace: str = ""


@dataclass(slots=True, eq=False)
class Handle:
    """A request in the engine, to be read by whoever submitted it. Times are ``time.perf_counter()``.

    Attributes:
        submitted, admitted, first_token: when it came, first got memory, and had its first token.
        prompt_tokens: tokens of the prompt.
        computed_tokens: of these, those computed for this request, documents that it was the first to ask for
            included. Recomputing after a preemption does not count.
        completion_tokens: tokens generated.
        preemptions: how often it gave up its memory for an older request.
        finished: whether its last event was returned, or it was cancelled.
        link_s: seconds between ``admitted`` and ``first_token`` in which its documents' caches were linked: their keys
            turned, or all of them copied to their places, and what the linker itself computes.
    """

    prompt_tokens: int
    submitted: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    first_token: float | None = None
    computed_tokens: int = 0
    completion_tokens: int = 0
    preemptions: int = 0
    finished: bool = False
    link_s: float = 0.0

    def linked(self, since: float) -> None:
        """Its documents were linked from ``since`` until now."""
        if self.first_token is None:
            self.link_s += time.perf_counter() - since


@dataclass(frozen=True, slots=True)
class Generated:
    """A request has its next token; with a ``finish_reason`` it was the last."""

    handle: Handle
    event: TokenEvent


@dataclass(frozen=True, slots=True)
class Failed:
    """A request cannot be answered; nothing of it is left in the engine."""

    handle: Handle
    error: KVLinkError


@dataclass(slots=True, eq=False)
class Encoding:
    """A document that is encoded for its cache alone (``Engine.encode``).

    Attributes:
        token_ids: its tokens.
        number: counts what was submitted, requests too.
        document: what a runner keeps for it.
    """

    token_ids: Sequence[int]
    number: int
    document: Any = None


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document was encoded for requests of a namespace: the receiver may keep its cache, or store it.

    ``encoding`` says that nobody's request asked for it, but ``Engine.encode`` did.
    """

    cache: DocumentCache
    namespace: str = ""
    encoding: Encoding | None = None


EngineEvent = Generated | Failed | Encoded


class Task:
    """A request and how far it is.

    What is to be computed is a list of tokens: those of the prompt that no document covers, then each token of the
    answer. When all of the list is computed, the next token is drawn and appended. Giving up all memory and starting
    again at the list's beginning changes no token, because none is drawn twice.

    Attributes:
        number: counts submitted requests.
        token_ids, positions, slots: the list, and the slot that each takes.
        done: how many of it are computed.
        context: what a runner keeps for it while it is admitted.
        wanted: what a runner has to find for it.
    """

    def __init__(self, model: LoadedModel, request: GenerationRequest, number: int) -> None:
        stop_ids = model.stop_ids if request.stop_ids is None else request.stop_ids
        self.request = request
        self.number = number
        self.prompt = request.prompt if request.linker.uses_caches else request.prompt.unwrapped()
        self.handle = Handle(self.prompt.length)
        self.sampler = Sampler(request.sampling)
        self.transcript = Transcript(
            model.layout, request.sampling, max_tokens=request.sampling.max_tokens, stop_ids=stop_ids
        )
        self.token_ids: list[int] = []
        self.positions: list[int] = []
        self.slots: list[int] = []
        self.done = 0
        self.context: Any = None
        self.wanted: Any = None

    @property
    def remaining(self) -> int:
        """Tokens of the list that are not computed."""
        return len(self.token_ids) - self.done

    @property
    def decoding(self) -> bool:
        """Whether only its last token is not computed."""
        return self.remaining == 1 and bool(self.transcript.token_ids)

    def begin(self, token_ids: Sequence[int], positions: Sequence[int], slots: Sequence[int]) -> None:
        """Start, or start again, with these tokens of the prompt, and the answer as far as it goes."""
        self.token_ids, self.positions, self.slots = list(token_ids), list(positions), list(slots)
        self.done = 0
        for token in self.transcript.token_ids:
            self.append(token)

    def append(self, token: int) -> None:
        """A token of the answer is to be computed next."""
        self.token_ids.append(token)
        self.positions.append(self.positions[-1] + 1)
        self.slots.append(self.slots[-1] + 1)

    def draw(self, logits: torch.Tensor, greedy: int) -> TokenEvent:
        """Draw the next token from float32 logits ``[vocabulary]``, of which ``greedy`` is the largest."""
        token = greedy if self.sampler.params.temperature == 0 else self.sampler.sample(logits)
        event = self.transcript.accept(token, self.sampler.logprobs(logits, token))
        handle = self.handle
        handle.completion_tokens = len(self.transcript.token_ids)
        handle.first_token = handle.first_token or time.perf_counter()
        if event.finish_reason is None:
            self.append(token)
        return event


@dataclass(frozen=True, slots=True)
class Work:
    """In this step, compute the next ``count`` tokens of a task."""

    task: Task
    count: int

    @property
    def completes(self) -> bool:
        """Whether the task then has its next token."""
        return self.count == self.task.remaining
