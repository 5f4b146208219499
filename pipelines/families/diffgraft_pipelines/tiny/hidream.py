"""A tiny HiDream pipeline: two blocks of each kind with two experts."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from transformers import LlamaConfig, LlamaForCausalLM

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS, LLAMA = 4, 48
SIDE = 128
"""Of the latents: the pipeline scales every size to this area. So their patches are large, and the pictures are no larger."""


def llama(vocabulary: int) -> LlamaForCausalLM:
    """A two-layer Llama; all its layers speak to the denoiser."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=LLAMA,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        attn_implementation="eager",
    )
    return LlamaForCausalLM(config)


def _pipeline(name: str) -> Tiny:
    clip, t5, words = c.clip_tokenizer(), c.t5_tokenizer(), c.chat_tokenizer()
    sizes: dict[str, Any] = {
        "patch_size": 16,
        "in_channels": CHANNELS,
        "caption_channels": [WIDTH, LLAMA],
        "text_emb_dim": 2 * WIDTH,
        "num_routed_experts": 2,
        "num_activated_experts": 2,  # all of them: which one runs is a matter of the data otherwise
        "axes_dims_rope": (8, 4, 4),
        "max_resolution": (SIDE, SIDE),
        "llama_layers": [0, 1, 0, 1],
    }
    vae = AutoencoderKL(block_out_channels=(8,), layers_per_block=1, latent_channels=CHANNELS, norm_num_groups=4, shift_factor=0.1)
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=vae,
        text_encoder=c.clip_text(clip, projection=WIDTH),
        tokenizer=clip,
        text_encoder_2=c.clip_text(clip, projection=WIDTH),
        tokenizer_2=clip,
        text_encoder_3=c.t5_text(t5),
        tokenizer_3=t5,
        text_encoder_4=llama(len(words)),
        tokenizer_4=words,
        transformer=small("HiDreamImageTransformer2DModel", **sizes),
    )
    size = {"height": SIDE, "width": SIDE, "max_sequence_length": 40}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker({"HiDreamImagePipeline": _pipeline})
