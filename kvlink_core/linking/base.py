"""What a linker is, and what several linkers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Protocol

import torch

from kvlink_core.errors import ConfigError
from kvlink_core.linking.linked_cache import WRAPPED, WRAPPED_REMEDY, LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache

#: Where a linker that does nothing else to documents has them: at their positions in the prompt, each from 0 on, or
#: nowhere, all tokens being computed.
DocumentsAt = Literal["prompt", "local", "computed"]


class Linker(Protocol):
    """A strategy that turns document caches and a prompt into a linked cache (DESIGN section 4).

    ``name`` is what users select; ``uses_caches`` is false for a linker that computes everything, so that nothing
    is loaded for it. A linker holds its parameters and no state: one is made for each request, and may be shared.

    A linker whose ``link`` does nothing but place documents may say where, in a class variable ``documents_at``: its
    requests then share the documents' memory in the engine. The others get copies, by ``link``.
    """

    name: ClassVar[str]
    uses_caches: ClassVar[bool]

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """The link tokens this linker wants after each document, or ``None``.

        Raises:
            ConfigError: the model was not trained for this linker.
        """
        ...

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place ``caches`` (one per document of the prompt, in order) and say what is left to compute.

        How many tokens this linker computes for the prompt, what it computed in here included, is then the linked
        cache's ``computed_tokens``.

        Args:
            model: the model that made the caches.
            prompt: laid out with ``links``.
            caches: empty when ``uses_caches`` is false. Never written to.
            reserve: slots to keep for the answer.

        Raises:
            ConfigError: a parameter that this model has no room for.
            PrunedCacheError: pruned caches, and a linker that computes tokens of documents.
            UnsupportedModelError: pruned caches, and a model that cannot rotate each head by itself.
        """
        ...


def documents_at(linker: Linker) -> DocumentsAt | None:
    """Where a linker says that its documents are; ``None`` when only its ``link`` knows."""
    return getattr(linker, "documents_at", None)  # optional, so that a linker need not know of it


def refuse_wraps(linker: Linker, layout: PromptLayout) -> None:
    """Raises ``ConfigError`` where the model wraps its documents: for linkers that were not made for that."""
    if layout.wrap is not None:
        raise ConfigError(f"{WRAPPED}, which linker {linker.name!r} does not know; {WRAPPED_REMEDY}", param="linker")


def place_at_prompt_positions(
    model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int
) -> LinkedCache:
    """Put every cache at its own positions of this prompt; the rest is left to compute."""
    linked = LinkedCache(model, prompt, reserve=reserve, caches=caches)
    linked.place_all(caches, model.rotary.tables(torch.arange(prompt.length, device=model.device)))
    linked.seal()
    return linked
