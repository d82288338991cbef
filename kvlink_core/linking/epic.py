"""``epic``: re-positioned caches, of which the first k tokens of each document are computed anew.

LegoLink of EPIC (arXiv 2410.15332): a document encoded alone takes its own first tokens for attention sinks; computed
in the prompt, they no longer draw the attention that later tokens owe to what stands before.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from kvlink_core.errors import ConfigError
from kvlink_core.linking.base import place_at_prompt_positions, refuse_wraps
from kvlink_core.linking.linked_cache import LinkedCache
from kvlink_core.models import LoadedModel
from kvlink_core.prompt import Prompt, PromptLayout
from kvlink_core.template import LinkTokens
from kvlink_core.types import DocumentCache


@dataclass(frozen=True, slots=True)
class Epic:
    """Re-positioned caches with fresh beginnings.

    Args:
        k: tokens to compute at the start of each document. 16 is what the paper times under load and at long contexts
            (LegoLink-16), of the 0 to 32 that it tries. 0 is ``reposition``; as many as the longest document has, or
            more, is full prefill. The paper leaves the first chunk as it is because nothing stands before it; here a
            prefix does.

    Raises:
        ConfigError: ``k`` is negative.
    """

    k: int = 16

    name: ClassVar[str] = "epic"
    uses_caches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.k < 0:
            raise ConfigError(f"linker 'epic': k is a number of tokens from 0 up, not {self.k}.", param="linker")

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None.

        Raises:
            ConfigError: the model wraps its documents.
        """
        refuse_wraps(self, layout)
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches; prefix, suffix and the first ``k`` tokens of each document are pending."""
        linked = place_at_prompt_positions(model, prompt, caches, reserve=reserve)
        for segment in prompt.documents:
            linked.recompute(torch.arange(segment.start, min(segment.start + self.k, segment.end)))
        return linked
