"""Tiny Wan pipelines; ``@2.2`` has two transformers (two of the four steps each)."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import WanVACETransformer3DModel

from diffgraft_pipelines.tiny import _common as c

SIDE = 32
CHANNELS = 8
FRAMES = 5


def _vace() -> WanVACETransformer3DModel:
    """Hints behind the first and the last of three blocks, of a video, a part of it that stays, and a mask."""
    return WanVACETransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=64,
        vace_layers=[0, 2],
        vace_in_channels=2 * CHANNELS + 8 * 8,
    )


def _transformer(image: bool, second: bool, model: str = "WanTransformer3DModel", mask: int = 4) -> Any:
    """``image``: also takes a mask and the start picture, and in 2.1 (not ``second``) the picture's CLIP features."""
    return getattr(diffusers, model)(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=2 * CHANNELS + mask if image else CHANNELS,
        out_channels=CHANNELS,
        text_dim=32,
        freq_dim=32,
        ffn_dim=48,
        num_layers=3,
        rope_max_seq_len=64,
        image_dim=32 if image and not second else None,
        added_kv_proj_dim=24 if image and not second else None,
    )


def _denoiser(name: str, image: bool, second: bool) -> Any:
    if name == "WanVACEPipeline":
        return _vace()
    if name == "LucyEditPipeline":
        return _transformer(True, True, mask=0)
    return _transformer(image, second, "ChronoEditTransformer3DModel" if name == "ChronoEditPipeline" else "WanTransformer3DModel")


def _pipeline(name: str, second: bool = False, **kwargs: object) -> Tiny:
    tokenizer = c.t5_tokenizer()
    image = name in ("WanImageToVideoPipeline", "ChronoEditPipeline")
    parts: dict[str, object] = {
        "tokenizer": tokenizer,
        "text_encoder": c.umt5_text(tokenizer),
        "transformer": _denoiser(name, image, second),
        "vae": c.wan_vae(CHANNELS),
        "scheduler": c.flow_unipc(3.0),
    }
    if second:
        parts |= {"transformer_2": _transformer(image, second), "boundary_ratio": 0.875}
        kwargs["guidance_scale_2"] = 3.0
    elif image:
        parts |= {"image_encoder": c.clip_vision(), "image_processor": c.clip_image_processor()}
    return c.finish(
        getattr(diffusers, name)(**parts),
        prompt=c.PROMPT,
        negative_prompt=c.NEGATIVE,
        guidance_scale=5.0,
        height=SIDE,
        width=SIDE,
        max_sequence_length=32,
        **kwargs,
    )


def _text(name: str, second: bool = False) -> Tiny:
    return _pipeline(name, second, num_frames=FRAMES)


def _image(name: str, second: bool = False) -> Tiny:
    return _pipeline(name, second, num_frames=FRAMES, image=c.picture(SIDE))


def _video(name: str) -> Tiny:
    return _pipeline(name, video=c.video(FRAMES, SIDE), strength=0.8)


def _control(name: str) -> Tiny:
    """A video to follow, without a mask: all of it is painted anew."""
    return _pipeline(name, video=c.video(FRAMES, SIDE), num_frames=FRAMES)


def _lucy(name: str) -> Tiny:
    """The video to be edited behind the sample's channels, without a mask."""
    return _pipeline(name, video=c.video(FRAMES, SIDE), num_frames=FRAMES)


make = c.maker(
    {
        "WanPipeline": _text,
        "WanPipeline@2.2": lambda name: _text(name, True),
        "WanImageToVideoPipeline": _image,
        "WanImageToVideoPipeline@2.2": lambda name: _image(name, True),
        "WanVideoToVideoPipeline": _video,
        "WanVACEPipeline": _control,
        "LucyEditPipeline": _lucy,
        "WanModularPipeline": lambda name: c.modular(name, _text("WanPipeline")),
        "Wan22ModularPipeline": lambda name: c.modular(name, _text("WanPipeline", True)),
        "ChronoEditPipeline": lambda name: _pipeline(name, image=c.picture(SIDE)),
    }
)
