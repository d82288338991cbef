"""The oracle of DESIGN section 3, written without any of the product's formulas.

One plain forward pass of the Hugging Face model over the whole prompt, with a 4-D mask made by asking, for every
pair of positions, the two questions of the definition. Slow on purpose.
"""

from __future__ import annotations

from typing import Any

import torch

from kvlink_core.prompt import Prompt


def mask(prompt: Prompt, extra: int, *, isolate: bool, window: int | None) -> torch.Tensor:
    """Boolean ``[length, length]`` over the prompt and ``extra`` generated tokens."""
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
def logits(network: Any, prompt: Prompt, generated: list[int], *, isolate: bool) -> torch.Tensor:
    """Float32 logits after the last of ``generated`` (or of the prompt): one pass, nothing cached."""
    config = network.config
    ids = torch.cat([prompt.token_ids(), torch.tensor(generated, dtype=torch.int64)])[None]
    layer_types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)

    def additive(window: int | None) -> torch.Tensor:
        seen = mask(prompt, len(generated), isolate=isolate, window=window)
        return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]

    masks: Any
    if layer_types is None:
        masks = additive(window)
    else:
        masks = {t: additive(window if t == "sliding_attention" else None) for t in set(layer_types)}
    output = network(
        input_ids=ids, attention_mask=masks, position_ids=torch.arange(ids.shape[1])[None], use_cache=False
    )
    return output.logits[0, -1].float()


def greedy(network: Any, prompt: Prompt, steps: int, *, isolate: bool) -> tuple[list[int], list[torch.Tensor]]:
    """Greedy tokens and the logits that chose them, every step a pass from nothing."""
    tokens: list[int] = []
    seen: list[torch.Tensor] = []
    for _ in range(steps):
        seen.append(logits(network, prompt, tokens, isolate=isolate))
        tokens.append(int(seen[-1].argmax()))
    return tokens, seen
