"""Tiny HunyuanVideo pipelines: two double and two single blocks, five frames."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler
from transformers import LlamaConfig, LlamaModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

SIDE = 32
CHANNELS = 4
TEMPLATE = {"template": "{}", "crop_start": 0}
"""Of the prompt: without the pipeline's instruction, which the tokenizer would spell."""


def vae() -> AutoencoderKLHunyuanVideo:
    """Eight pixels and four frames to a latent."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False
    )


def llama(vocabulary: int) -> LlamaModel:
    """Of three layers; the pipeline takes what comes before the last two."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 3, "num_attention_heads": 2}
    return LlamaModel(LlamaConfig(vocab_size=vocabulary, pad_token_id=0, **sizes))


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer, words = c.t5_tokenizer(), c.clip_tokenizer()
    picture = "image" in kwargs
    pipe = getattr(diffusers, name)(
        text_encoder=llama(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=small("HunyuanVideoTransformer3DModel", in_channels=CHANNELS * (1 + picture), out_channels=CHANNELS),
        vae=vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
        text_encoder_2=c.clip_text(words),
        tokenizer_2=words,
    )
    size = {"height": SIDE, "width": SIDE, "num_frames": 5, "max_sequence_length": 32}
    texts = {"prompt": c.PROMPT, "negative_prompt": c.NEGATIVE, "true_cfg_scale": 4.0, "prompt_template": TEMPLATE}
    return c.finish(pipe, **texts, **size, **kwargs)


make = c.maker(
    {
        "HunyuanVideoPipeline": _pipeline,
        "HunyuanSkyreelsImageToVideoPipeline": lambda name: _pipeline(name, image=c.picture(SIDE)),
    }
)
