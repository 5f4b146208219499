"""Rewards for `diffgraft evolve golden_seed --fitness reward --reward diffgraft_golden_seed.scores:NAME`, none of which needs weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffgraft import RewardError
from diffgraft.methods.inputs import to_float
from PIL import Image
from torch import Tensor

from diffgraft_golden_seed.method import border, colourfulness


def pixels(image: Any) -> Tensor:
    """[1, 3, h, w] in 0..1 of a PIL picture of any mode, or an array [h, w], [h, w, 1, 3 or 4]; of a video its first frame.

    Raises:
        RewardError: it is something else: channels first, say.
    """
    if isinstance(image, (list, tuple)):
        image = image[0]
    array = to_float(image.convert("RGB") if isinstance(image, Image.Image) else image)
    whole, array = array.shape, array[0] if array.ndim == 4 else array
    array = array[..., None] if array.ndim == 2 else array
    if array.ndim != 3 or array.shape[2] not in (1, 3, 4):
        raise RewardError(f"a picture of shape {whole}: give [height, width, 3], or [frames, height, width, 3] of a video")
    return torch.from_numpy(array).permute(2, 0, 1)[:3].expand(3, -1, -1)[None]


def colourful(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Far from grey: the paper finds seeds that tend to grey pictures."""
    return [float(colourfulness(pixels(image))) for image in images]


def borderless(images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
    """Without a frame: the paper finds seeds that tend to draw one. A frame wider than an eighth of a side is not seen."""
    try:
        return [-float(border(pixels(image))) for image in images]
    except ValueError as error:
        raise RewardError(str(error)) from error
