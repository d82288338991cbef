"""``cacheblend``: re-positioned caches, of which the tokens that deviate most from full prefill are computed anew.

CacheBlend (arXiv 2405.16444). Tokens whose values deviate most in one layer are likely to be those of the next layers
too (its insight 2), so the whole prompt is run through the first layers alone, and the tokens to compute in all layers
are chosen by how far the values found there are from the cached ones. Tokens are chosen once, at one layer, as in the
authors' own code; the paper also describes choosing again, a few less, at each layer after it.
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
class CacheBlend:
    """Re-positioned caches blended with fresh tokens.

    Args:
        ratio: share of all document tokens to compute, rounded to whole tokens; the paper's default is 0.15. 1 is full
            prefill. 0 still has fresh keys and values in the first layers: of every token, ``layer`` and before.
        layer: where values are compared, counted from 0 over the layers that cache. In layer 0 no token has seen
            another, so 1 is the first that can tell; the first layers are computed for all tokens. Later layers choose
            better where the first ones have windows shorter than the documents, and cost more.

    Raises:
        ConfigError: a parameter outside its range.
    """

    ratio: float = 0.15
    layer: int = 1

    name: ClassVar[str] = "cacheblend"
    uses_caches: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.ratio <= 1:
            raise ConfigError(f"linker 'cacheblend': ratio is a share from 0 to 1, not {self.ratio}.", param="linker")
        if self.layer < 1:
            raise ConfigError(
                f"linker 'cacheblend': layer must be 1 or more, not {self.layer}: in layer 0 nothing deviates yet.",
                param="linker",
            )

    def links(self, layout: PromptLayout) -> LinkTokens | None:
        """None.

        Raises:
            ConfigError: the model wraps its documents.
        """
        refuse_wraps(self, layout)
        return None

    def link(self, model: LoadedModel, prompt: Prompt, caches: Sequence[DocumentCache], *, reserve: int) -> LinkedCache:
        """Place the caches, run the first layers, choose; prefix, suffix and what was chosen are pending.

        Computing these over the first layers again gives what is there already: their inputs are the same.

        Raises:
            ConfigError: the model has no such layer.
        """
        layers = len(model.recipes.layers)
        if self.layer >= layers:
            raise ConfigError(
                f"linker 'cacheblend': layer {self.layer} of a model with {layers} layers; name one from 1 to "
                f"{layers - 1}.",
                param="linker",
            )
        linked = place_at_prompt_positions(model, prompt, caches, reserve=reserve)
        if caches:
            linked.compute_first(self.layer + 1)
            found, positions = _deviations(model, linked, caches, self.layer)
            chosen = found.topk(round(self.ratio * len(positions))).indices
            linked.recompute(positions[chosen.cpu()])
        return linked


def _deviations(
    model: LoadedModel, linked: LinkedCache, caches: Sequence[DocumentCache], layer: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared distances between fresh and cached values of all document tokens ``[n]``, and their positions ``[n]``.

    Latent attention caches a rotated key where others cache values; there the latent is compared.
    """
    recipe = model.recipes.layers[layer]
    latent = recipe is not None and recipe.slot == "value"
    fresh = (linked.keys if latent else linked.values)[layer]
    found, positions = [], []
    for segment, cache in zip(linked.prompt.documents, caches, strict=True):
        cached = (cache.keys if latent else cache.values)[layer].to(fresh.device)
        difference = fresh[:, segment.start : segment.end].float() - cached.float()
        found.append(difference.square().sum(dim=(0, 2)))
        positions.append(torch.arange(segment.start, segment.end))
    return torch.cat(found), torch.cat(positions)
