"""Latents to pictures while a pipeline is running, as it decodes them itself at the end: for plugins that look at what they are making."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family


def ensure_decodes(pipe: Any, family: Family) -> None:
    """Refuse a pipeline whose way from latents to pictures is not known here.

    Raises:
        Unsupported: with the reason.
    """
    vae: Any = getattr(pipe, "vae", None)
    needed = {"bchw": ("image_processor",), "packed": ("image_processor", "default_sample_size"), "bcfhw": ("video_processor",)}
    known = vae is not None and all(hasattr(pipe, name) for name in needed.get(family.latents, ("no such layout",)))
    scales = ("latents_mean",) if family.latents == "bcfhw" else ("latents_mean", "scaling_factor")
    if not known or all(vae.config.get(name) is None for name in scales):
        raise Unsupported(f"{type(pipe).__name__} has no autoencoder of which it is known how the latents become pictures")
    if vae.dtype == torch.float16 and vae.config.get("force_upcast") and family.prediction != "flow":
        raise Unsupported(f"{type(pipe).__name__}: its vae overflows in float16; give it one that does not, or .to(torch.float32)")


def decode(pipe: Any, family: Family, latents: Tensor, arguments: Mapping[str, Any]) -> list[Any]:
    """PIL pictures of clean latents [batch, ...] in the layout of ``scheduler.step``; for video a list of frames for each.

    Args:
        arguments: of the pipeline's call: ``height`` and ``width`` of packed latents, where given.

    Raises:
        Unsupported: see :func:`ensure_decodes`.
    """
    ensure_decodes(pipe, family)
    vae = pipe.vae
    if family.latents == "packed":
        side = pipe.default_sample_size * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, arguments.get("height") or side, arguments.get("width") or side, pipe.vae_scale_factor)
    latents = latents.to(vae.dtype)
    if (mean := vae.config.get("latents_mean")) is not None:
        shape = (1, -1, *[1] * (latents.ndim - 2))
        mean, std = (torch.tensor(each).view(shape).to(latents) for each in (mean, vae.config["latents_std"]))
        latents = latents / (vae.config.get("scaling_factor") or 1) / (1 / std) + mean
    else:
        latents = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
    with torch.no_grad():
        pixels = vae.decode(latents, return_dict=False)[0]
    if family.latents == "bcfhw":
        return pipe.video_processor.postprocess_video(pixels, output_type="pil")  # type: ignore[no-any-return]
    if pixels.ndim == 5:  # an autoencoder for video that makes one frame
        pixels = pixels[:, :, 0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]
