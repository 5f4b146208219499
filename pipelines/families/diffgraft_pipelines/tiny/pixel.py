"""Tiny pixel pipelines: unconditional, and a consistency model of 1000 classes."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import CMStochasticIterativeScheduler, ConsistencyModelPipeline, UNet2DModel

from diffgraft_pipelines.tiny import _common as c


def _unet(classes: int | None = None) -> UNet2DModel:
    return UNet2DModel(
        sample_size=16,
        block_out_channels=(16, 32, 32),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=8,
        norm_num_groups=8,
        num_class_embeds=classes,
    )


def _pipeline(name: str) -> Tiny:
    scheduler = getattr(diffusers, name.replace("Pipeline", "Scheduler"))()
    return c.finish(getattr(diffusers, name)(unet=_unet(), scheduler=scheduler))


def _consistency(_name: str) -> Tiny:
    pipe = ConsistencyModelPipeline(unet=_unet(1000), scheduler=CMStochasticIterativeScheduler())
    return c.finish(pipe, class_labels=[1])


make = c.maker({**dict.fromkeys(("DDPMPipeline", "DDIMPipeline", "PNDMPipeline"), _pipeline), "ConsistencyModelPipeline": _consistency})
