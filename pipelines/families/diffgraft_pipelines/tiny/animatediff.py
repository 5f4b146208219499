"""Tiny AnimateDiff pipelines: the U-Net of tiny Stable Diffusion with motion modules, four frames."""

from __future__ import annotations

import diffusers
from diffgraft import Tiny
from diffusers import ControlNetModel, MotionAdapter, SparseControlNetModel

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import sd, sdxl

FRAMES = 4
SIDE = 32
MOTION = {"block_out_channels": (16, 32, 32), "motion_num_attention_heads": 4, "motion_norm_num_groups": 8}
SPARSE = {
    "conditioning_channels": 4,
    "block_out_channels": (16, 32, 32),
    "down_block_types": ("CrossAttnDownBlockMotion", "CrossAttnDownBlockMotion", "DownBlockMotion"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
    "motion_num_attention_heads": 4,
}


def _pipeline(name: str, in_channels: int = 4, **kwargs: object) -> Tiny:
    tokenizer, unet = c.clip_tokenizer(), sd.unet()
    parts = {
        "vae": c.vae(),
        "text_encoder": c.clip_text(tokenizer),
        "tokenizer": tokenizer,
        "unet": unet,
        "motion_adapter": MotionAdapter(**MOTION),
        "scheduler": sd.ddim(),
    }
    if "XL" in name:
        parts |= {"unet": sdxl.unet(4), "tokenizer_2": c.clip_tokenizer(), "text_encoder_2": c.clip_text(tokenizer, projection=32)}
    if in_channels > 4:
        parts["motion_adapter"] = MotionAdapter(conv_in_channels=in_channels, **MOTION)
    if "SparseControlNet" in name:
        parts["vae"] = c.still(c.vae())
        parts["controlnet"] = SparseControlNetModel(concat_conditioning_mask=False, use_simplified_condition_embedding=True, **SPARSE)
    elif "ControlNet" in name:
        parts["controlnet"] = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 4, 8, 8))
    return c.finish(getattr(diffusers, name)(**parts), prompt=c.PROMPT, negative_prompt=c.NEGATIVE, guidance_scale=7.5, **kwargs)


def _text(name: str) -> Tiny:
    return _pipeline(name, num_frames=FRAMES, height=SIDE, width=SIDE)


def _video(name: str) -> Tiny:
    return _pipeline(name, video=c.video(FRAMES, SIDE), height=SIDE, width=SIDE, strength=0.8)


def _control(name: str) -> Tiny:
    return _pipeline(name, num_frames=FRAMES, height=SIDE, width=SIDE, conditioning_frames=c.video(FRAMES, SIDE))


def _sparse(name: str) -> Tiny:
    """The first frame is given, as latents."""
    return _pipeline(name, num_frames=FRAMES, height=SIDE, width=SIDE, conditioning_frames=[c.picture(SIDE)], controlnet_frame_indices=[0])


def _control_video(name: str) -> Tiny:
    videos = {"video": c.video(FRAMES, SIDE), "conditioning_frames": c.video(FRAMES, SIDE)}
    return _pipeline(name, **videos, height=SIDE, width=SIDE, strength=0.8)


def _image(name: str) -> Tiny:
    """A picture and how far each frame may go from it are behind the noise."""
    return _pipeline(name, 9, image=c.picture(SIDE), num_frames=FRAMES, height=SIDE, width=SIDE)


make = c.maker(
    {
        "AnimateDiffPipeline": _text,
        "AnimateDiffVideoToVideoPipeline": _video,
        "AnimateDiffControlNetPipeline": _control,
        "AnimateDiffSparseControlNetPipeline": _sparse,
        "AnimateDiffVideoToVideoControlNetPipeline": _control_video,
        "PIAPipeline": _image,
        "AnimateDiffSDXLPipeline": _text,
    }
)
