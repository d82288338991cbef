"""``full``: no reuse. The whole prompt is computed with ordinary causal attention.

The upper bound for quality and the baseline for speed.
"""

from __future__ import annotations

from collections.abc import Sequence

from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


class Full:
    """Full prefill."""

    name = "full"
    uses_caches = False

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None: every document sees all earlier ones anyway."""
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Everything is pending."""
        return LinkedCache(model, prompt, reserve=reserve)
