"""Tiny unconditional pixel pipelines."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import UNet2DModel

from diffgraft_pipelines.tiny import _common as c


def _pipeline(name: str) -> Tiny:
    unet = UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
    )
    scheduler = getattr(diffusers, name.replace("Pipeline", "Scheduler"))()
    return c.finish(getattr(diffusers, name)(unet=unet, scheduler=scheduler))


make = c.maker({"DDPMPipeline": _pipeline, "DDIMPipeline": _pipeline})
