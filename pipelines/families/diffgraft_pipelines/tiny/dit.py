"""Tiny DiT: three blocks, learned sigma. The picture's size is the transformer's ``sample_size``."""

from __future__ import annotations

from diffgraft import Tiny
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

from diffgraft_pipelines.tiny import _common as c


def _pipeline(_name: str) -> Tiny:
    transformer = DiTTransformer2DModel(
        sample_size=8, num_layers=3, num_attention_heads=4, attention_head_dim=8, in_channels=4, out_channels=8
    )
    pipe = DiTPipeline(transformer=transformer, vae=c.vae(), scheduler=DDIMScheduler(clip_sample=False))
    return c.finish(pipe, class_labels=[207], guidance_scale=4.0)


make = c.maker({"DiTPipeline": _pipeline})
