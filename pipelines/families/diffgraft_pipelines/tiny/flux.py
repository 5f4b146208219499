"""Tiny Flux pipelines: two double and two single blocks."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

from diffgraft_pipelines.tiny import _common as c

CHANNELS = 4
PACKED = 4 * CHANNELS  # two by two latent pixels make a token
MASK = 4 * 8 * 8  # the mask, at pixel resolution, folded into the same tokens


def _pipeline(name: str, in_channels: int = PACKED, **kwargs: object) -> Tiny:
    clip, t5 = c.clip_tokenizer(), c.t5_tokenizer()
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=in_channels,
        out_channels=PACKED,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=c.clip_text(clip),
        tokenizer=clip,
        text_encoder_2=c.t5_text(t5),
        tokenizer_2=t5,
        transformer=transformer,
    )
    if "Fill" not in name:
        kwargs |= {"negative_prompt": c.NEGATIVE, "true_cfg_scale": 3.0}
    kwargs |= {"guidance_scale": 3.5, "max_sequence_length": 40}
    if name != "FluxKontextInpaintPipeline":  # its size is the picture's
        kwargs |= {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, **kwargs)


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


def _fill(name: str) -> Tiny:
    return _pipeline(name, 2 * PACKED + MASK, image=c.picture(), mask_image=c.mask())


def _kontext(name: str) -> Tiny:
    """Kontext scales every size to ``max_area``: pass it with another ``height`` and ``width``."""
    return _pipeline(name, image=c.picture(), max_area=c.SIDE**2, _auto_resize=False)


def _kontext_inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8, max_area=c.SIDE**2, _auto_resize=False)


make = c.maker(
    {
        "FluxPipeline": _pipeline,
        "FluxImg2ImgPipeline": _image,
        "FluxInpaintPipeline": _inpaint,
        "FluxKontextPipeline": _kontext,
        "FluxKontextInpaintPipeline": _kontext_inpaint,
        "FluxFillPipeline": _fill,
    }
)
