"""Tiny older pipelines on the U-Net of Stable Diffusion."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from diffgraft import Tiny
from diffusers import DDIMInverseScheduler, DDPMScheduler, PriorTransformer
from diffusers.pipelines.deprecated.paint_by_example import PaintByExampleImageEncoder
from diffusers.pipelines.stable_diffusion.stable_unclip_image_normalizer import StableUnCLIPImageNormalizer
from transformers import CLIPVisionConfig

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd

SIZE = {"height": c.SIDE, "width": c.SIDE}
UNSAFE = {"safety_checker": None, "requires_safety_checker": False}
WORDS = {"prompt": c.PROMPT, "negative_prompt": c.NEGATIVE}


def text() -> dict[str, Any]:
    """The text encoder of Stable Diffusion."""
    tokenizer = c.clip_tokenizer()
    return {"tokenizer": tokenizer, "text_encoder": c.clip_text(tokenizer)}


def _pipeline(name: str, parts: dict[str, Any], **kwargs: object) -> Tiny:
    pipe = getattr(diffusers, name)(**{"vae": c.vae(), "unet": sd.unet(), "scheduler": sd.ddim(), **parts})
    return c.finish(pipe, guidance_scale=7.5, **kwargs)


def _variation(name: str) -> Tiny:
    parts = {"image_encoder": c.clip_vision(), "feature_extractor": c.clip_image_processor()}
    return _pipeline(name, {**parts, **UNSAFE}, image=c.picture(), **SIZE)


def _text(name: str) -> Tiny:
    return _pipeline(name, {**text(), **UNSAFE, "feature_extractor": None}, **WORDS, **SIZE)


def _inpaint(name: str) -> Tiny:
    pictures = {"image": c.picture(), "mask_image": c.mask()}
    return _pipeline(name, {**text(), **UNSAFE, "feature_extractor": None}, **WORDS, **pictures, strength=0.8)


def _inverted(name: str) -> Tiny:
    """The latents on the way from a picture to noise, one for each step, and where to keep them."""
    parts = {**text(), **UNSAFE, "feature_extractor": None, "inverse_scheduler": DDIMInverseScheduler(**sd.BETAS, clip_sample=False)}
    mask = torch.zeros(1, c.SIDE // 8, c.SIDE // 8)
    mask[..., c.SIDE // 16 :] = 1
    latents = torch.randn(1, 4, 4, c.SIDE // 8, c.SIDE // 8)
    return _pipeline(name, parts, **WORDS, mask_image=mask, image_latents=latents, inpaint_strength=1.0)


def _unclip(name: str) -> Tiny:
    """The embedding of a picture, with noise of a level that is told beside it, in the place of a class."""
    parts: dict[str, Any] = {
        **text(),
        "unet": sd.unet(class_embed_type="projection", projection_class_embeddings_input_dim=64),
        "image_normalizer": StableUnCLIPImageNormalizer(32),
        "image_noising_scheduler": DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
    }
    if "Img2Img" in name:
        parts |= {"image_encoder": c.clip_vision(), "feature_extractor": c.clip_image_processor()}
        return _pipeline(name, parts, **WORDS, **SIZE, image=c.picture())
    tokenizer = c.clip_tokenizer()
    parts |= {
        "prior_tokenizer": tokenizer,
        "prior_text_encoder": c.clip_text(tokenizer, projection=32),
        "prior": PriorTransformer(num_attention_heads=2, attention_head_dim=16, embedding_dim=32, num_layers=1),
        "prior_scheduler": diffusers.UnCLIPScheduler(prediction_type="sample", variance_type="fixed_small_log", num_train_timesteps=1000),
    }
    return _pipeline(name, parts, **WORDS, **SIZE, prior_num_inference_steps=2)


def _example(name: str) -> Tiny:
    sizes = {"hidden_size": 32, "projection_dim": 32, "intermediate_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4}
    encoder = PaintByExampleImageEncoder(CLIPVisionConfig(image_size=32, patch_size=8, **sizes), proj_size=32)
    parts = {"image_encoder": encoder, "feature_extractor": c.clip_image_processor()}
    pictures = {"image": c.picture(), "mask_image": c.mask(), "example_image": c.picture(seed=1)}
    return _pipeline(name, {**parts, **UNSAFE, "unet": sd.unet(9)}, **pictures)


def _boxes(name: str) -> Tiny:
    """Things at their places, in all steps: the layers that look at them are switched off after those."""
    unet = sd.unet(attention_type="gated")
    for path, parameter in unet.named_parameters():
        if path.rpartition(".")[2] in ("alpha_attn", "alpha_dense"):  # their weight is 0 before training
            torch.nn.init.constant_(parameter, 0.5)
    parts = {**text(), **UNSAFE, "feature_extractor": None, "unet": unet}
    things = {"gligen_phrases": ["an apple"], "gligen_boxes": [[0.1, 0.2, 0.5, 0.6]], "gligen_scheduled_sampling_beta": 1.0}
    return _pipeline(name, parts, **WORDS, **SIZE, **things)


make = c.maker(
    {
        "StableDiffusionImageVariationPipeline": _variation,
        "StableDiffusionModelEditingPipeline": _text,
        "StableDiffusionInpaintPipelineLegacy": _inpaint,
        "StableDiffusionDiffEditPipeline": _inverted,
        "StableUnCLIPPipeline": _unclip,
        "StableUnCLIPImg2ImgPipeline": _unclip,
        "PaintByExamplePipeline": _example,
        "StableDiffusionGLIGENPipeline": _boxes,
    }
)
