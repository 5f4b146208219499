"""A tiny Anima pipeline: two blocks of Cosmos' transformer, a Qwen3 of two layers and the conditioner that reads it by T5's tokens."""

from __future__ import annotations

from diffgraft import Tiny
from diffusers import AnimaModularPipeline, AnimaTextConditioner, AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import HEADS, WIDTH, small

CHANNELS = 4


def _pipeline(_name: str) -> Tiny:
    tokenizer, words = c.chat_tokenizer(), c.t5_tokenizer()
    pipe = AnimaModularPipeline()
    pipe.update_components(
        tokenizer=tokenizer,
        text_encoder=c.qwen3_text(tokenizer).model,
        t5_tokenizer=words,
        text_conditioner=AnimaTextConditioner(
            WIDTH, WIDTH, WIDTH, num_layers=1, num_attention_heads=HEADS, target_vocab_size=len(words), min_sequence_length=32
        ),
        transformer=small(
            "CosmosTransformer3DModel",
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            adaln_lora_dim=8,
            max_size=(4, 32, 32),
            rope_scale=(1.0, 4.0, 4.0),
            extra_pos_embed_type=None,
            concat_padding_mask=False,  # which torchvision resizes
        ),
        vae=AutoencoderKLQwenImage(base_dim=4, z_dim=CHANNELS, num_res_blocks=1, latents_mean=[0.0] * 4, latents_std=[1.0] * 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    size = {"height": c.SIDE, "width": c.SIDE, "max_sequence_length": 32}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.0, **size)


make = c.maker({"AnimaModularPipeline": _pipeline})
