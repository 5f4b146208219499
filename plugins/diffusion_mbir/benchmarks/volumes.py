"""Volumes of which every slice is known: one object of emoji-pixel's, that grows along z, as the checkpoint's training renders it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train.pixel import KINDS, SIDE
from torch import Tensor

SIDES = (22.0, 46.0)
"""Of the object, in a picture of 64 pixels, from the first slice to the last."""


def scene(seed: int, number: int) -> scenes.Scene:
    """An object on a background, near the centre, upright."""
    rng = np.random.default_rng([seed, number])
    kind, background = KINDS[int(rng.integers(len(KINDS)))], str(rng.choice(list(scenes.BACKGROUNDS)))
    return scenes.upright(scenes.sample_scene(scenes.Labels(kind, background, "big", "center"), rng))


def volume(seed: int, number: int, depth: int = 16) -> Tensor:
    """[depth, 3, 32, 32] in [-1, 1]; raises ``ArtworkMissing`` where Noto's emoji font is not installed."""
    made = scene(seed, number)
    pictures = [scenes.render(replace(made, side=float(side))).reduce(scenes.SIZE // SIDE) for side in np.linspace(*SIDES, depth)]
    return torch.from_numpy(np.stack([np.asarray(each) for each in pictures])).permute(0, 3, 1, 2).float() / 127.5 - 1
