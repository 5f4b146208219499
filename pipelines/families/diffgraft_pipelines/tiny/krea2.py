"""A tiny Krea 2 pipeline: two blocks."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from transformers import Qwen3VLConfig, Qwen3VLModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small
from diffgraft_pipelines.tiny.qwen_image import tokenizer

CHANNELS = 4
LAYERS = (1, 2)
"""Of the text encoder."""


def text_encoder(vocabulary: int) -> Qwen3VLModel:
    """Two language layers and one vision layer."""
    text = {
        "vocab_size": vocabulary,
        "hidden_size": WIDTH,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "mrope_interleaved": True},
    }
    sight: dict[str, Any] = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32}
    sight["deepstack_visual_indexes"] = [0]
    return Qwen3VLModel(Qwen3VLConfig(text_config=text, vision_config=sight))


def _pipeline(name: str) -> Tiny:
    words = tokenizer()
    sizes: dict[str, Any] = {
        "in_channels": 4 * CHANNELS,
        "timestep_embed_dim": 32,
        "text_hidden_dim": WIDTH,
        "num_text_layers": len(LAYERS),
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2,
        "text_intermediate_size": 64,
    }
    latents = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **latents),
        text_encoder=text_encoder(len(words)),
        tokenizer=words,
        transformer=small("Krea2Transformer2DModel", **sizes),
        text_encoder_select_layers=LAYERS,
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 48}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=3.0, **size)


make = c.maker({"Krea2Pipeline": _pipeline})
