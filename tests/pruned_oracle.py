"""Pruned contexts by their definition: one plain pass, in which each head is told token by token what it may see.

The network is loaded anew with an attention of this file, so that nothing of the product's attention, masks or slots is
in it: keys are repeated for the queries that share them, scores and softmax are written out, and every layer and every
head has a mask of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM

from kvlink_core.prompt import Prompt

_NAME = "kvlink-tests-pruned"

#: By layer, boolean ``[kv_heads, queries, keys]``: what the pass under way lets its heads see.
_seen: dict[int, torch.Tensor] = {}


def _attend(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, _: Any, **kwargs: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    seen = _seen[module.layer_idx]
    heads = query.shape[1]
    key, value = (x.repeat_interleave(heads // x.shape[1], dim=1) for x in (key, value))
    scores = torch.einsum("bhqd,bhkd->bhqk", query, key) * kwargs["scaling"]
    if kwargs.get("softcap") is not None:
        scores = kwargs["softcap"] * torch.tanh(scores / kwargs["softcap"])
    seen = torch.stack([seen[head * seen.shape[0] // heads] for head in range(heads)])
    weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
    return torch.einsum("bhqk,bhkd->bqhd", weights, value), weights


AttentionInterface.register(_NAME, _attend)
AttentionMaskInterface.register(_NAME, lambda *_, **__: None)


def load(directory: Path) -> Any:
    """The network in ``directory``, with the attention of this file."""
    network = AutoModelForCausalLM.from_pretrained(str(directory), attn_implementation=_NAME, dtype=torch.float32)
    return network.eval()


def window_of(config: Any, layer: int) -> int | None:
    """The window of a layer, or ``None``."""
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


def masks(
    config: Any, prompt: Prompt, kept: Sequence[Sequence[Sequence[set[int]]] | None], extra: int
) -> dict[int, torch.Tensor]:
    """By layer, what each KV head lets each token see, asked for every pair of tokens.

    Args:
        kept: by document, layer and KV head, the tokens of the document that others may see; ``None`` for all.
        extra: tokens after the prompt.
    """
    length = prompt.length + extra
    owner: list[tuple[int, int] | None] = [None] * length  # document, and place within it
    for number, segment in enumerate(prompt.documents):
        for position in range(segment.start, segment.end):
            owner[position] = (number, position - segment.start)
    heads = next((len(k[0]) for k in kept if k is not None), 1)
    found = {}
    for layer in range(config.num_hidden_layers):
        window = window_of(config, layer)
        seen = torch.zeros(heads, length, length, dtype=torch.bool)
        for q in range(length):
            for k in range(q + 1):
                if window is not None and q - k >= window:
                    continue
                for head in range(heads):
                    seen[head, q, k] = _sees(owner[q], owner[k], kept, layer, head)
        found[layer] = seen
    return found


def _sees(
    query: tuple[int, int] | None, key: tuple[int, int] | None, kept: Sequence[Any], layer: int, head: int
) -> bool:
    if query is not None:  # a document's token sees all of its own document, as if nothing were ever dropped
        return key is not None and key[0] == query[0]
    if key is None or kept[key[0]] is None:
        return True
    return key[1] in kept[key[0]][layer][head]


@torch.inference_mode()
def greedy(
    network: Any, prompt: Prompt, kept: Sequence[Any], steps: int, *, local: bool = False
) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens, and the logits that chose them, every step a pass from nothing.

    Args:
        network: of ``load``.
        kept: as for ``masks``.
        local: whether documents count their positions from 0, each for itself.
    """
    seen = masks(network.config, prompt, kept, steps)
    positions = list(range(prompt.length + steps))
    for segment in prompt.documents if local else ():
        positions[segment.start : segment.end] = range(segment.end - segment.start)
    tokens: list[int] = []
    logits = []
    for _ in range(steps):
        ids = [*prompt.token_ids().tolist(), *tokens]
        n = len(ids)
        _seen.update({layer: mask[:, :n, :n] for layer, mask in seen.items()})
        output = network(input_ids=torch.tensor([ids]), position_ids=torch.tensor([positions[:n]]), use_cache=False)
        logits.append(output.logits[0, -1].float())
        tokens.append(int(logits[-1].argmax()))
    return tokens, logits
