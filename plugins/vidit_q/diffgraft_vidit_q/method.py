"""ViDiT-Q's own arithmetic: channel balancing for ranges of timesteps, and which layers get more bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LEAST = 1e-5
"""Least a_c and w_c."""
MOMENTUM = 0.95
"""Of the mean of a_c over the calibration."""


def channel_size(x: Tensor) -> Tensor:
    """mean over the batch of max over the tokens of |x_c| -> [C], for inputs [batch, ..., C]."""
    return x.detach().abs().flatten(1, -2).amax(1).mean(0).float() if x.ndim > 2 else x.detach().abs().mean(0).float()


def balance(a: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """s_c = a_c^alpha / w_c^(1 - alpha), with w_c = max over the outputs of |W_c|; (X / s)(W s)^T = X W^T.

    Args:
        a: a_c [ranges, C].
        weight: W [outputs, C].

    Returns:
        s [ranges, C], float32; 1 in a range in which the calibration brought nothing to the layer.
    """
    w = weight.detach().float().abs().amax(0)
    s = a.float().clamp(min=LEAST) ** alpha / w.clamp(min=LEAST) ** (1 - alpha)
    return torch.where(a.amax(1, keepdim=True) > 0, s, 1.0)


def range_of(t: Tensor, edges: Sequence[int]) -> Tensor:
    """Number of the range that a timestep is in: edges (500,) are the ranges [0, 500] and (500, ...]. Nothing waits for the device."""
    return torch.bucketize(t.float(), torch.tensor(edges, dtype=torch.float32, device=t.device))


def kind_of(path: str) -> str:
    """What a layer is, by its path: "cross" attention, "attention", "modulation" (adaLN) or "mlp"."""
    parts = path.split(".")
    if any(part in ("attn2", "cross_attn") for part in parts):
        return "cross"
    if any(part.startswith("attn") for part in parts):
        return "attention"
    return "modulation" if any(part.startswith(("norm", "ada")) or part.endswith("_mod") for part in parts) else "mlp"


def group_of(key: str) -> str:
    """The layers that are raised together: those of one kind in one block ("transformer.blocks.0:mlp")."""
    model, blocks, number, *_ = key.split(".")
    return f"{model}.{blocks}.{number}:{kind_of(key)}"


def raised(sensitivity: Mapping[str, float], sizes: Mapping[str, int], share: float) -> set[str]:
    """The groups that get more bits: of each kind the most sensitive ones, as long as they hold at most ``share`` of its weights.

    Kinds are never held against each other: what a text's layers do to a picture and what an MLP does are measured on different things.
    """
    found: set[str] = set()
    for kind in sorted({group.rpartition(":")[2] for group in sizes}):
        mine = sorted((g for g in sizes if g.rpartition(":")[2] == kind), key=lambda g: (-sensitivity[g], g))
        left = share * sum(sizes[g] for g in mine) + 1e-9
        for group in mine:
            if sizes[group] <= left:
                left -= sizes[group]
                found.add(group)
    return found
