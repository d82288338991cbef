"""``link-tokens``: re-positioned caches and k trained tokens after each, which attend to everything before them.

KVLink (arXiv 2502.16002): the link tokens, computed at query time, restore the attention between documents that
encoding them alone has cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from kvlink_core.errors import ConfigError
from kvlink_core.linking.base import DocumentsAt, place_at_prompt_positions, refuse_wraps
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class LinkTokensLinker:
    """Re-positioned caches joined by link tokens.

    Args:
        k: how many of the model's link tokens to use after each document, the first ones; 0 for all that it has.
    """

    k: int = 0

    name: ClassVar[str] = "link-tokens"
    uses_caches: ClassVar[bool] = True
    documents_at: ClassVar[DocumentsAt] = "prompt"

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """The model's own link tokens.

        Raises:
            ConfigError: the model has none, or less than ``k``, or it wraps its documents.
        """
        refuse_wraps(self, layout)
        if layout.link_tokens is None:
            raise ConfigError(
                "this model has no link tokens (its kvlink.json names none); use the linker 'reposition', "
                "or a model trained with link tokens.",
                param="linker",
            )
        if not 0 <= self.k <= layout.link_tokens.k:
            raise ConfigError(
                f"linker 'link-tokens': k={self.k}, and this model has {layout.link_tokens.k} link tokens after each "
                "document; use as many or fewer.",
                param="linker",
            )
        return layout.link_tokens.first(self.k) if self.k else layout.link_tokens

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches; prefix, link tokens and suffix are pending."""
        return place_at_prompt_positions(model, prompt, caches, reserve=reserve)
