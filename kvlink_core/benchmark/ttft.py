"""``kvlink bench ttft``: time to first token of every linker, beside ``full`` and beside the floor, in one process.

Documents are random tokens: attention costs the same whatever the text says. All candidates run alternately, so
that a noisy machine disturbs them alike; medians and ratios are reported. The floor is the least that a linker with
link tokens could do: the model's forward over the link and query tokens with the key/value cache ready in memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from kvlink_core.encode import DocumentEncoder
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.errors import ConfigError
from kvlink_core.linking import LinkedCache, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, Segment
from kvlink_core.store import DocumentStore
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache

FULL, FLOOR = "full", "floor"


@dataclass(frozen=True, slots=True)
class Case:
    """A prompt's shape: ``documents`` of ``document_tokens`` each, ``links`` after each, then ``query_tokens``."""

    documents: int = 10
    document_tokens: int = 500
    query_tokens: int = 32
    links: int = 5

    @property
    def context_tokens(self) -> int:
        """Document tokens in all."""
        return self.documents * self.document_tokens


@dataclass(frozen=True, slots=True)
class Row:
    """One candidate: what it computed, and seconds to the first token of each run."""

    name: str
    computed_tokens: int
    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds."""
        return statistics.median(self.seconds)


def random_prompt(case: Case, vocabulary: int, *, links: bool, seed: int) -> Prompt:
    """A prompt of random tokens with the layout of DESIGN section 3."""
    draw = torch.Generator().manual_seed(seed)
    segments: list[Segment] = []
    at = 0
    link_tokens = LinkTokens(tuple(range(case.links)), case.links) if links and case.links else None
    for place in range(case.documents):
        ids = tuple(torch.randint(0, vocabulary, (case.document_tokens,), generator=draw).tolist())
        segments.append(Segment("document", ids, at, place))
        at += len(ids)
        if link_tokens:
            segments.append(Segment("link", link_tokens.after(place), at, place))
            at += link_tokens.k
    ids = tuple(torch.randint(0, vocabulary, (case.query_tokens,), generator=draw).tolist())
    segments.append(Segment("suffix", ids, at))
    return Prompt(tuple(segments))


def measure(
    model: LoadedModel,
    case: Case,
    linkers: Sequence[str],
    *,
    repeats: int,
    store_directory: Path | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Row]:
    """Measure.

    Args:
        model: usually one with random weights (``random:llama-100m``).
        case: the prompt's shape.
        linkers: names; ``full`` and the floor are always measured.
        repeats: runs of each, after one that is not counted.
        store_directory: where to keep a store; then every linker that uses caches is also measured reading them from
            there (row ``NAME, from disk``), payload checksums verified.
        progress: called with (runs done, runs in all).

    Raises:
        ConfigError: a context longer than the model's.
    """
    vocabulary = model.spec.vocab_size
    linked_prompt = random_prompt(case, vocabulary, links=True, seed=0)
    plain_prompt = random_prompt(case, vocabulary, links=False, seed=0)
    if linked_prompt.length >= model.context_length:
        raise ConfigError(f"{linked_prompt.length} tokens do not fit the context of {model.context_length}.")
    documents = [list(s.token_ids) for s in plain_prompt.documents]
    caches = DocumentEncoder(model).encode(documents)

    def first_token(linked: LinkedCache) -> None:
        Generation(linked, SamplingParams(), max_tokens=1, stop_ids=frozenset())

    def linker_run(name: str, load: Callable[[], list[DocumentCache]]) -> tuple[int, Callable[[], None]]:
        linker = get_linker(name)
        prompt = linked_prompt if name == "link-tokens" else plain_prompt

        def run() -> LinkedCache:
            return linker.link(model, prompt, load() if linker.uses_caches else [], reserve=1)

        return run().computed_tokens, lambda: first_token(run())

    def floor_run() -> tuple[int, Callable[[], None]]:
        ready = get_linker("link-tokens").link(model, linked_prompt, caches, reserve=1)
        token_ids, positions = ready.token_ids[ready.pending], ready.pending
        return ready.computed_tokens, lambda: _discard(ready.compute(token_ids, positions).argmax())

    runs = {name: linker_run(name, lambda: caches) for name in dict.fromkeys([FULL, *linkers])}
    runs[FLOOR] = floor_run()
    if store_directory is not None:
        store = DocumentStore.open(str(store_directory), fingerprint=model.fingerprint, create=True)
        rows = store.write_shard([(f"document-{i}", cache) for i, cache in enumerate(caches)])
        store.commit(rows)
        for name in linkers:
            if get_linker(name).uses_caches:
                runs[f"{name}, from disk"] = linker_run(name, lambda: _sound(store.load(rows)))
    return _alternate(runs, repeats, model.device, progress)


def _alternate(
    runs: dict[str, tuple[int, Callable[[], None]]],
    repeats: int,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> list[Row]:
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    total, done = (repeats + 1) * len(runs), 0
    for repeat in range(repeats + 1):
        for name, (_, run) in runs.items():
            started = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                seconds[name].append(time.perf_counter() - started)
            done += 1
            progress(done, total)
    return [Row(name, computed, tuple(seconds[name])) for name, (computed, _) in runs.items()]


def _sound(loaded: Sequence[object]) -> list[DocumentCache]:
    caches = [c for c in loaded if isinstance(c, DocumentCache)]
    if len(caches) != len(loaded):
        raise ConfigError("the benchmark's own store could not be read back; is its disk sound?")
    return caches


def _discard(_: object) -> None:
    return None
