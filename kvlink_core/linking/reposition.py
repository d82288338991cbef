"""``reposition``: documents encoded alone, re-positioned into the prompt, no links.

KVLink with k = 0 (arXiv 2502.16002), Block-Attention (arXiv 2409.15355), TurboRAG (arXiv 2410.07590).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlink_core.linking.base import DocumentsAt, place_at_prompt_positions, refuse_wraps
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class Reposition:
    """Re-positioned caches."""

    name: ClassVar[str] = "reposition"
    uses_caches: ClassVar[bool] = True
    documents_at: ClassVar[DocumentsAt] = "prompt"

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None.

        Raises:
            ConfigError: the model wraps its documents.
        """
        refuse_wraps(self, layout)
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches; prefix and suffix are pending."""
        return place_at_prompt_positions(model, prompt, caches, reserve=reserve)
