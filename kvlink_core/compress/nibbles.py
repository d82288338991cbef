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


def split(joined: torch.Tensor, first: int, codes: torch.Tensor) -> None:
    """The reverse for a run of the codes of each row: from number ``first`` as many as ``codes [rows, n]`` takes."""
    half, end = joined.shape[1], first + codes.shape[1]
    if first < half:
        low = min(end, half)
        torch.bitwise_and(joined[:, first:low], 15, out=codes[:, : low - first])
    if end > half:
        high = max(first, half)
        torch.bitwise_right_shift(joined[:, high - half : end - half], 4, out=codes[:, high - first :])
