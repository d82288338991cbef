"""``soft-wrap``: re-positioned caches of documents between a trained header and trailer.

KV Packet (arXiv 2604.13226): header and trailer are embeddings, trained with the model frozen, and encoded and cached
with the document; at query time nothing of a document is computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlink_core.errors import ConfigError
from kvlink_core.linking.base import DocumentsAt, place_at_prompt_positions
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class SoftWrapLinker:
    """Re-positioned caches of wrapped documents. The wrapping was done when they were encoded."""

    name: ClassVar[str] = "soft-wrap"
    uses_caches: ClassVar[bool] = True
    documents_at: ClassVar[DocumentsAt] = "prompt"

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None: the wrap is part of the document.

        Raises:
            ConfigError: the model has no wrap.
        """
        if layout.wrap is None:
            raise ConfigError(
                "this model has no trained embeddings around its documents (its kvlink.json names no soft_wrap file); "
                "use the linker 'reposition', or a model with such a file.",
                param="linker",
            )
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches; prefix and suffix are pending."""
        return place_at_prompt_positions(model, prompt, caches, reserve=reserve)
