"""What a model is, without its weights in memory: enough to tokenize, to plan and to open a store."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kvlink_core.fingerprint import Fingerprint
from kvlink_core.models.spec import ModelSpec
from kvlink_core.prompt import PromptLayout


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """The parts of a ``LoadedModel`` that need no weights, and equal to its own.

    Attributes:
        spec: shape and attention.
        layout: lays prompts out, tokenizes documents.
        fingerprint: what caches made with this model depend on.
        dtype: dtype of weights and caches.
    """

    spec: ModelSpec
    layout: PromptLayout
    fingerprint: Fingerprint
    dtype: torch.dtype

    @property
    def context_length(self) -> int:
        """Positions the model was made for."""
        return self.spec.context_length

    @property
    def bytes_per_token(self) -> int:
        """Bytes of K and V of one token over all layers, uncompressed."""
        spec = self.spec
        return 2 * spec.layers * spec.kv_heads * spec.head_dim * self.dtype.itemsize
