"""Codes of four bits, two to a byte: the first half of them in the low bits, the second half in the high ones."""

from __future__ import annotations

import torch


def join(codes: torch.Tensor) -> torch.Tensor:
    """Bytes ``[rows, ceil(n / 2)]`` of codes ``[rows, n]``, uint8 both, each row apart."""
    count = codes.shape[1]
    half = (count + 1) // 2
    joined = codes[:, :half].clone()
    joined[:, : count - half].bitwise_or_(codes[:, half:] << 4)
    return joined


def split(joined: torch.Tensor, count: int) -> torch.Tensor:
    """The reverse: codes ``[rows, count]``."""
    half = joined.shape[1]
    codes = torch.empty(joined.shape[0], count, dtype=torch.uint8, device=joined.device)
    torch.bitwise_and(joined, 15, out=codes[:, :half])
    torch.bitwise_right_shift(joined[:, : count - half], 4, out=codes[:, half:])
    return codes
