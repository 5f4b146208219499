"""Normalized Attention Guidance (arXiv 2505.21179) on attention features, in the paper's symbols; free of diffusers.

Z+ and Z- [..., tokens, width] are what the same queries find in the positive and in the negative text, heads side by side, before the
layer's output projection.
"""

from __future__ import annotations

import torch
from torch import Tensor


def extrapolated(Zp: Tensor, Zn: Tensor, scale: float) -> Tensor:
    """Z~ = Z+ + phi (Z+ - Z-) with phi = scale - 1: scale Z+ - (scale - 1) Z-. Equal to Z+ bit for bit where Z- is Z+."""
    return torch.lerp(Zn, Zp, scale)


def length(Z: Tensor, norm: int = 1) -> Tensor:
    """||Z||_1 (or ||Z||_2) of each token [..., tokens, 1], summed in float32."""
    return torch.linalg.vector_norm(Z, norm, dim=-1, keepdim=True, dtype=torch.promote_types(Z.dtype, torch.float32))


def normalized(Z: Tensor, Zp: Tensor, tau: float, norm: int = 1) -> Tensor:
    """Z^ = (min(r, tau) / r) Z~ with r = ||Z~||_1 / ||Z+||_1: no token is longer than tau times its positive one.

    A token Z~ = 0 stays 0 (the official form divides 0 by 0 there).
    """
    most, long = tau * length(Zp, norm), length(Z, norm)
    return Z * torch.where(long > most, most / long, 1.0).to(Z.dtype)


def guided(Zp: Tensor, Zn: Tensor, scale: float, tau: float, alpha: float, norm: int = 1) -> Tensor:
    """Z_NAG = alpha Z^ + (1 - alpha) Z+."""
    return torch.lerp(Zp, normalized(extrapolated(Zp, Zn, scale), Zp, tau, norm), alpha)
