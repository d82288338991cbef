"""A context of which layers and heads lack some tokens, each others: where the tokens stand that are left."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from kvlink_core.errors import UnsupportedModelError

#: transformers' predicate of a mask: batch, head, query's position, key's position.
Rule = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True)
class PrunedContext:
    """What one forward pass over a pruned context has to know.

    Slots are in the order of the prompt in every head, and a computed token sees all slots before its own: so where
    nothing but the future is hidden, slots do for positions. Windows and chunks do not go by slots; there each layer
    asks for each of its heads by itself.

    Attributes:
        slots: int64 ``[n]``, of the tokens that are computed, ascending.
        positions: int64 ``[n]``, theirs in the prompt.
        where: ``[layers, kv_heads, slots]``, the position of what is in each slot.
        numbers: the model's own number of each of these layers.
    """

    slots: torch.Tensor
    positions: torch.Tensor
    where: torch.Tensor
    numbers: Sequence[int]
    _masks: dict[int, tuple[torch.Tensor, Rule | None]] = field(default_factory=dict)

    @property
    def length(self) -> int:
        """Positions up to the last token that is computed."""
        return int(self.positions[-1]) + 1

    def shared(self, mask: torch.Tensor) -> torch.Tensor:
        """``mask``, which holds for all layers and heads."""
        self._masks[mask.data_ptr()] = (mask, None)
        return mask

    def asked_by_layer(self, rule: Rule, length: int) -> torch.Tensor:
        """What stands, on its way through the model, for the masks that ``mask_of`` makes by ``rule``."""
        stand_in = torch.ones(1, 1, self.slots.shape[0], length, dtype=torch.bool, device=self.slots.device)
        self._masks[stand_in.data_ptr()] = (stand_in, rule)
        return stand_in

    def mask_of(self, module: torch.nn.Module, mask: torch.Tensor, heads: int) -> tuple[torch.Tensor, bool]:
        """The mask of an attention module that was handed ``mask``, and whether other layers have the same.

        Raises:
            UnsupportedModelError: the model made the mask out of one that stands for others, or the module's keys are
                another layer's.
        """
        known = self._masks.get(mask.data_ptr())
        if known is None and all(rule is None for _, rule in self._masks.values()):
            return mask, True  # made by the model out of one that holds for all
        if known is None:
            raise UnsupportedModelError(
                "this model changes the mask that it is given, so that windows over pruned documents cannot be told "
                "apart. Use caches of a codec without keep."
            )
        _, rule = known
        if rule is None:
            return mask, True
        number = getattr(module, "layer_idx", None)
        if number not in self.numbers:
            raise UnsupportedModelError(
                "a pruned context reaches beyond a window of this model, in a layer that reads another layer's keys: "
                "which of them it may see cannot be told. Use caches of a codec without keep, or a shorter prompt."
            )
        length = mask.shape[3]
        where = self.where[self.numbers.index(number), :, :length]
        zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=where.device)
        seen = rule(zero, zero, self.positions[None, None, :, None], where[None, :, None, :])
        seen = seen.expand(1, where.shape[0], self.slots.shape[0], length)
        return seen.repeat_interleave(heads // where.shape[0], dim=1), False
