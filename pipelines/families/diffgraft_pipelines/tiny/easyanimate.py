"""Tiny EasyAnimate pipelines: two blocks, five frames."""

from __future__ import annotations

import diffusers
import torch
from diffgraft import Tiny
from diffusers import AutoencoderKLMagvit, FlowMatchEulerDiscreteScheduler
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import WIDTH, small

CHANNELS = 4
SIDE = 32


def _text(vocabulary: int) -> Qwen2VLForConditionalGeneration:
    """Two language layers and one vision layer."""
    sizes = {"hidden_size": WIDTH, "intermediate_size": 2 * WIDTH, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"}
    words = {"vocab_size": vocabulary, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0}
    return Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(
            text_config={"num_key_value_heads": 2, "rope_scaling": rope, **sizes, **words},
            vision_config={"depth": 1, "embed_dim": 32, "hidden_size": WIDTH, "num_heads": 2, "mlp_ratio": 1},
        )
    )


def _pipeline(name: str, **kwargs: object) -> Tiny:
    tokenizer = c.chat_tokenizer()
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['content'][0]['text'] }}{% endfor %}"
    vae = AutoencoderKLMagvit(
        latent_channels=CHANNELS, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2, spatial_group_norm=False
    )
    inpaint = "Inpaint" in name  # mask and masked video, both as latents (a mask at their size asks the VAE for a setting that it has not)
    sizes = {"in_channels": CHANNELS * (1 + 2 * inpaint), "out_channels": CHANNELS, "patch_size": 2, "sample_width": 4, "sample_height": 4}
    pipe = getattr(diffusers, name)(
        vae=vae,
        text_encoder=_text(len(tokenizer)),
        tokenizer=tokenizer,
        transformer=small("EasyAnimateTransformer3DModel", mmdit_layers=2, resize_inpaint_mask_directly=not inpaint, **sizes),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    size = {"height": SIDE, "width": SIDE, "num_frames": 5}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=5.0, **size, **kwargs)


def _inpaint(name: str) -> Tiny:
    """The right half is to be painted."""
    mask = torch.zeros(1, 1, 5, SIDE, SIDE)
    mask[..., SIDE // 2 :] = 1.0
    return _pipeline(name, video=torch.rand(1, 3, 5, SIDE, SIDE), mask_video=mask)


make = c.maker(
    {
        "EasyAnimatePipeline": _pipeline,
        "EasyAnimateInpaintPipeline": _inpaint,
    }
)
