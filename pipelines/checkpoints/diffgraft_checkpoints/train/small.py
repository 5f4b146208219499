"""`emoji-sd-small`: a U-Net of a fifth of the compute (or less) for the autoencoder and the text encoder of emoji-sd."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor
from transformers import CLIPTextModel

from .common import Stage
from .pool import Pairs, Pool
from .unet import Batches, build_unet, loss_weight

LEARNING_RATE = 2e-3
DISTILL_FROM = 0.4
"""Share of the steps after which the target is the large U-Net's prediction instead of the data's."""


def build_small() -> UNet2DConditionModel:
    """An untrained U-Net of half of emoji-sd's widths with one layer a block: 18 % of its multiply-adds."""
    return build_unet((16, 32, 64), layers=1, groups=8)


def frozen(base: StableDiffusionPipeline, device: torch.device) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """U-Net and text encoder of a pipeline, on the device, to be asked and not trained."""
    base.unet.set_attn_processor(AttnProcessor())
    return base.unet.to(device).eval().requires_grad_(False), base.text_encoder.to(device).eval().requires_grad_(False)


def train_small(
    pools: Sequence[Pool | Pairs], base: StableDiffusionPipeline, folder: Path, steps: int, seed: int, accelerator: Accelerator
) -> UNet2DConditionModel:
    """The trained small U-Net (averaged weights, fp32).

    First it learns from the data, as emoji-sd did (the slope makes left differ from right); then it copies the large one, whose
    prediction is the mean of what the data scatter around, so the same steps teach more (Hinton et al. 2015; BK-SDM's output loss).
    """
    torch.manual_seed(seed + 4)
    device = accelerator.device
    batches = Batches(pools, base.vae, base.tokenizer, folder, seed + 4, device)
    unet = build_small()
    unet.set_attn_processor(AttnProcessor())
    teacher, text_encoder = frozen(base, device)

    def loss(step: int) -> Tensor:
        progress = step / steps
        batch = batches.draw(step, progress)
        with torch.no_grad():
            hidden = text_encoder(batch.tokens).last_hidden_state
            target = batch.v if progress < DISTILL_FROM else teacher(batch.noisy, batch.timesteps, hidden).sample.float()
        out = unet(batch.noisy, batch.timesteps, hidden).sample
        return (loss_weight(batch.alpha, progress) * (out.float() - target).square()).mean()

    averages = Stage("unet-small", folder, {"unet": unet}, steps, LEARNING_RATE, accelerator).run(loss)
    small = build_small()
    small.load_state_dict(averages["unet"])
    return small.eval()
