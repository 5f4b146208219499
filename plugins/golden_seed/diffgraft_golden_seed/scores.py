"""Rewards for `diffgraft evolve golden_seed --fitness reward --reward diffgraft_golden_seed.scores:NAME`, none of which needs weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffgraft.methods.inputs import to_float
from torch import Tensor

from diffgraft_golden_seed.method import border, colourfulness


def pixels(images: Sequence[Any]) -> Tensor:
    """[n, 3, h, w] in 0..1; of a video its first frame."""
    rows = [to_float(image[0] if isinstance(image, (list, tuple)) else image) for image in images]
    return torch.stack([torch.from_numpy(row).permute(2, 0, 1)[:3] for row in rows])


def colourful(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Far from grey: the paper finds seeds that tend to grey pictures."""
    return [float(value) for value in colourfulness(pixels(images))]


def borderless(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Without a frame: the paper finds seeds that tend to draw one."""
    return [-float(value) for value in border(pixels(images))]
