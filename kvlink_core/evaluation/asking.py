"""One model's questions: prompts for every cell, the walk of ``full`` that the others are held against, and theirs."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from kvlink_core.benchmark.rounds import Clock
from kvlink_core.compress import EncodedDocument, get_codec, pruning_of
from kvlink_core.errors import ConfigError, InputError, PromptTooLongError, PrunedCacheError, TooManyDocumentsError
from kvlink_core.evaluation.encodings import BYTES_PER_TOKEN_ID, Encodings, Stored, Tokens, stored_bytes
from kvlink_core.evaluation.examples import Example
from kvlink_core.evaluation.following import Walk, closeness, follow, greedy
from kvlink_core.evaluation.grid import NO_CODEC, Cell
from kvlink_core.evaluation.metrics import scores
from kvlink_core.evaluation.records import Row, RunConfig
from kvlink_core.fingerprint import token_bytes
from kvlink_core.linking import LinkedCache, Linker, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Frame, Prompt
from kvlink_core.types import DocumentCache, Message

#: Recording what a GPU replays takes place at the second time; the third is the first that is like all others.
_WARM_UPS = {"cpu": 1, "cuda": 3}


@dataclass(frozen=True, slots=True)
class Asked:
    """A question, laid out: its data set, the prompt of each linker by name, and its documents."""

    dataset: str
    example: Example
    documents: tuple[Tokens, ...]
    prompts: dict[str, Prompt]
    room: int


@dataclass(frozen=True, slots=True)
class Skipped:
    """A question that cannot be asked of this model, and why, as a short name."""

    dataset: str
    example: Example
    reason: str


def messages(config: RunConfig, dataset: str, question: str) -> list[Message]:
    """The conversation of a question, without its documents."""
    system = config.system.get(dataset, "")
    asked = Message("user", config.template.replace("{question}", question))
    return [Message("system", system), asked] if system else [asked]


class Asking:
    """Asks one model under all its cells.

    Args:
        model: the model.
        cells: its cells, ``full`` first.
        config: of the run.
        memory_bytes: for caches kept from question to question: the model's own, and again each codec's.
    """

    def __init__(self, model: LoadedModel, cells: Sequence[Cell], config: RunConfig, *, memory_bytes: int) -> None:
        self._model = model
        self._cells = cells
        self._config = config
        self._linkers: dict[str, Linker] = {cell.linker: get_linker(cell.linker) for cell in cells}
        self._stored = {
            cell.codec: Stored(get_codec(cell.codec), most_bytes=memory_bytes) for cell in cells if cell.codec
        }
        self._clock = Clock(model.device)
        self._warm = False
        prunes = {name: pruning_of(stored.codec) for name, stored in self._stored.items()}
        whole = Encodings(model, most_bytes=memory_bytes)
        self._encodings = {
            name: whole if prune is None else Encodings(model, most_bytes=memory_bytes, prune=prune)
            for name, prune in prunes.items()
        }

    def plan(self, documents: Sequence[Tokens]) -> None:
        """See ``Encodings.plan``."""
        for encodings in dict.fromkeys(self._encodings.values()):
            encodings.plan(documents)

    def lay_out(self, dataset: str, example: Example) -> Asked | Skipped:
        """Lay a question out under every linker.

        Raises:
            InputError: a conversation that this model's chat template refuses, or a document that cannot be tokenized.
        """
        layout = self._model.layout
        documents = [layout.document_tokens(document, place) for place, document in enumerate(example.documents)]
        frame = self._frame(dataset, example, len(documents))
        prompts = {}
        try:
            for name, linker in self._linkers.items():
                whole: Sequence[Sequence[int]] = documents
                if layout.wrap is not None and not linker.uses_caches:
                    whole = [layout.wrap.inside(each) for each in documents]
                prompts[name] = layout.assemble(frame, whole, links=linker.links(layout))
        except TooManyDocumentsError as error:
            return Skipped(dataset, example, error.code)
        room = self._model.context_length - max(prompt.length for prompt in prompts.values())
        most = min((encodings.longest for encodings in self._encodings.values()), default=room)
        if room < 1 or any(len(each) > most for each in documents):
            return Skipped(dataset, example, PromptTooLongError.code)
        return Asked(dataset, example, tuple(token_bytes(each) for each in documents), prompts, room)

    def _frame(self, dataset: str, example: Example, documents: int) -> Frame:
        conversation = messages(self._config, dataset, example.question)
        layout = self._model.layout
        try:
            return layout.frame(conversation, documents=documents)
        except InputError as error:
            if len(conversation) == 1:
                raise
            layout.frame(conversation[1:], documents=documents)
            raise ConfigError(f"{error} Without a system text it is accepted: --system ''.", param="system") from error

    def rows(self, asked: Asked | Skipped) -> list[Row]:
        """Ask under every cell; the document caches must have been planned."""
        if isinstance(asked, Skipped):
            return [_row_of(cell, asked.dataset, asked.example, skipped=asked.reason) for cell in self._cells]
        loads = {name: self._load(name, asked) for name in self._stored}
        loads[NO_CODEC] = _Load([], 0.0, 0)
        if not self._warm:
            for _ in range(_WARM_UPS.get(self._model.device.type, 1)):
                for cell in self._cells:
                    with suppress(PrunedCacheError):
                        greedy(self._link(cell, asked, loads[cell.codec], 1)[1], max_tokens=1, stop_ids=frozenset())
            self._warm = True
        most = min(self._config.max_tokens, asked.room)
        given = self._given(asked.example)[:most]
        full: Walk | None = None
        rows = []
        for cell in self._cells:
            load = loads[cell.codec]
            try:
                link_s, linked = self._link(cell, asked, load, most)
            except PrunedCacheError as error:  # this linker cannot, and the others of the grid can
                rows.append(_row_of(cell, asked.dataset, asked.example, skipped=error.code))
                continue
            walk = self._walk(linked, asked.example, given or (full.followed if full else ()), most)
            full = full or walk
            row = self._row(cell, asked, walk, full)
            counted = {
                "ttft_s": load.seconds + link_s + walk.first_s,
                "decode_s": load.seconds,
                "computed_tokens": linked.computed_tokens,
                "stored_bytes": load.stored_bytes,
            }
            rows.append(row.model_copy(update=counted))
        return rows

    def _load(self, name: str, asked: Asked) -> _Load:
        """The caches of a question's documents, decoded anew: that is what a request waits for."""
        stored = self._stored[name]
        documents = stored.documents(asked.documents, self._encodings[name].caches)
        decode = partial(_decoded, stored, documents, self._model.device)
        seconds, caches = self._clock.time(decode)
        return _Load(caches, seconds, sum(stored_bytes(each) for each in documents))

    def _link(self, cell: Cell, asked: Asked, load: _Load, reserve: int) -> tuple[float, LinkedCache]:
        link = self._linkers[cell.linker].link
        return self._clock.time(lambda: link(self._model, asked.prompts[cell.linker], load.caches, reserve=reserve))

    def _walk(self, linked: LinkedCache, example: Example, token_ids: Sequence[int], most: int) -> Walk:
        """Along ``token_ids``; freely where there are none, which is how ``full`` goes first."""
        stop_ids, now = self._model.stop_ids, self._clock.now
        if not token_ids:
            return greedy(linked, max_tokens=most, stop_ids=stop_ids, now=now)
        wanted = bool(example.answers)
        return follow(linked, token_ids, answer=wanted, max_tokens=most, stop_ids=stop_ids, now=now)

    def _given(self, example: Example) -> Sequence[int]:
        """The tokens to follow whatever ``full`` says; none for its own answer."""
        text = example.continuation
        if text is None and self._config.follow == "reference" and example.answers:
            text = example.answers[0]
        return self._model.layout.plain_tokens(text) if text else ()

    def _row(self, cell: Cell, asked: Asked, walk: Walk, full: Walk) -> Row:
        example = asked.example
        answer = self._model.layout.decode(walk.token_ids) if walk.token_ids is not None else None
        close = closeness(walk.logits, full.logits, walk.followed)
        is_full = walk is full
        return _row_of(
            cell,
            asked.dataset,
            example,
            answer=answer,
            scores=scores(example.task, answer, example.answers) if answer is not None else {},
            kl=None if is_full else close.kl,
            top1=None if is_full else close.top1,
            nll=close.nll,
            tokens=close.tokens,
            prompt_tokens=asked.prompts[cell.linker].length,
            document_tokens=sum(len(each) for each in asked.documents) // BYTES_PER_TOKEN_ID,
        )


@dataclass(frozen=True, slots=True)
class _Load:
    """A question's caches, the seconds that decoding them took, and the bytes they were decoded from."""

    caches: Sequence[DocumentCache]
    seconds: float
    stored_bytes: int


def _decoded(stored: Stored, documents: Sequence[EncodedDocument], device: torch.device) -> list[DocumentCache]:
    return [stored.codec.decode(each, device) for each in documents]


def _row_of(cell: Cell, dataset: str, example: Example, **fields: Any) -> Row:
    return Row(
        model=cell.model, linker=cell.linker, codec=cell.codec,
        dataset=dataset, id=example.id, kind=example.kind, **fields,
    )  # fmt: skip
