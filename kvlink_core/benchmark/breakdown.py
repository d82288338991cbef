"""Where the time of a linked first token goes: its steps timed one by one, and what cannot be, by leaving it out.

Loading, linking, prefill and sampling follow each other, so a clock between them tells them apart. Rotating and copying
are one pass over the keys; what rotating costs is what linking takes beyond the same linking with a rotation that does
nothing. Linkers that run the model while they link have those passes counted as prefill.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from kvlink_core.benchmark.candidates import Candidate, Load
from kvlink_core.benchmark.corpus import Corpus
from kvlink_core.benchmark.results import Case
from kvlink_core.benchmark.rounds import Clock
from kvlink_core.engine import SamplingParams
from kvlink_core.engine.sampling import Sampler
from kvlink_core.linking import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.models.rope import Rotary
from kvlink_core.types import DocumentCache


class Steps:
    """One linker's steps at one case.

    Args:
        candidate: a linker that uses caches.
        load: loads them; ``None`` when they are in memory.
        corpus, case: whose caches they are.
        pool: as many threads as the store decodes with.
    """

    def __init__(
        self, candidate: Candidate, load: Load | None, corpus: Corpus, case: Case, pool: ThreadPoolExecutor
    ) -> None:
        self._candidate = candidate
        self._bare = without_rotation(candidate)
        self._corpus = corpus
        self._pool = pool
        self._from_store = load is not None
        self._load: Load = load or (lambda: corpus.caches(case))
        self._encoded = corpus.encoded(case) if load else []

    def run(self, clock: Clock) -> Mapping[str, float]:
        """Time each step once; the names are those of ``Breakdown.measured``."""
        load, caches = clock.time(self._load)
        link, link_forward, linked = _link(self._candidate, caches, clock)
        token_ids, pending = linked.token_ids[linked.pending], linked.pending
        prefill, logits = clock.time(partial(linked.compute, token_ids, pending))
        sample, _ = clock.time(lambda: Sampler(SamplingParams()).sample(logits))
        del linked, caches
        bare, bare_forward, _ = _link(self._bare, self._load(), clock)  # loaded anew, to be as untouched
        decode, _ = clock.time(lambda: self._corpus.decode(self._encoded, self._pool))
        return {
            "load": load if self._from_store else 0.0,
            "decode": decode if self._from_store else 0.0,
            "link": link,
            "link_forward": link_forward,
            "unrotated": bare - bare_forward,
            "prefill": prefill,
            "sample": sample,
        }


def _link(candidate: Candidate, caches: Sequence[DocumentCache], clock: Clock) -> tuple[float, float, LinkedCache]:
    """Seconds of linking, of these in the model's own forward passes, and the linked cache."""
    with forward_time(candidate.model, clock) as inside:
        seconds, linked = clock.time(lambda: candidate.link(caches))
    return seconds, sum(inside), linked


def without_rotation(candidate: Candidate) -> Candidate:
    """The candidate with a model whose keys are placed as they are: wrong, and exactly as much copying."""
    model = candidate.model
    recipes = replace(model.recipes, layers=(None,) * len(model.recipes.layers), sources=())
    return replace(candidate, model=replace(model, lm=replace(model.lm, rotary=Rotary(recipes))))


@contextmanager
def forward_time(model: LoadedModel, clock: Clock) -> Iterator[list[float]]:
    """Inside, collects the seconds of every forward pass of the model or of layers of it, outermost calls only."""
    seconds: list[float] = []
    depth = [0]
    started = [0.0]

    def before(*_: Any) -> None:
        depth[0] += 1
        if depth[0] == 1:
            started[0] = clock.now()

    def after(*_: Any) -> None:
        depth[0] -= 1
        if depth[0] == 0:
            seconds.append(clock.now() - started[0])

    lists = [m for m in model.lm.decoder.children() if isinstance(m, torch.nn.ModuleList)]
    with ExitStack() as hooks:
        for module in (model.network, model.lm.decoder, *(layer for modules in lists for layer in modules)):
            for handle in (
                module.register_forward_pre_hook(before),
                module.register_forward_hook(after, always_call=True),
            ):
                hooks.callback(handle.remove)
        yield seconds
