"""The oracle of DESIGN section 3 for any architecture: one plain forward pass over the whole prompt, nothing cached.

It shares no step with what it judges: no cache, no re-positioning, the model's plain attention instead of a fused one.
What each layer lets a token see is the model's own predicate, restricted to the token's own document where it belongs
to one; there, a window or a chunk is counted from the start of the document, as when it was encoded alone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, Literal

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from kvlink_core.models.causal_lm import CausalLM
from kvlink_core.prompt import Prompt

#: What is registered below: the modelling code's own plain attention, and torch's fused one.
_NAMES = {"eager": "kvlink-oracle", "sdpa": "kvlink-oracle-fused"}
_owners: list[torch.Tensor] = []


@torch.inference_mode()
def oracle_logits(
    lm: CausalLM,
    prompt: Prompt,
    generated: list[int],
    *,
    isolate: bool,
    attention: Literal["eager", "sdpa"] = "eager",
) -> torch.Tensor:
    """Float32 logits ``[vocabulary]`` after the last of ``generated``, or of the prompt.

    Args:
        lm: a model in any dtype.
        prompt: laid out.
        generated: tokens after the prompt.
        isolate: whether a document's tokens see their own document only; else this is full prefill.
        attention: ``sdpa`` is what most run, and lacks what some models need; models that bring their own attention
            keep it.
    """
    ids = torch.cat([prompt.token_ids(), torch.tensor(generated, dtype=torch.int64)])
    starts = torch.full((ids.shape[0],), -1, device=lm.device)  # by token: where its document starts, or -1
    if isolate:
        for segment in prompt.documents:
            starts[segment.start : segment.end] = segment.start
    inputs = {
        "input_ids": ids[None].to(lm.device),
        "position_ids": torch.arange(ids.shape[0], device=lm.device)[None],
        "use_cache": False,
    }
    if lm.masking != "asked":
        seen = _seen(starts, lambda _, __, q, k: k <= q)
        lowest = torch.finfo(lm.dtype).min
        mask = torch.zeros(seen.shape, dtype=lm.dtype, device=lm.device).masked_fill(~seen, lowest)
        return lm.network(**inputs, attention_mask=mask).logits[0, -1].float()  # type: ignore[no-any-return]
    before = lm.network.config._attn_implementation
    lm.network.set_attn_implementation(_NAMES[attention])
    _owners.append(starts)
    try:
        return lm.network(**inputs).logits[0, -1].float()  # type: ignore[no-any-return]
    finally:
        _owners.pop()
        lm.network.set_attn_implementation(before)


def _seen(starts: torch.Tensor, predicate: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Boolean ``[1, 1, tokens, tokens]``."""
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.int64, device=starts.device)
    at = torch.arange(starts.shape[0], device=starts.device)
    q, k = at[None, None, :, None], at[None, None, None, :]
    joint = predicate(zero, zero, q, k)
    start = starts[None, None, :, None]
    alone = predicate(zero, zero, q - start, k - start) & (starts[None, None, None, :] == start)
    return torch.where(start < 0, joint, alone)


def _mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    *args: Any,
    mask_function: Callable[..., torch.Tensor],
    dtype: torch.dtype = torch.float32,
    device: Any = "cpu",
    **kwargs: Any,
) -> torch.Tensor:
    seen = _seen(_owners[-1], mask_function)
    mask = torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask.expand(batch_size, -1, q_length, kv_length)


def _attention(module: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
    return vars(sys.modules[type(module).__module__])["eager_attention_forward"](module, *args, **kwargs)


AttentionInterface.register(_NAMES["eager"], _attention)
AttentionInterface.register(_NAMES["sdpa"], sdpa_attention_forward)
for _name in _NAMES.values():
    AttentionMaskInterface.register(_name, _mask)
