"""Denoisers of real models' layouts with random weights, in pipelines that take embeddings and give latents.

On a CPU they are made smaller than the real model; ``Case.scale`` says how.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from torch import Tensor

PICTURES, VIDEOS = "num_images_per_prompt", "num_videos_per_prompt"


@dataclass(frozen=True)
class Maker:
    """Makes models where they will run (a GPU draws Flux's weights in a second), and embeddings that are the same everywhere."""

    device: str
    dtype: torch.dtype
    generator: torch.Generator

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def model(self, cls: Any, **config: Any) -> Any:
        with torch.device(self.device):
            return cls(**config)


@dataclass(frozen=True)
class Case:
    """A pipeline and the arguments of its call; `scale` says what was made smaller than the real model."""

    pipe: Any
    arguments: dict[str, Any]
    scale: str


def sd15(noise: Maker, full: bool, width: float = 1.0) -> Case:
    """Stable Diffusion 1.5's U-Net, guidance on."""
    channels = tuple(int(c * width) for c in (320, 640, 1280, 1280))
    unet = noise.model(
        diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768, attention_head_dim=8, block_out_channels=channels
    )
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False, steps_offset=1
    )
    pipe = diffusers.StableDiffusionPipeline(
        vae=None, text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    )  # fmt: skip
    size = 512 if full else 256
    embeds = {"prompt_embeds": noise(1, 77, 768), "negative_prompt_embeds": noise(1, 77, 768)}
    return Case(pipe, {**embeds, "height": size, "width": size}, "real size" if full else "256 px instead of 512")


def flux(noise: Maker, full: bool, width: float = 1.0) -> Case:
    """Flux: double and single blocks, no true CFG."""
    double, single, heads, size = (19, 38, int(24 * width), 1024) if full else (2, 4, int(8 * width), 256)
    transformer = noise.model(
        diffusers.FluxTransformer2DModel, num_layers=double, num_single_layers=single, num_attention_heads=heads,
        pooled_projection_dim=768, joint_attention_dim=512, guidance_embeds=False,
    )  # fmt: skip
    pipe = diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True), transformer=transformer,
        vae=None, text_encoder=None, tokenizer=None, text_encoder_2=None, tokenizer_2=None,
    )  # fmt: skip
    embeds = {"prompt_embeds": noise(1, 64, 512), "pooled_prompt_embeds": noise(1, 768)}
    scale = "real size" if full else "2 + 4 blocks of 8 heads instead of 19 + 38 of 24, 256 px instead of 1024"
    return Case(pipe, {**embeds, "height": size, "width": size}, scale)


def wan(noise: Maker, full: bool, width: float = 1.0) -> Case:
    """Wan 2.1: sequential CFG."""
    layers, heads, height, frames = (30, int(12 * width), 480, 81) if full else (4, int(6 * width), 192, 9)
    sizes = {"num_layers": layers, "num_attention_heads": heads, "ffn_dim": heads * 128 * 6, "text_dim": 512}
    transformer = noise.model(diffusers.WanTransformer3DModel, **sizes)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    pipe = diffusers.WanPipeline(vae=None, text_encoder=None, tokenizer=None, transformer=transformer, scheduler=scheduler)
    embeds = {"prompt_embeds": noise(1, 64, 512), "negative_prompt_embeds": noise(1, 64, 512)}
    scale = "real size" if full else "4 blocks of 6 heads instead of 30 of 12, 192 px and 9 frames instead of 480 x 832 and 81"
    return Case(pipe, {**embeds, "height": height, "width": 832 if full else height, "num_frames": frames}, scale)


def sdxl(noise: Maker, full: bool, width: float = 1.0) -> Case:
    """Stable Diffusion XL's U-Net, guidance on."""
    channels = tuple(int(c * width) for c in (320, 640, 1280))
    unet = noise.model(
        diffusers.UNet2DConditionModel,
        sample_size=128, cross_attention_dim=2048, attention_head_dim=(5, 10, 20), block_out_channels=channels,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10) if full else (1, 1, 2), use_linear_projection=True,
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip
    scheduler = diffusers.EulerDiscreteScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1)
    pipe = diffusers.StableDiffusionXLPipeline(
        vae=None, text_encoder=None, text_encoder_2=None, tokenizer=None, tokenizer_2=None, unet=unet, scheduler=scheduler
    )
    size = 1024 if full else 256
    embeds = {name: noise(1, 77, 2048) for name in ("prompt_embeds", "negative_prompt_embeds")}
    pooled = {name: noise(1, 1280) for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds")}
    scale = "real size" if full else "256 px instead of 1024, 2 transformer layers instead of 10 at the lowest level"
    return Case(pipe, {**embeds, **pooled, "height": size, "width": size}, scale)


def pixart(noise: Maker, full: bool, width: float = 1.0) -> Case:
    """PixArt-alpha's transformer, guidance on."""
    layers, heads, size = (28, int(16 * width), 1024) if full else (6, int(16 * width), 256)
    transformer = noise.model(
        diffusers.PixArtTransformer2DModel,
        sample_size=size // 8, num_layers=layers, num_attention_heads=heads, cross_attention_dim=heads * 72, caption_channels=512,
        norm_type="ada_norm_single", use_additional_conditions=False,
    )  # fmt: skip
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_schedule="linear", beta_start=0.0001, beta_end=0.02)
    pipe = diffusers.PixArtAlphaPipeline(tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler)
    embeds = {name: noise(1, 64, 512) for name in ("prompt_embeds", "negative_prompt_embeds")}
    masks = {name: torch.ones_like(embeds["prompt_embeds"][..., 0]) for name in ("prompt_attention_mask", "negative_prompt_attention_mask")}
    arguments = {**embeds, **masks, "negative_prompt": None, "height": size, "width": size, "use_resolution_binning": False}
    return Case(pipe, arguments, "real size" if full else "6 blocks instead of 28, 256 px instead of 1024")


CONFIGS: dict[str, Callable[..., Case]] = {"sd15": sd15, "sdxl": sdxl, "flux": flux, "wan": wan, "pixart": pixart}


def make_case(
    config: str, device: str, dtype: torch.dtype, full: bool, steps: int, width: float = 1.0, batch: int = 1,
    call: Mapping[str, Any] | None = None,
) -> Case:  # fmt: skip
    """The case on its device, without progress bar; ``batch`` pictures a call. ``call``: other arguments (a size, a number of frames)."""
    torch.manual_seed(0)
    case = CONFIGS[config](Maker(device, dtype, torch.Generator().manual_seed(0)), full, width)
    for name in ("unet", "transformer"):
        if (model := getattr(case.pipe, name, None)) is not None:
            model.eval().requires_grad_(False).to(device, dtype)
    case.pipe.set_progress_bar_config(disable=True)
    case.arguments.update({**(call or {}), "num_inference_steps": steps, "output_type": "latent"})
    if batch > 1:
        case.arguments[VIDEOS if "num_frames" in case.arguments else PICTURES] = batch
    return case
