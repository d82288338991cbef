"""``kvlink bench ttft``: time to first token of every linker, beside ``full`` and beside its floors, in one process."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch

from kvlink_core.benchmark.breakdown import Steps
from kvlink_core.benchmark.candidates import FULL, Candidate, Floor, StockFloor, has_stock, ready_cache
from kvlink_core.benchmark.corpus import Corpus
from kvlink_core.benchmark.results import Breakdown, Case, Point, Row, parts_of, with_ratios
from kvlink_core.benchmark.rounds import Clock, Progress, Work, alternate
from kvlink_core.errors import ConfigError, KVLinkError
from kvlink_core.linking import LinkedCache, linker_names
from kvlink_core.models import LoadedModel
from kvlink_core.types import DocumentCache

#: Counted runs of every candidate that a figure needs to be quoted.
ENOUGH_RUNS = 7

#: The context lengths of ``--sweep``, in tokens.
SWEEP = (500, 1000, 2000, 5000, 10_000, 20_000, 32_000)

#: Steps that add up to less or more of the whole than this are not to be trusted.
AGREEMENT = 0.1


@dataclass(frozen=True, slots=True)
class Settings:
    """How to measure.

    Attributes:
        linkers: names, with parameters where they have some; ``full`` is among the candidates in any case. ``None``
            for all that the model can run.
        repeats: counted runs of each candidate, after one that is not counted.
        full_budget_s: seconds that the counted runs of ``full`` may take at one case.
        skip: by candidate, the context length beyond which it is left out.
        directory: where to keep a store to read caches from, or ``None``.
        codec: of that store.
        breakdown: whether to time the steps of linkers too.
    """

    linkers: tuple[str, ...] | None = None
    repeats: int = ENOUGH_RUNS
    full_budget_s: float = 300.0
    skip: Mapping[str, int] = field(default_factory=dict)
    directory: Path | None = None
    codec: str = "raw"
    breakdown: bool = True


def parse_contexts(text: str) -> tuple[int, ...]:
    """Context lengths from ``500,1000,...``, ascending, each once.

    Raises:
        ConfigError: not whole numbers above 0.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"[0-9]{1,9}", part) and int(part) for part in parts):
        raise ConfigError(f"--context {text!r}: write whole numbers above 0, like 500,1000,2000.", param="context")
    return tuple(sorted({int(part) for part in parts}))


def parse_skips(texts: Sequence[str]) -> dict[str, int]:
    """Context lengths beyond which candidates are left out, from ``NAME@LENGTH`` each.

    Raises:
        ConfigError: of another form, or one name twice.
    """
    skips: dict[str, int] = {}
    for text in texts:
        name, at, length = text.rpartition("@")
        if not (name and at and re.fullmatch(r"[0-9]{1,9}", length)):
            raise ConfigError(f"--skip {text!r}: write NAME@TOKENS, like full@16000.", param="skip")
        if name in skips:
            raise ConfigError(f"--skip names {name!r} twice.", param="skip")
        skips[name] = int(length)
    return skips


def measure(
    model: LoadedModel,
    cases: Sequence[Case],
    settings: Settings,
    progress: Progress = lambda name, done, total: None,
) -> tuple[list[Point], list[str]]:
    """Measure every case in turn.

    Returns:
        The points, and what must be said about them.

    Raises:
        ConfigError: a context longer than the model's, a codec or linker that there is not, one that was named and that
            the model cannot run, a skip of what is no candidate.
    """
    with ExitStack() as stack:
        corpus = Corpus(model, settings.directory, settings.codec)
        stack.callback(corpus.close)
        names, warnings = _names(model, corpus, cases[0], settings)
        if unknown := sorted(set(settings.skip) - set(names)):
            raise ConfigError(f"--skip {unknown[0]!r}: the candidates are {', '.join(names)}.", param="skip")
        _check_lengths(model, corpus, cases, names, settings)
        if not has_stock(model):
            warnings.append("transformers has no sdpa attention for this model: the stock floor was not measured.")
        points = []
        for case in cases:
            chosen = [name for name in names if case.context_tokens <= settings.skip.get(name, case.context_tokens)]
            warnings += [
                f"{name} at {case.context_tokens:,} context tokens: left out as asked."
                for name in names
                if name not in chosen
            ]
            candidates = [Candidate.make(name, model, corpus, case) for name in chosen]
            point = _Measurement(model, corpus, case, settings).run(candidates, progress)
            points.append(point)
            warnings += list(_remarks(point, settings.repeats))
    return points, warnings


def _names(model: LoadedModel, corpus: Corpus, case: Case, settings: Settings) -> tuple[list[str], list[str]]:
    """The candidates, each tried on a short prompt, and why registered ones are not among them."""
    warnings = []
    names = [FULL]
    trial = Case(context_tokens=8, document_tokens=4, query_tokens=2, links=case.links)
    for name in settings.linkers if settings.linkers is not None else linker_names():
        try:
            candidate = Candidate.make(name, model, corpus, trial)
            candidate.first_token(partial(corpus.caches, trial))
        except KVLinkError as error:
            if settings.linkers is not None:
                raise
            warnings.append(f"{name} was not measured: {error}")
        else:
            names.append(name)
    return list(dict.fromkeys(names)), warnings


def _check_lengths(
    model: LoadedModel, corpus: Corpus, cases: Sequence[Case], names: Sequence[str], settings: Settings
) -> None:
    """Raises ``ConfigError`` before the first run, not after hours, when a prompt would not fit."""
    for name in names:
        asked = [c for c in cases if c.context_tokens <= settings.skip.get(name, c.context_tokens)]
        for case in asked[-1:]:
            length = Candidate.make(name, model, corpus, case).prompt.length
            if length >= model.context_length:
                raise ConfigError(
                    f"a prompt of {length:,} tokens does not fit the model's context of {model.context_length:,}; "
                    "ask for shorter ones with --context or --documents.",
                    param="context",
                )


def _remarks(point: Point, repeats: int) -> list[str]:
    """What a reader must know of a point beside its figures."""
    context = f"{point.case.context_tokens:,} context tokens"
    said = [
        f"{row.label} at {context}: {len(row.seconds)} instead of {repeats} runs, for its time budget."
        for row in point.rows
        if len(row.seconds) < repeats
    ]
    return said + [
        f"{b.label} at {context}: its steps add up to {100 * b.sum_of_whole:.0f} % of the whole, more than "
        f"{100 * AGREEMENT:.0f} % off; take its breakdown as a hint."
        for b in point.breakdowns
        if abs(b.sum_of_whole - 1) > AGREEMENT
    ]


@dataclass(frozen=True, slots=True)
class _Measured:
    """A row to be: what it is, and how one run of it goes."""

    work: Work
    row: dict[str, object]
    steps: Work | None = None


class _Measurement:
    """Everything at one case. What it holds in memory goes when it goes."""

    def __init__(self, model: LoadedModel, corpus: Corpus, case: Case, settings: Settings) -> None:
        self._model = model
        self._corpus = corpus
        self._case = case
        self._settings = settings
        self._clock = Clock(model.device)

    def run(self, candidates: Sequence[Candidate], progress: Progress) -> Point:
        """Measure ``candidates`` and the floors under them."""
        context = self._case.context_tokens
        progress(f"encoding {context:,} tokens", 0, 1)
        caches = self._corpus.caches(self._case)
        if self._corpus.stored:
            self._corpus.store(self._case)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            measured = [m for c in candidates for m in self._of_candidate(c, pool)]
            measured += self._floors([c for c in candidates if c.linker.uses_caches], caches)
            works = {f"{i} whole": m.work for i, m in enumerate(measured)}
            works |= {f"{i} steps": m.steps for i, m in enumerate(measured) if m.steps}

            def shown(name: str, done: int, total: int) -> None:
                number, _, what = name.partition(" ")
                label = f": {measured[int(number)].row['name']} ({what})" if name else ""
                progress(f"{context:,} tokens{label}", done, total)

            runs = alternate(works, self._settings.repeats, shown)
        rows = [Row.of([run["whole"] for run in runs[f"{i} whole"]], **m.row) for i, m in enumerate(measured)]
        breakdowns = [_breakdown(rows[i], runs[f"{i} steps"]) for i, m in enumerate(measured) if m.steps is not None]
        return Point(case=self._case, rows=with_ratios(rows), breakdowns=breakdowns)

    def _of_candidate(self, candidate: Candidate, pool: ThreadPoolExecutor) -> list[_Measured]:
        corpus, case, clock = self._corpus, self._case, self._clock
        row = {
            "name": candidate.name,
            "prompt_tokens": candidate.prompt.length,
            "computed_tokens": candidate.prompt.length,
        }
        in_memory = partial(candidate.run, partial(corpus.caches, case), clock)
        if not candidate.linker.uses_caches:
            return [_Measured(Work(in_memory, self._settings.full_budget_s), row | {"kind": FULL, "source": None})]
        row |= {"kind": "linker", "computed_tokens": candidate.link(corpus.caches(case)).computed_tokens}
        sources = {"memory": None, "disk": partial(corpus.load, case)} if corpus.stored else {"memory": None}
        found = []
        for source, load in sources.items():
            work = Work(in_memory if load is None else partial(candidate.run, load, clock))
            steps = Work(partial(Steps(candidate, load, corpus, case, pool).run, clock))
            found.append(_Measured(work, row | {"source": source}, steps if self._settings.breakdown else None))
        return found

    def _floors(self, candidates: Sequence[Candidate], caches: Sequence[DocumentCache]) -> list[_Measured]:
        """Both floors under each number of tokens that a linker computes in a prompt of some length."""
        groups: dict[tuple[int, int], list[Candidate]] = {}
        pending: dict[tuple[int, int], torch.Tensor] = {}
        for candidate in candidates:
            linked = candidate.link(caches)
            if linked.computed_tokens > candidate.prompt.length:
                continue  # tokens computed twice: no forward pass over this prompt is as much work
            key = (candidate.prompt.length, linked.computed_tokens)
            groups.setdefault(key, []).append(candidate)
            pending.setdefault(key, linked.pending)
        ready: dict[int, LinkedCache] = {}
        found: list[_Measured] = []
        for (length, tokens), members in groups.items():
            if length not in ready:
                ready[length] = ready_cache(self._model, members[0].prompt, caches)
            places = pending[length, tokens]
            if len(places) != tokens:  # computed in part while linking: at which places makes little difference
                places = torch.arange(length - tokens, length)
            of = "of " + ", ".join(member.name for member in members)
            row = {"source": None, "prompt_tokens": length, "computed_tokens": tokens}
            floor = Work(partial(Floor(ready[length], places).run, self._clock))
            found.append(_Measured(floor, row | {"name": f"floor {of}", "kind": "floor"}))
            if has_stock(self._model):
                stock = Work(partial(StockFloor(ready[length], tokens).run, self._clock))
                found.append(_Measured(stock, row | {"name": f"stock floor {of}", "kind": "stock"}))
        return found


def _breakdown(row: Row, runs: Sequence[Mapping[str, float]]) -> Breakdown:
    measured = {name: [run[name] for run in runs] for name in runs[0]}
    parts = parts_of(measured)
    total = sum(parts.values())
    return Breakdown(
        name=row.name,
        source="disk" if row.source == "disk" else "memory",
        measured=measured,
        parts=parts,
        sum_s=total,
        sum_of_whole=total / row.median_s,
    )
