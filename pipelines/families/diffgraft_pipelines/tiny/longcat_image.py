"""Tiny LongCat-Image pipelines: two double and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny._shrink import small
from diffgraft_pipelines.tiny.qwen_image import Smaller, text_encoder

CHANNELS = 16
"""The pipeline asks for no others."""


def _pipeline(name: str) -> Tiny:
    tokenizer = c.chat_tokenizer()
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.1),
        text_encoder=text_encoder(len(tokenizer)),
        tokenizer=tokenizer,
        text_processor=tokenizer,  # rewrites prompts, which it is not asked to here
        transformer=small("LongCatImageTransformer2DModel", in_channels=4 * CHANNELS),
    )
    pipe.prompt_template_encode_prefix = "<|im_start|>"  # the tokenizer would spell the instruction
    pipe.prompt_template_encode_suffix = "<|im_end|>"
    pipe.tokenizer_max_length = 32
    size = {"height": c.SIDE, "width": c.SIDE, "enable_prompt_rewrite": False, "enable_cfg_renorm": False}
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.5, **size)


class Pictures:
    """A processor of pictures alone."""

    def __init__(self) -> None:
        self.image_processor = Qwen2VLImageProcessorPil(min_pixels=56 * 56, max_pixels=56 * 56)


def _edit(name: str) -> Tiny:
    tokenizer = c.chat_tokenizer()
    tokenizer.add_tokens(["<|vision_start|>", "<|image_pad|>", "<|vision_end|>"], special_tokens=True)
    text = text_encoder(len(tokenizer))
    text.config.image_token_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.1),
        text_encoder=text,
        tokenizer=tokenizer,
        text_processor=Pictures(),
        transformer=small("LongCatImageTransformer2DModel", in_channels=4 * CHANNELS),
    )
    pipe.prompt_template_encode_prefix = "<|vision_start|><|image_pad|><|vision_end|>"
    pipe.prompt_template_encode_suffix = "<|im_end|>"
    pipe.tokenizer_max_length = 32
    pipe.image_processor = Smaller(vae_scale_factor=2 * pipe.vae_scale_factor)
    pipe.vae_scale_factor *= 1024 // c.SIDE  # so that a latent stands for as much as it would of the large picture
    return c.finish(pipe, prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=4.5, image=c.picture())


make = c.maker({"LongCatImagePipeline": _pipeline, "LongCatImageEditPipeline": _edit})
