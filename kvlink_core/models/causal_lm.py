"""A causal language model of transformers, made ready for linking: encode documents alone, compute on a linked cache.

Models that take their attention from transformers' registry get ours (``attention``), which sees windows and chunks as
the model means them. Older ones that bring their own attention take an explicit mask instead; those have no windows.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, Cache, PreTrainedModel

from kvlink_core.errors import UnsupportedModelError
from kvlink_core.models.attention import ATTENTION, attending, watched
from kvlink_core.models.capture import RotationCall, install
from kvlink_core.models.graphs import Graphs
from kvlink_core.models.key_recipe import KeyRecipe, Recipes, UnrotatedCache
from kvlink_core.models.memory import SlotMemory
from kvlink_core.models.probe import attention_modules, find_recipes
from kvlink_core.models.pruned import PrunedContext
from kvlink_core.models.reading import Reading, Reads, SecondReading, check_reads, query_of
from kvlink_core.models.rope import Rotary

#: Who masks: our attention, asked by the model; or a mask given with each call, boolean or additive.
Masking = Literal["asked", "boolean", "additive"]


@dataclass(frozen=True, slots=True)
class CausalLM:
    """A network with the handles that encoding and linking need. Shared by threads; its weights are never changed.

    Attributes:
        network: the Hugging Face model with its language modelling head, in evaluation mode.
        decoder: the part of it that embeds tokens and runs the layers.
        recipes: how its layers make the keys that they cache.
        rotary: re-positions keys.
        masking: how it learns what a token may see.
        memory: where linked caches keep their slots on a CPU.
        graphs: where they keep them on CUDA, and what was recorded over them; ``None`` elsewhere.
    """

    network: Any
    decoder: Any
    recipes: Recipes
    rotary: Rotary
    masking: Masking
    memory: SlotMemory = field(default_factory=SlotMemory)
    graphs: Graphs | None = None

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(self.network.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of weights and caches."""
        return self.network.dtype  # type: ignore[no-any-return]

    @torch.inference_mode()
    def encode(self, **inputs: torch.Tensor) -> UnrotatedCache:
        """Run documents alone, one per row, from position 0; the padding, if any, stands at the right.

        Args:
            inputs: ``input_ids`` int64 ``[batch, tokens]``, or ``inputs_embeds [batch, tokens, hidden]``.
        """
        with UnrotatedCache(self.recipes) as cache:
            self.decoder(**inputs, past_key_values=cache, use_cache=True)
        return cache

    def check_reads(self, reads: Reads) -> None:
        """Raise ``UnsupportedModelError`` where ``read`` cannot show that."""
        check_reads(self.recipes, self.masking, reads)

    @torch.inference_mode()
    def read(
        self, reads: Reads, lengths: Sequence[int], **inputs: torch.Tensor
    ) -> tuple[UnrotatedCache, list[Reading]]:
        """``encode``, and what else is to be seen of each document.

        Args:
            reads: what; ``check_reads`` must have accepted it.
            lengths: tokens of each document.
            inputs: as for ``encode``; for ``again`` every document stands twice in its row, one right behind the other.

        Raises:
            UnsupportedModelError: a layer does not show its attention.
        """
        queries: list[torch.Tensor] = []

        def note(recipe: KeyRecipe | None, calls: Sequence[RotationCall]) -> None:
            assert recipe is not None
            queries.append(query_of(recipe, calls))

        second = SecondReading(self.recipes, lengths)
        with UnrotatedCache(self.recipes, note if reads == "queries" else None) as cache, ExitStack() as watching:
            if reads == "again":
                watching.enter_context(watched(second))
            self.decoder(**inputs, past_key_values=cache, use_cache=True)
        modules = attention_modules(self.decoder)
        scaling = [
            float(getattr(modules.get(number), "scaling", None) or self.recipes.key_dim**-0.5)
            for number in self.recipes.numbers
        ]
        readings = []
        for row, tokens in enumerate(lengths):
            seen = second.attention[row]
            if reads == "again" and len(seen) != len(self.recipes.numbers):
                raise UnsupportedModelError("not every layer of this model shows its attention; use another scorer.")
            readings.append(
                Reading(
                    self.rotary.rotate,
                    self.recipes.layers,
                    [q[row, :, :tokens] for q in queries],
                    scaling,
                    [seen[layer] for layer in range(len(self.recipes.numbers))] if reads == "again" else [],
                )
            )
        return cache, readings

    @torch.inference_mode()
    def compute(
        self,
        token_ids: torch.Tensor,
        positions: torch.Tensor,
        length: int,
        cache: Cache,
        pruned: PrunedContext | None = None,
    ) -> torch.Tensor:
        """Run some tokens of one prompt, which see their earlier positions among slots ``0..length-1`` of ``cache``.

        Args:
            token_ids, positions: int64 ``[n]`` on the model's device; positions ascending.
            length: slots that exist so far, the last of which is the last token's.
            cache: its ``update`` takes the keys and values of the computed tokens and returns those of all slots.
            pruned: where slots are not positions.

        Returns:
            Float32 logits ``[vocabulary]`` after the last token.

        Raises:
            UnsupportedModelError: for ``pruned``, where windows cannot be told from each other (see ``attention``).
        """
        inputs = {
            "input_ids": token_ids.unsqueeze(0),
            "position_ids": positions.unsqueeze(0),
            "past_key_values": cache,
            "use_cache": True,
            "logits_to_keep": 1,
        }
        if positions.shape[0] == length:  # nothing is there yet: the model's own causal mask, with the fastest kernels
            output = self.network(**inputs)
        elif self.masking == "asked":
            with attending(positions if pruned is None else pruned.slots, length, pruned):
                output = self.network(**inputs)
        else:
            slots = positions if pruned is None else pruned.slots
            seen = torch.arange(length, device=positions.device) <= slots[:, None]
            output = self.network(**inputs, attention_mask=self._given(seen[None, None]))
        return output.logits[0, -1].float()  # type: ignore[no-any-return]

    def _given(self, seen: torch.Tensor) -> torch.Tensor:
        if self.masking == "boolean":
            return seen
        lowest = torch.finfo(self.dtype).min
        return torch.zeros(seen.shape, dtype=self.dtype, device=seen.device).masked_fill_(~seen, lowest)


def attention_of(config: Any) -> tuple[str, Masking]:
    """The ``attn_implementation`` to load a model of ``config`` with, and how it is then told what a token may see."""
    network_class = AutoModelForCausalLM._model_mapping[type(config)]
    if network_class._supports_attention_backend:
        return ATTENTION, "asked"
    return ("sdpa", "boolean") if network_class._supports_sdpa else ("eager", "additive")


def prepare(network: Any, masking: Masking) -> CausalLM:
    """Make a network ready for linking.

    Args:
        network: loaded with the ``attn_implementation`` of ``attention_of``; put into evaluation mode.
        masking: as ``attention_of`` says.

    Raises:
        UnsupportedModelError: its keys cannot be read before RoPE and re-positioned exactly.
    """
    network = network.eval().requires_grad_(False)
    decoder = network.get_decoder()
    if not isinstance(decoder, PreTrainedModel):  # some name their output head so
        decoder = network.base_model
    install(network)
    recipes = _refusing(lambda: find_recipes(network, decoder))
    device, graphs = torch.device(network.device), None
    if device.type == "cuda":
        graphs = Graphs(device, network.dtype, recipes.shapes)
    return CausalLM(network, decoder, recipes, Rotary(recipes), masking, graphs=graphs)


def _refusing(probe: Callable[[], Recipes]) -> Recipes:
    """Name whatever a model does that our cache does not know: it was made for another kind of cache."""
    try:
        return probe()
    except UnsupportedModelError:
        raise
    except (IndexError, AttributeError, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UnsupportedModelError(
            f"this model does not run over a cache of keys and values alone ({type(error).__name__}: {error})."
        ) from error
