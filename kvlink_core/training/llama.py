"""A small Llama for training: parameters named as in transformers' ``LlamaForCausalLM``, compiled attention masks.

Only what training needs: fixed shapes, per-token positions and a mask computed from three integers a token instead of
a dense matrix. A test compares it with transformers' own implementation over the same weights and mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Shape:
    """The architecture; the embedding is tied to the output."""

    vocabulary: int = 3072
    width: int = 256
    layers: int = 8
    heads: int = 8
    kv_heads: int = 4
    inner: int = 512
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads


#: attends(query [B,Hq,S,D], key [B,Hkv,S,D], value [B,Hkv,S,D], mask) -> [B,Hq,S,D]
Attend = Callable[[Tensor, Tensor, Tensor, Any], Tensor]


def dense_mask(context: Tensor, document: Tensor, question: Tensor) -> Tensor:
    """Boolean mask ``[B, 1, S, S]`` from per-token integers ``[B, S]``; true where row may attend to column.

    ``context`` numbers the prompts packed in a row; ``document`` is 0 for a token that sees all before it, else the
    number of the document outside which it sees nothing; ``question`` is 0 for the prompt, else the number of the
    question and answer that no other question sees.
    """
    size = context.shape[1]
    index = torch.arange(size, device=context.device)
    row, column = (slice(None), slice(None), None), (slice(None), None, slice(None))
    mask = (index[:, None] >= index[None, :])[None] & (context[row] == context[column])
    mask = mask & ((document[row] == 0) | (document[row] == document[column]))
    mask = mask & ((question[column] == 0) | (question[row] == question[column]))
    return mask[:, None]


def attend_dense(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
    """Attention under the boolean mask of ``dense_mask``."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def flex_attention_pair() -> tuple[Callable[[Tensor, Tensor, Tensor], Any], Attend]:
    """``(make mask, attend)`` on FlexAttention: skips the blocks that the mask empties. Needs a CUDA device."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    compiled_create = torch.compile(create_block_mask)

    def make(context: Tensor, document: Tensor, question: Tensor) -> Any:
        def visible(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            own = (document[b, q] == 0) | (document[b, q] == document[b, k])
            asked = (question[b, k] == 0) | (question[b, q] == question[b, k])
            return (q >= k) & (context[b, q] == context[b, k]) & own & asked

        rows, size = context.shape
        return compiled_create(visible, rows, None, size, size, device=context.device)

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Any) -> Tensor:
        out: Any = flex_attention(query, key, value, block_mask=mask, enable_gqa=True)
        return out  # type: ignore[no-any-return]

    return make, attend


class _Attention(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        kv = shape.kv_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.width, shape.width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv, bias=False)
        self.v_proj = nn.Linear(shape.width, kv, bias=False)
        self.o_proj = nn.Linear(shape.width, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any, attend: Attend) -> Tensor:
        rows, size, width = x.shape
        query = self.q_proj(x).view(rows, size, self.shape.heads, -1).transpose(1, 2)
        key = self.k_proj(x).view(rows, size, self.shape.kv_heads, -1).transpose(1, 2)
        value = self.v_proj(x).view(rows, size, self.shape.kv_heads, -1).transpose(1, 2)
        query, key = _rotate(query, cos, sin), _rotate(key, cos, sin)
        out = attend(query, key, value.to(query.dtype), mask)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(rows, size, width))
        return mixed


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.float().chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1).to(x.dtype)


class _Mlp(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.up_proj = nn.Linear(shape.width, shape.inner, bias=False)
        self.down_proj = nn.Linear(shape.inner, shape.width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class _Norm(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.eps = shape.norm_eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps))


class _Layer(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = _Norm(shape)
        self.self_attn = _Attention(shape)
        self.post_attention_layernorm = _Norm(shape)
        self.mlp = _Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Any, attend: Attend) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, mask, attend)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class _Body(nn.Module):
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(shape.vocabulary, shape.width)
        self.layers = nn.ModuleList(_Layer(shape) for _ in range(shape.layers))
        self.norm = _Norm(shape)


class TrainingLlama(nn.Module):
    """``forward`` returns logits ``[B, A, vocabulary]`` in float32 at the ``A`` places of each row listed in ``at``."""

    def __init__(self, shape: Shape, seed: int = 0, attend: Attend = attend_dense) -> None:
        super().__init__()
        self.shape, self.attend = shape, attend
        self.model = _Body(shape)
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # 0.06 is about 1/sqrt(width); outputs into the residual stream start smaller the deeper the model.
                small = name.endswith(("o_proj.weight", "down_proj.weight"))
                deviation = 0.06 / (2 * shape.layers) ** 0.5 if small else 0.06
                nn.init.normal_(parameter, std=deviation, generator=generator)
        frequency = shape.rope_theta ** (-torch.arange(0, shape.head_dim, 2).float() / shape.head_dim)
        self.register_buffer("frequency", frequency, persistent=False)

    def forward(self, ids: Tensor, positions: Tensor, mask: Any, at: Tensor) -> Tensor:
        """Logits ``[B, A, vocabulary]``; ``ids`` and ``positions`` are ``[B, S]``, ``at`` is ``[B, A]``."""
        angle = positions[:, None, :, None].float() * self.get_buffer("frequency")
        cos, sin = angle.cos(), angle.sin()
        x = self.model.embed_tokens(ids)
        for layer in self.model.layers:
            x = layer(x, cos, sin, mask, self.attend)
        x = torch.gather(x, 1, at[..., None].expand(-1, -1, x.shape[-1]))
        logits: Tensor = F.linear(self.model.norm(x), self.model.embed_tokens.weight)
        return logits.float()
