"""What a linker is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


class Linker(Protocol):
    """A strategy that turns document caches and a prompt into a linked cache (DESIGN section 4).

    ``name`` is what users select; ``uses_caches`` is false for a linker that computes everything, so that nothing
    is loaded for it.
    """

    name: str
    uses_caches: bool

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """The link tokens this linker wants after each document, or ``None``.

        Raises:
            ConfigError: the model was not trained with link tokens.
        """
        ...

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place ``caches`` (one per document of the prompt, in order) and say what is left to compute.

        Args:
            model: the model that made the caches.
            prompt: laid out with ``links``.
            caches: empty when ``uses_caches`` is false. Never written to.
            reserve: slots to keep for the answer.
        """
        ...


def place_at_prompt_positions(
    model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int
) -> LinkedCache:
    """Put every cache at its own positions of this prompt; the rest is left to compute."""
    linked = LinkedCache(model, prompt, reserve=reserve)
    tables = model.rotary.tables(torch.arange(prompt.length, device=model.device))
    for segment, cache in zip(prompt.documents, caches, strict=True):
        assert segment.end - segment.start == cache.tokens
        linked.place(cache, segment.start, tables.slice(segment.start, segment.end))
    linked.seal()
    return linked
