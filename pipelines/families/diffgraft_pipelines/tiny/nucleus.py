"""A tiny Nucleus-MoE-Image pipeline: two blocks, of which the second has four experts."""

from __future__ import annotations

import diffusers
import torch
from diffgraft import Tiny
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler
from transformers import Qwen3VLForConditionalGeneration

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small
from diffgraft_pipelines.tiny.krea2 import text_encoder

CHANNELS = 4
TEMPLATE = "{% for turn in messages if turn['role'] == 'user' %}<|im_start|>{{ turn['content'][0]['text'] }}<|im_end|>{% endfor %}"


def _pipeline(name: str) -> Tiny:
    words = c.chat_tokenizer()
    words.chat_template = TEMPLATE
    experts = {"num_experts": 4, "moe_intermediate_dim": WIDTH, "capacity_factors": 2.0, "dense_moe_strategy": "leave_first_block_dense"}
    transformer = small("NucleusMoEImageTransformer2DModel", in_channels=4 * CHANNELS, out_channels=CHANNELS, mlp_ratio=6.0, **experts)
    for path, weight in transformer.named_parameters():
        if ".experts." in path:  # which come as they lie in memory
            torch.nn.init.normal_(weight, std=WIDTH**-0.5)
    latents = {"latents_mean": [0.0] * CHANNELS, "latents_std": [1.0] * CHANNELS}
    pipe = getattr(diffusers, name)(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=CHANNELS, dim_mult=[1, 1, 1, 1], num_res_blocks=1, **latents),
        text_encoder=Qwen3VLForConditionalGeneration(text_encoder(len(words)).config),
        processor=words,
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 64, "return_index": -1}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker({"NucleusMoEImagePipeline": _pipeline})
