"""``full``: no reuse. The whole prompt is computed with ordinary causal attention.

The upper bound for quality and the baseline for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlink_core.linking.base import DocumentsAt
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class Full:
    """Full prefill."""

    name: ClassVar[str] = "full"
    uses_caches: ClassVar[bool] = False
    documents_at: ClassVar[DocumentsAt] = "computed"

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None: every document sees all earlier ones anyway."""
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Everything is pending, but for trained embeddings around documents: those stand in for what reuse lacks."""
        return LinkedCache(model, prompt.unwrapped(), reserve=reserve)
