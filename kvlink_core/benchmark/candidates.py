"""What is compared: full prefill, every linker, and two floors under each.

The floors compute exactly the tokens that a linker leaves to compute, with everything before them in memory: the
engine's own forward pass, and that of transformers as anyone would call it (``sdpa`` attention, a ``DynamicCache`` that
holds the context), on the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.benchmark.corpus import Corpus
from kvlink_core.benchmark.results import Case
from kvlink_core.benchmark.rounds import Clock
from kvlink_core.engine import Generation, SamplingParams
from kvlink_core.linking import LinkedCache, Linker, get_linker
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache

FULL = "full"

#: Loads the caches of a case, or has them already.
Load = Callable[[], list[DocumentCache]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A linker at one case.

    Attributes:
        name: as the user wrote it, parameters and all.
        linker: what it names.
        prompt: with link tokens, if the linker wants them.
        model: what it runs on.
    """

    name: str
    linker: Linker
    prompt: Prompt
    model: LoadedModel

    @classmethod
    def make(cls, name: str, model: LoadedModel, corpus: Corpus, case: Case) -> Candidate:
        """The candidate of that name.

        Raises:
            KVLinkError: there is no such linker, or the model cannot run it.
        """
        linker = get_linker(name)
        return cls(name, linker, corpus.prompt(case, linker.links(_layout_with_links(model, case))), model)

    def link(self, caches: Sequence[DocumentCache]) -> LinkedCache:
        """The linked cache."""
        return self.linker.link(self.model, self.prompt, caches, reserve=1)

    def first_token(self, load: Load) -> Generation:
        """From caches to the first token, by the engine's own way."""
        linked = self.link(load() if self.linker.uses_caches else [])
        return Generation(linked, SamplingParams(), max_tokens=1, stop_ids=frozenset())

    def run(self, load: Load, clock: Clock) -> Mapping[str, float]:
        """Time one first token."""
        seconds, _ = clock.time(lambda: self.first_token(load))
        return {"whole": seconds}


def _layout_with_links(model: LoadedModel, case: Case) -> Any:
    """The model's layout with as many link tokens as the case has: what they are does not matter to speed."""
    layout = copy.copy(model.layout)
    layout.link_tokens = LinkTokens(tuple(range(case.links)), case.links)
    return layout


class Floor:
    """The engine's forward pass over some tokens of a prompt whose other slots are ready.

    Args:
        ready: a linked cache of the prompt, all of it computed or placed.
        pending: int64 positions to compute.
    """

    def __init__(self, ready: LinkedCache, pending: torch.Tensor) -> None:
        self._ready = ready
        self._pending = pending
        self._token_ids = ready.token_ids[pending]

    def forward(self) -> torch.Tensor:
        """Float32 logits ``[vocabulary]`` after the prompt."""
        return self._ready.compute(self._token_ids, self._pending)

    def run(self, clock: Clock) -> Mapping[str, float]:
        """Time it."""
        seconds, _ = clock.time(self.forward)
        return {"whole": seconds}


class StockFloor:
    """The same network as transformers runs it by itself, over as many tokens at the end of a context as long.

    Args:
        ready: its first slots are the context. They are read in place: a ``DynamicCache`` makes new tensors of the old
            and the new tokens in each layer, which is a part of what it costs.
        tokens: how many to compute.
    """

    def __init__(self, ready: LinkedCache, tokens: int) -> None:
        self._ready = ready  # its memory is lent to it alone
        self._model = ready.model
        numbers = ready.model.recipes.numbers
        context = ready.prompt_slots - tokens
        pairs: list[tuple[torch.Tensor | None, torch.Tensor | None]] = [(None, None)] * (numbers[-1] + 1)
        for number, keys, values in zip(numbers, ready.keys, ready.values, strict=True):
            pairs[number] = (keys[None, :, :1], values[None, :, :1])
        self._cache = DynamicCache(pairs)
        self._context = [
            (self._cache.layers[number], keys[None, :, :context], values[None, :, :context])
            for number, keys, values in zip(numbers, ready.keys, ready.values, strict=True)
        ]
        self._rewind()
        self._token_ids = ready.token_ids[ready.prompt.length - tokens :][None].to(ready.model.device)

    def _rewind(self) -> None:
        for layer, keys, values in self._context:
            layer.keys, layer.values = keys, values

    @torch.inference_mode()
    def forward(self) -> torch.Tensor:
        """Logits ``[vocabulary]`` after the prompt; to be called once inside ``prepared``."""
        output = self._model.network(
            input_ids=self._token_ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        return output.logits[0, -1]  # type: ignore[no-any-return]

    @contextmanager
    def prepared(self) -> Iterator[None]:
        """Inside, attention is stock; afterwards the cache holds the context and no more."""
        try:
            with stock_attention(self._model):
                yield
        finally:
            self._rewind()

    def run(self, clock: Clock) -> Mapping[str, float]:
        """Time it."""
        with self.prepared():
            seconds, _ = clock.time(self.forward)
        return {"whole": seconds}


def has_stock(model: LoadedModel) -> bool:
    """Whether transformers can run the model with ``sdpa`` attention."""
    return bool(model.network._supports_sdpa)


@contextmanager
def stock_attention(model: LoadedModel) -> Iterator[None]:
    """Inside, the network attends by ``sdpa`` as transformers has it; for one thread at a time."""
    network = model.network
    ours = network.config._attn_implementation
    network.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        network.set_attn_implementation(ours)


def ready_cache(model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache]) -> LinkedCache:
    """A linked cache of the prompt in which every slot is ready to be read."""
    linked = get_linker("reposition").link(model, prompt, caches, reserve=1)
    linked.compute(linked.token_ids[linked.pending], linked.pending)
    return linked
