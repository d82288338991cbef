"""Continuous batching: requests join and leave the running batch between steps.

``Engine.step`` is schedule, run, postprocess. Everything happens in the calling thread, and in no other.
docs/engine.md explains how documents are shared, what the memory holds and who is served first.
"""

from __future__ import annotations

import time
from bisect import insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from kvlink_core.engine.encodings import Encodings
from kvlink_core.engine.flat_runner import FlatRunner
from kvlink_core.engine.memory import Budget
from kvlink_core.engine.requests import Encoding, EngineEvent, Failed, Generated, GenerationRequest, Handle, Task, Work
from kvlink_core.engine.schedule import Pace, share
from kvlink_core.engine.solo_runner import SoloRunner
from kvlink_core.engine.trial import Mode, find_mode
from kvlink_core.errors import KVLinkError, PromptTooLongError, RequestTooLargeError
from kvlink_core.models import LoadedModel
from kvlink_core.models.turning import QueryTurner

#: Bytes for keys and values where nothing is said: on a CPU, and as a share of what an accelerator has free.
_CPU_BYTES, _FREE_SHARE = 2**30, 0.8


@dataclass(frozen=True, slots=True)
class EngineSettings:
    """What an engine takes on.

    Attributes:
        kv_bytes: memory for keys and values, of documents and of requests; ``None`` for 1 GiB on a CPU and 80 % of what
            is free on an accelerator.
        max_running: requests that are computed at the same time; more wait.
        step_tokens: the most tokens of one step.
        stretch: how many times as long as a step that only decodes, one that prefills as well may take; ``None`` for
            any.
        mode: how to run, for tests and comparisons; ``None`` for the best way that the model allows.
    """

    kv_bytes: int | None = None
    max_running: int = 16
    step_tokens: int = 512
    stretch: float | None = 2.0
    mode: Mode | None = None


@dataclass(frozen=True, slots=True)
class EngineStats:
    """How an engine is loaded.

    Attributes:
        running, waiting: requests.
        kv_limit, kv_used, kv_idle, kv_peak: bytes: the budget, what is taken of it, what of that would be given up for
            something else, and the most that was ever taken.
        documents: references to documents, over all running requests.
        preemptions: since start.
        steps: since start.
    """

    running: int
    waiting: int
    kv_limit: int
    kv_used: int
    kv_idle: int
    kv_peak: int
    documents: int
    preemptions: int
    steps: int


class Engine:
    """Generates for many requests at once. Not thread-safe: one thread submits, cancels and steps.

    Args:
        model: the model.
        settings: what it takes on.
    """

    def __init__(self, model: LoadedModel, settings: EngineSettings | None = None) -> None:
        self.model = model
        self.settings = settings or EngineSettings()
        self._budget = Budget(self.settings.kv_bytes or _default_bytes(model))
        turner = QueryTurner(model.recipes, model.device, positions=model.context_length)
        self.mode: Mode = self.settings.mode or find_mode(model, turner)
        self._runner: FlatRunner | SoloRunner
        if self.mode == "solo":
            self._runner = SoloRunner(model, self._budget)
        else:
            self._runner = FlatRunner(model, self._budget, turner, shares=self.mode == "shared")
        self._pace = Pace(self.settings.step_tokens, self.settings.stretch)
        self._waiting: deque[Task] = deque()
        self._running: list[Task] = []  # the oldest first
        self._tasks: dict[int, Task] = {}
        self._encodings = Encodings(model, self._runner, self._budget)
        self._submitted = self._preemptions = self._steps = 0

    def submit(self, request: GenerationRequest) -> Handle:
        """Queue a request.

        Raises:
            SamplingError: a parameter outside its range.
            PromptTooLongError: prompt and answer exceed the model's context.
            RequestTooLargeError: it could not run even alone.
        """
        request.sampling.validate()
        task = Task(self.model, request, self._submitted)
        length, limit = task.prompt.length + request.sampling.max_tokens, self.model.context_length
        if length > limit:
            what = f"the prompt with {request.sampling.max_tokens} tokens of answer"
            raise PromptTooLongError(length, limit, what=what, reason=self.model.spec.context_reason)
        needs = self._runner.needs(task)
        if needs > self._budget.limit:
            raise RequestTooLargeError(needs, self._budget.limit)
        self._submitted += 1
        self._waiting.append(task)
        self._tasks[id(task.handle)] = task
        return task.handle

    def encode(self, token_ids: Sequence[int]) -> Encoding:
        """Queue a document to be encoded for its cache alone, in the steps of requests and behind what they need.

        A step returns it as ``Encoded``. One is under way at a time; in mode ``solo`` it is encoded whole, in one step.

        Raises:
            EmptyDocumentError: no tokens.
            PromptTooLongError: it exceeds the model's context.
            RequestTooLargeError: it does not fit even alone.
        """
        encoding = self._encodings.submit(token_ids, self._submitted)
        self._submitted += 1
        return encoding

    def cancel(self, handle: Handle) -> None:
        """Drop a request and free what it holds, at once; nothing happens to one that is finished."""
        task = self._tasks.get(id(handle))
        if task is not None:
            self._drop(task)

    def cancel_all(self) -> list[Handle]:
        """Drop all requests and all that is to be encoded, as after a step that raised; returns requests' handles."""
        self._encodings.drop()
        tasks = list(self._tasks.values())
        for task in tasks:
            self._drop(task)
        return [task.handle for task in tasks]

    def trim(self) -> None:
        """Let go of all memory that is kept for later."""
        self._budget.trim()

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return bool(self._tasks) or self._encodings.busy

    @property
    def stats(self) -> EngineStats:
        """How it is loaded now."""
        budget, runner = self._budget, self._runner
        return EngineStats(
            running=len(self._running),
            waiting=len(self._waiting),
            kv_limit=budget.limit,
            kv_used=budget.used,
            kv_idle=budget.idle,
            kv_peak=budget.peak,
            documents=runner.documents.readers if isinstance(runner, FlatRunner) else 0,
            preemptions=self._preemptions,
            steps=self._steps,
        )

    def step(self) -> list[EngineEvent]:
        """Compute the next token of every running request that is ready for it, and some of what others wait for.

        Returns:
            What happened, at most one event for each request.
        """
        started = time.perf_counter()
        failures: list[EngineEvent] = []
        self._admit(failures)
        works, chunks = self._schedule(failures)
        if not works and not chunks:
            return [*failures, *self._encodings.finish()]
        decoding = sum(work.task.decoding for work in works)
        logits, encoded = self._runner.run(works, chunks)
        events = self._postprocess(works, logits)
        self._steps += 1
        total = sum(work.count for work in works) + sum(count for _, count in chunks)
        self._pace.note(time.perf_counter() - started, decoding=decoding, prefilled=total - decoding)
        return [*failures, *encoded, *self._encodings.finish(), *events]

    def _admit(self, failures: list[EngineEvent]) -> None:
        """Let waiting requests in, in their order, as far as there is room."""
        while self._waiting and len(self._running) < self.settings.max_running:
            task = self._waiting[0]
            if not self._encodings.begin(before=task.number):
                return
            since = time.perf_counter()
            try:
                admitted = self._runner.open(task)
            except KVLinkError as error:
                self._drop(task)
                failures.append(Failed(task.handle, error))
                continue
            if admitted:
                self._waiting.popleft()
                task.handle.admitted = task.handle.admitted or since
                task.handle.linked(since)
                insort(self._running, task, key=lambda t: t.number)
            elif self._running or self._encodings.begun:
                return
            else:  # with all memory to itself: rather an error than a queue that stands still
                self._drop(task)
                too_large = RequestTooLargeError(self._runner.needs(task), self._budget.limit)
                failures.append(Failed(task.handle, too_large))

        self._encodings.begin(before=self._submitted)

    def _schedule(self, failures: list[EngineEvent]) -> tuple[list[Work], list[tuple[Any, int]]]:
        """What this step computes: tokens of requests, and of documents."""
        works: list[Work] = []
        prefilling: list[Task] = []
        for task in list(self._running):
            if task.context is None:  # preempted by one before it
                continue
            try:
                ready = self._runner.ready(task)
            except KVLinkError as error:
                self._drop(task)
                failures.append(Failed(task.handle, error))
                continue
            if ready and not task.decoding:
                prefilling.append(task)
            elif ready and self._make_room(task):
                works.append(Work(task, 1))
        wanting: list[tuple[int, int, Any]] = [(t.number, t.remaining, t) for t in prefilling if t.context is not None]
        wanting += [(d.number, len(d.token_ids) - d.encoded, d) for d in self._runner.encoding()]
        wanting.sort(key=lambda entry: entry[0])
        room = self._pace.prefill(len(works), len(self._running) - len(works))
        given = share(room, [remaining for _, remaining, _ in wanting])
        chunks = []
        for (_, _, item), count in zip(wanting, given, strict=True):
            if count and isinstance(item, Task):
                works.append(Work(item, count))
            elif count:
                chunks.append((item, count))
        return works, chunks

    def _make_room(self, task: Task) -> bool:
        """See to a slot for a task's next token, if need be from the youngest; false if that is the task itself."""
        while not self._runner.room(task):
            youngest = self._running[-1]
            self._runner.close(youngest)
            self._running.pop()
            self._waiting.appendleft(youngest)
            youngest.handle.preemptions += 1
            self._preemptions += 1
            if youngest is task:
                return False
        return True

    def _postprocess(self, works: Sequence[Work], logits: torch.Tensor) -> list[EngineEvent]:
        """Draw the next token of each request that has all before it."""
        complete = [work.task for work in works if not work.task.remaining]
        if not complete:
            return []
        events: list[EngineEvent] = []
        for task, row, greedy in zip(complete, logits, logits.argmax(-1).tolist(), strict=True):
            event = task.draw(row, greedy)
            if event.finish_reason is not None:
                self._drop(task)
            events.append(Generated(task.handle, event))
        return events

    def _drop(self, task: Task) -> None:
        """Free all that a task holds."""
        del self._tasks[id(task.handle)]
        task.handle.finished = True
        if task.context is None:
            self._waiting.remove(task)
        else:
            self._running.remove(task)
            self._runner.close(task)


def _default_bytes(model: LoadedModel) -> int:
    if model.device.type != "cuda":
        return _CPU_BYTES
    free, _ = torch.cuda.mem_get_info(model.device)
    return int(free * _FREE_SHARE)
