"""Randomised Hadamard rotations (QuaRot, arXiv 2404.00456): what is large in one channel is spread over many, and the product stays.

    x W^T = (x R)(W R)^T,    R = diag(signs) H / sqrt(h)

in blocks of h channels.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


def hadamard(x: Tensor, size: int) -> Tensor:
    """x H / sqrt(size) in blocks of ``size`` channels of the last axis, Sylvester's H, by log2(size) additions of each value."""
    shape, step = x.shape, 1
    while step < size:
        a, b = x.reshape(*shape[:-1], -1, 2, step).unbind(-2)
        x = torch.stack((a + b, a - b), -2)
        step *= 2
    return x.reshape(shape) / math.sqrt(size)


class Rotation(nn.Module):
    """x R of the last axis, in x's dtype; h is the largest power of two in the number of channels, the signs are always the same."""

    signs: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.size = channels & -channels
        signs = torch.randint(2, (channels,), generator=torch.Generator().manual_seed(channels)) * 2.0 - 1
        self.register_buffer("signs", signs, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return hadamard(x.float() * self.signs.float(), self.size).to(x.dtype)

    def extra_repr(self) -> Any:
        return f"channels={len(self.signs)}, size={self.size}"
