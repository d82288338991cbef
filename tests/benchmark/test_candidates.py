"""The floors compute what the linkers compute, stock transformers is stock, and steps make up the whole."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from kvlink_core.benchmark.breakdown import Steps, forward_time, without_rotation
from kvlink_core.benchmark.candidates import (
    Candidate,
    Floor,
    StockFloor,
    ready_cache,
    stock_attention,
)
from kvlink_core.benchmark.corpus import Corpus
from kvlink_core.benchmark.results import Case, parts_of
from kvlink_core.benchmark.rounds import Clock
from kvlink_core.models import LoadedModel, load_model

CASE = Case(context_tokens=50, document_tokens=20, query_tokens=7, links=3)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    return load_model("random:llama-tiny")


@pytest.fixture(scope="module")
def corpus(model: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Corpus]:
    corpus = Corpus(model, tmp_path_factory.mktemp("bench") / "store", "raw")
    yield corpus
    corpus.close()


def make(name: str, model: LoadedModel, corpus: Corpus) -> Candidate:
    return Candidate.make(name, model, corpus, CASE)


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return float((ours - theirs).abs().max()) <= 1e-5 * float(theirs.abs().max())


@pytest.mark.parametrize(
    ("name", "length", "computed"), [("full", 57, 57), ("reposition", 57, 7), ("link-tokens", 66, 16)]
)
def test_a_candidate_computes_what_its_linker_leaves(
    name: str, length: int, computed: int, model: LoadedModel, corpus: Corpus
) -> None:
    candidate = make(name, model, corpus)
    assert candidate.prompt.length == length
    assert [s.end - s.start for s in candidate.prompt.documents] == [20, 20, 10]
    caches = corpus.caches(CASE) if candidate.linker.uses_caches else []
    assert candidate.link(caches).computed_tokens == computed


def test_a_longer_case_begins_with_the_documents_of_a_shorter_one(model: LoadedModel, corpus: Corpus) -> None:
    longer = CASE.model_copy(update={"context_tokens": 60})
    assert corpus.caches(longer)[:2] == corpus.caches(CASE)[:2]  # the very same objects, encoded once
    assert [c.tokens for c in corpus.caches(longer)] == [20, 20, 20]


def test_the_store_gives_the_caches_back(corpus: Corpus) -> None:
    corpus.store(CASE)
    longer = CASE.model_copy(update={"context_tokens": 60})
    corpus.store(longer)
    for case in (CASE, longer):
        for loaded, cache in zip(corpus.load(case), corpus.caches(case), strict=True):
            assert torch.equal(loaded.keys, cache.keys)
            assert torch.equal(loaded.values, cache.values)


@pytest.mark.parametrize("name", ["reposition", "link-tokens"])
def test_the_engines_floor_does_the_linkers_forward(name: str, model: LoadedModel, corpus: Corpus) -> None:
    candidate = make(name, model, corpus)
    linked = candidate.link(corpus.caches(CASE))
    floor = Floor(ready_cache(model, candidate.prompt, corpus.caches(CASE)), linked.pending)
    expected = linked.compute(linked.token_ids[linked.pending], linked.pending)
    for _ in range(2):  # a floor can be run again
        assert close(floor.forward(), expected)


def test_the_stock_floor_does_the_same_forward(model: LoadedModel, corpus: Corpus) -> None:
    candidate = make("reposition", model, corpus)
    linked = candidate.link(corpus.caches(CASE))
    stock = StockFloor(ready_cache(model, candidate.prompt, corpus.caches(CASE)), linked.computed_tokens)
    expected = linked.compute(linked.token_ids[linked.pending], linked.pending)
    for _ in range(2):  # its cache grew, and was rewound
        with stock.prepared():
            assert close(stock.forward(), expected)


def test_stock_attention_is_stock_and_only_inside(model: LoadedModel) -> None:
    network = model.network
    before = network.config._attn_implementation
    assert before != "sdpa"
    inside = []

    def fail() -> None:
        with stock_attention(model):
            inside.append(network.config._attn_implementation)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert inside == ["sdpa"]
    assert network.config._attn_implementation == before


def test_without_rotation_keys_are_placed_as_they_are(model: LoadedModel, corpus: Corpus) -> None:
    candidate = make("reposition", model, corpus)
    caches = corpus.caches(CASE)
    rotated, bare = candidate.link(caches), without_rotation(candidate).link(caches)
    assert torch.equal(bare.keys[:, :, 20:40], caches[1].keys)
    assert not torch.equal(rotated.keys[:, :, 20:40], caches[1].keys)
    assert torch.equal(bare.values[:, :, :50], rotated.values[:, :, :50])


def test_forward_passes_are_counted_once_each(model: LoadedModel, corpus: Corpus) -> None:
    linked = make("reposition", model, corpus).link(corpus.caches(CASE))
    clock = Clock(model.device)
    with forward_time(model, clock) as seconds:
        whole, _ = clock.time(lambda: linked.compute(linked.token_ids[linked.pending], linked.pending))
        assert len(seconds) == 1  # the network's own call, not also those of its layers
        assert 0 < seconds[0] < whole
    linked.compute(linked.token_ids[linked.pending], linked.pending)
    assert len(seconds) == 1  # nothing stays hooked


@pytest.mark.parametrize("disk", [False, True])
def test_each_step_is_timed_and_only_a_store_is_loaded_from(disk: bool, model: LoadedModel, corpus: Corpus) -> None:
    corpus.store(CASE)
    candidate = make("link-tokens", model, corpus)
    with ThreadPoolExecutor(1) as pool:
        steps = Steps(candidate, (lambda: corpus.load(CASE)) if disk else None, corpus, CASE, pool)
        measured = steps.run(Clock(model.device))
    parts = parts_of({name: [seconds] for name, seconds in measured.items()})
    assert (measured["load"] > 0, measured["decode"] > 0) == (disk, disk)
    assert all(measured[name] > 0 for name in ("link", "unrotated", "prefill", "sample"))
    assert measured["link_forward"] == 0
    assert min(parts.values()) >= 0


class _Recomputing:
    """A linker that runs the model while it links."""

    name = "recomputing"
    uses_caches = True

    def __init__(self, inner: Candidate) -> None:
        self._inner = inner.linker
        self.links = inner.linker.links

    def link(self, *args: object, **kwargs: object) -> object:
        linked = self._inner.link(*args, **kwargs)  # type: ignore[arg-type]
        linked.compute(linked.token_ids[linked.pending], linked.pending)
        return linked


def test_what_a_linker_computes_while_linking_is_prefill(model: LoadedModel, corpus: Corpus) -> None:
    plain = make("reposition", model, corpus)
    candidate = Candidate("recomputing", _Recomputing(plain), plain.prompt, model)  # type: ignore[arg-type]
    with ThreadPoolExecutor(1) as pool:
        measured = Steps(candidate, None, corpus, CASE, pool).run(Clock(model.device))
    assert 0 < measured["link_forward"] < measured["link"]
    assert measured["unrotated"] < measured["link"]
