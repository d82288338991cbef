"""Attention over a part of a context, with what it takes to merge it with the other parts.

Softmax over a whole context is the average of its parts' results, weighted by the sums of their exponentials; the
logarithm of that sum comes with each part (as in FlashAttention, arXiv 2205.14135, and ring attention, 2310.01889).
"""

from __future__ import annotations

import torch


def attend_part(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of some queries over some keys.

    Args:
        query: ``[batch, heads, queries, dim]``.
        key, value: ``[batch, heads, slots, dim]``.
        mask: additive, ``[batch or 1, heads or 1, queries, slots]``, in the queries' dtype; every query must see a
            slot.
        scale: of the scores.
        softcap: scores are bent to ``softcap * tanh(score / softcap)`` before masking (Gemma 2).

    Returns:
        The result ``[batch, heads, queries, dim]``, and float32 ``[batch, heads, queries]``: the logarithm of the sum
        of the exponentials of the scores.
    """
    if softcap is None and query.device.type == "cpu" and value.shape[-1] == query.shape[-1]:
        result, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, attn_mask=mask, scale=scale
        )
        return result, sums
    if softcap is None and query.device.type == "cuda" and mask is None and query.dtype != torch.float32:
        result, sums, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, True, scale=scale
        )
        return result, sums[..., : query.shape[2]]
    return _plain(query, key, value, mask, scale, softcap)


def attend_seen(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    seen: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``attend_part`` where a query may see nothing in some heads: its result there has no weight (-inf).

    Args:
        query, key, value, scale, softcap: as there.
        seen: boolean ``[batch, heads, queries, slots]``.
    """
    blind = ~seen.any(-1)
    mask = torch.zeros(seen.shape, dtype=query.dtype, device=query.device)
    mask.masked_fill_(~(seen | blind.unsqueeze(-1)), -torch.inf)
    result, sums = attend_part(query, key, value, mask, scale=scale, softcap=softcap)
    return result, sums.masked_fill(blind, -torch.inf)


def _plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = torch.matmul(query, key.transpose(-1, -2)).float() * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is not None:
        scores = scores + mask.float()
    sums = torch.logsumexp(scores, dim=-1)
    weights = torch.exp(scores - sums.unsqueeze(-1)).to(value.dtype)
    return torch.matmul(weights, value), sums


def merge_parts(
    results: torch.Tensor,
    sums: torch.Tensor,
    table: torch.Tensor,
    there: torch.Tensor | None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Merge parts into whole attention, in float32.

    Args:
        results, sums: of all parts, ``[heads, rows, groups, dim]`` and ``[heads, rows, groups]``.
        table: int64 ``[tokens, most]``, the rows that belong to each token; filled up with any of its own.
        there: boolean ``[tokens, most]``, false where ``table`` is filled up; ``None`` for nowhere.
        sinks: ``[heads, groups]``, scores of a slot whose value is 0 (gpt-oss).

    Returns:
        ``[heads, tokens, groups, dim]`` in the dtype of ``results``.
    """
    tokens, most = table.shape
    flat = table.flatten()
    if most == 1 and sinks is None:
        return results.index_select(1, flat)
    heads, _, groups, width = results.shape
    logs = sums.index_select(1, flat).view(heads, tokens, most, groups)
    if there is not None:
        logs = logs.masked_fill(~there[None, :, :, None], -torch.inf)
    if sinks is not None:
        logs = torch.cat([logs, sinks.float()[:, None, None].expand(heads, tokens, 1, groups)], dim=2)
    weights = torch.softmax(logs, dim=2)[:, :, :most]
    parts = results.index_select(1, flat).view(heads, tokens, most, groups, width)
    return (parts * weights.unsqueeze(-1)).sum(2).to(results.dtype)
