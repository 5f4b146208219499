"""Going on with a finished emoji-sd: more steps for its U-Net and text encoder. The autoencoder, and with it the latents, stays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor

from ..emoji import scenes
from .common import Stage
from .pool import Pairs, Pool
from .unet import BATCH, Batches, loss_weight

LEARNING_RATE = 5e-4
"""The second stage's first one, held: the averages take the noise out, and the end is not fixed in advance."""
MIDDLE = 0.4
"""How much denser than even the timesteps lie in the middle: 1 / (1 - MIDDLE) times at 500, 1 / (1 + MIDDLE) times at both ends."""


def draw_middle_timesteps(count: int, generator: torch.Generator, progress: float) -> Tensor:
    """(BATCH,) timesteps below `count`, in random order, denser in the middle.

    There (signal-to-noise ratio .05 to 2) the shape is decided. What the noisier timesteps decide (background, size and place) is
    right in all held-out pictures already, and the cleaner ones draw only texture.
    """
    u = (torch.randperm(BATCH, generator=generator) + torch.rand(BATCH, generator=generator)) / BATCH
    u = u + MIDDLE / (2 * math.pi) * torch.sin(2 * math.pi * u)
    return (u * count).long().clamp(max=count - 1)


OFTEN = 3.0
"""How many times as often a picture is drawn that shows one of the objects that `train_more` is told to draw often."""


def draw_odds(pools: Sequence[Pool | Pairs], often: Sequence[str]) -> Tensor:
    """One number a picture of `pools`, in order: OFTEN where one of the objects `often` is in it, 1 elsewhere."""
    wanted = torch.tensor([list(scenes.OBJECTS).index(name) for name in often])
    objects = [pool.labels[..., 0].reshape(len(pool.labels), -1) for pool in pools]
    return torch.cat([1 + (OFTEN - 1) * torch.isin(each, wanted).any(1).float() for each in objects])


def train_more(
    pools: Sequence[Pool | Pairs],
    pipe: StableDiffusionPipeline,
    folder: Path,
    steps: int,
    decay: int,
    seed: int,
    accelerator: Accelerator,
    often: Sequence[str] = (),
) -> None:
    """Train the U-Net and the text encoder of `pipe` on; they carry the averaged weights afterwards.

    `often` names objects that are hard to draw: OFTEN as likely as the others.
    """
    torch.manual_seed(seed + 6)
    odds = draw_odds(pools, often) if often else None
    batches = Batches(pools, pipe.vae, pipe.tokenizer, folder, seed + 6, accelerator.device, draw_middle_timesteps, odds)
    unet, text_encoder = pipe.unet, pipe.text_encoder
    unet.set_attn_processor(AttnProcessor())
    modules = {"unet": unet, "text_encoder": text_encoder}

    def loss(step: int) -> Tensor:
        batch = batches.draw(step, 1.0)
        hidden = text_encoder(batch.tokens).last_hidden_state
        out = unet(batch.noisy, batch.timesteps, hidden).sample
        return (loss_weight(batch.alpha, 1.0) * (out.float() - batch.v).square()).mean()

    averages = Stage("unet-more", folder, modules, steps, LEARNING_RATE, accelerator, decay=decay).run(loss)
    for name, module in modules.items():
        module.load_state_dict(averages[name])
        module.eval()
