"""Oracles, written without any of the product's formulas: plain forward passes of the Hugging Face model under masks.

``logits`` is the oracle of DESIGN section 3: the whole prompt under a 4-D mask made by asking, for every pair of
positions, the two questions of the definition. ``blended`` is the one for linkers that mix tokens as they are when
encoded alone with tokens as they are in the prompt: still one forward pass and no cache, over rows of which there are
two for a document's token, one for each of the two. Slow on purpose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
from transformers import DynamicCache

from kvlink_core.prompt import Prompt


@lru_cache(maxsize=16)
def mask(prompt: Prompt, extra: int, *, isolate: bool, window: int | None) -> torch.Tensor:
    """Boolean ``[length, length]`` over the prompt and ``extra`` generated tokens; not to be written to."""
    length = prompt.length + extra
    owner: list[int | None] = [None] * length
    for segment in prompt.segments:
        if segment.kind == "document":
            for position in range(segment.start, segment.end):
                owner[position] = segment.document
    seen = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            within = window is None or q - k < window
            allowed = not isolate or owner[q] is None or owner[q] == owner[k]
            seen[q, k] = within and allowed
    return seen


@torch.inference_mode()
def logits(network: Any, prompt: Prompt, generated: list[int], *, isolate: bool, cache: Any = None) -> torch.Tensor:
    """Float32 logits after the last of ``generated`` (or of the prompt): one pass from nothing, kept in ``cache``."""
    config = network.config
    ids = torch.cat([prompt.token_ids(), torch.tensor(generated, dtype=torch.int64)])[None]
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)

    def additive(window: int | None) -> torch.Tensor:
        ahead = -(-len(generated) // 8) * 8  # one mask for several steps: a smaller one is its corner
        seen = mask(prompt, ahead, isolate=isolate, window=window)
        return _additive(seen[: ids.shape[1], : ids.shape[1]])

    masks: Any
    if layer_types is None:
        masks = additive(window)
    else:
        masks = {t: additive(window if t == "sliding_attention" else None) for t in set(layer_types)}
    output = network(
        input_ids=ids,
        attention_mask=masks,
        position_ids=torch.arange(ids.shape[1])[None],
        past_key_values=cache,
        use_cache=cache is not None,
    )
    return output.logits[0, -1].float()


def greedy(network: Any, prompt: Prompt, steps: int, *, isolate: bool) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and the logits that chose them, every step a pass from nothing."""
    return _greedy(lambda tokens: logits(network, prompt, tokens, isolate=isolate), steps)


@torch.inference_mode()
def blended(
    network: Any,
    prompt: Prompt,
    generated: list[int],
    *,
    stale: Callable[[int], set[int]],
    local: bool = False,
    inputs: torch.Tensor | None = None,
) -> torch.Tensor:
    """Float32 logits after the last of ``generated`` (or of the prompt), some tokens being as encoded alone.

    Args:
        network, prompt, generated: as for ``logits``.
        stale: by layer, the positions of the prompt whose keys and values are, to the tokens of the prompt, those that
            their document has alone. All of them must be of documents.
        local: whether documents alone count their positions from 0.
        inputs: ``[length, hidden]``, embeddings of the prompt in place of its token ids.
    """
    length = prompt.length + len(generated)
    # a row: where it stands in the prompt, the document that it is alone in or -1, the position that RoPE gives it
    rows = [
        (slot, number, slot - segment.start if local else slot)
        for number, segment in enumerate(prompt.documents)
        for slot in range(segment.start, segment.end)
    ]
    rows += [(slot, -1, slot) for slot in range(length)]
    slots, alone, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    before = slots[:, None] >= slots[None, :]

    def seen(layer: int) -> torch.Tensor:
        taken_alone = torch.tensor([slot in stale(layer) for slot in range(length)])[slots]
        in_prompt = (alone >= 0) == taken_alone
        sees = torch.where(alone[:, None] >= 0, alone[:, None] == alone[None, :], in_prompt[None, :])
        # A row that nobody sees must see something: softmax over nothing is not a number.
        sees |= torch.eye(len(rows), dtype=torch.bool)
        window = _window(network.config, layer)
        near = slots[:, None] - slots[None, :] < window if window is not None else True
        return sees & before & near

    embedding = network.get_input_embeddings()
    if inputs is None:
        inputs = embedding(prompt.token_ids())
    inputs = torch.cat([inputs, embedding(torch.tensor(generated, dtype=torch.int64))])
    with _masked(network, lambda layer: _additive(seen(layer))):
        output = network(inputs_embeds=inputs[slots][None], position_ids=positions[None], use_cache=False)
    return output.logits[0, -1].float()


def greedy_blended(network: Any, prompt: Prompt, steps: int, **how: Any) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and logits by ``blended``, every step a pass from nothing."""
    return _greedy(lambda tokens: blended(network, prompt, tokens, **how), steps)


def cached(network: Any, prompt: Prompt, *, isolate: bool) -> DynamicCache:
    """What transformers caches, rotated, of a pass over the prompt under the mask of ``logits``."""
    cache = DynamicCache()
    logits(network, prompt, [], isolate=isolate, cache=cache)
    return cache


def document_slots(prompt: Prompt, first: int | None = None) -> set[int]:
    """Positions of all tokens of documents, or of the first few of each."""
    return {slot for s in prompt.documents for slot in list(range(s.start, s.end))[:first]}


def _greedy(step: Callable[[list[int]], torch.Tensor], steps: int) -> tuple[list[int], list[torch.Tensor]]:
    tokens: list[int] = []
    seen: list[torch.Tensor] = []
    for _ in range(steps):
        seen.append(step(tokens))
        tokens.append(int(seen[-1].argmax()))
    return tokens, seen


def _additive(seen: torch.Tensor) -> torch.Tensor:
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


def _window(config: Any, layer: int) -> int | None:
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None and layer_types[layer] != "sliding_attention":
        return None
    return getattr(config, "sliding_window", None)


@contextmanager
def _masked(network: Any, additive: Callable[[int], torch.Tensor]) -> Iterator[None]:
    """Inside, each attention module gets this mask for its layer instead of what the model made."""

    def replace(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        assert "attention_mask" in kwargs
        return args, {**kwargs, "attention_mask": additive(module.layer_idx)}

    with ExitStack() as hooks:
        modules = [m for m in network.modules() if "Attention" in type(m).__name__ and hasattr(m, "layer_idx")]
        assert len(modules) == network.config.num_hidden_layers
        for module in modules:
            hooks.callback(module.register_forward_pre_hook(replace, with_kwargs=True).remove)
        yield
