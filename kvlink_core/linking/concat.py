"""``concat``: caches as they were encoded, each counting its positions from 0, one after the other.

PromptCache (arXiv 2311.04934) reuses modules at the positions at which they were encoded. Here all were encoded from 0
on, so that positions overlap between documents; the tokens that are computed have their own positions of the prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvlink_core.linking.base import DocumentsAt, refuse_wraps
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class Concat:
    """Caches at their local positions."""

    name: ClassVar[str] = "concat"
    uses_caches: ClassVar[bool] = True
    documents_at: ClassVar[DocumentsAt] = "local"

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None.

        Raises:
            ConfigError: the model wraps its documents.
        """
        refuse_wraps(self, layout)
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches rotated to ``0..n-1``; prefix and suffix are pending.

        What a layer's window lets a token see goes by the order in the prompt.
        """
        linked = LinkedCache(model, prompt, reserve=reserve, caches=caches)
        longest = max((cache.tokens for cache in caches), default=0)
        tables = model.rotary.tables(torch.arange(longest, device=model.device))
        for segment, cache in zip(prompt.documents, caches, strict=True):
            linked.place(cache, segment.start, tables.slice(0, cache.tokens))
        linked.seal()
        return linked
