"""Latents to pictures and back, as the pipeline itself does it: for plugins that look at what they are making, or begin with a picture."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from diffusers.image_processor import VaeImageProcessor
from torch import Tensor

from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.errors import Unsupported
from diffgraft.installed.family import Family


def ensure_decodes(pipe: Any, family: Family, float32: bool = False) -> None:
    """Refuse a pipeline whose way from latents to pictures is not known here.

    Args:
        float32: the autoencoder will compute in float32.

    Raises:
        Unsupported: with the reason.
    """
    if family.latents == "pixels":
        return
    vae: Any = getattr(pipe, "vae", None)
    needed = {"bchw": (), "packed": ("default_sample_size",), "bcfhw": ("video_processor",)}
    known = vae is not None and all(hasattr(pipe, name) for name in needed.get(family.latents, ("no such layout",)))
    scales = ("latents_mean",) if family.latents == "bcfhw" else ("latents_mean", "scaling_factor")
    if not known or all(vae.config.get(name) is None for name in scales):
        raise Unsupported(f"{type(pipe).__name__} has no autoencoder of which it is known how the latents become pictures")
    # diffusers' default is true, but only pipelines with an `upcast_vae` (SDXL's) act by it: the others decode in float16
    if vae.dtype == torch.float16 and vae.config.get("force_upcast") and hasattr(pipe, "upcast_vae") and not float32:
        raise Unsupported(
            f"{type(pipe).__name__}: its vae overflows in float16; give it one that does not (for SDXL: madebyollin/sdxl-vae-fp16-fix), "
            "or load the pipeline in bfloat16 or float32"
        )


def _autoencoder(pipe: Any, float32: bool, device: torch.device) -> Any:
    """The pipeline's autoencoder; in float32 a copy of it where it is kept in another dtype: the pipeline's own is never changed."""
    vae = pipe.vae
    if not float32 or vae.dtype == torch.float32:
        return vae
    if any(weight.is_meta for weight in vae.parameters()):
        raise Unsupported(f"{type(pipe).__name__}: its vae is offloaded weight by weight, and cannot be copied to float32")
    offload = getattr(vae, "_hf_hook", None)  # holds on to the model before it in the pipeline, and would bring this one to the GPU
    return copy.deepcopy(vae, {id(offload): None}).requires_grad_(False).to(device, torch.float32)


def to_pixels(pipe: Any, family: Family, latents: Tensor, arguments: Mapping[str, Any], *, float32: bool = False) -> Tensor:
    """The pixels of clean latents [batch, ...] in the layout of ``scheduler.step``: [batch, 3, height, width] in about -1 to 1, of video
    [batch, 3, frames, height, width]. Gradients flow where the caller has them on.

    Args:
        arguments: of the pipeline's call: ``height`` and ``width`` of packed latents, where given.
        float32: compute in float32 and give float32, in whatever dtype the autoencoder is kept: by a copy of it that lives as long as the
            call, and its graph. For gradients, and for one that overflows in float16.

    Raises:
        Unsupported: see :func:`ensure_decodes`.
    """
    ensure_decodes(pipe, family, float32)
    if family.latents == "pixels":
        return latents.float() if float32 else latents
    vae = _autoencoder(pipe, float32, latents.device)
    if family.latents == "packed":
        side = pipe.default_sample_size * pipe.vae_scale_factor
        latents = pipe._unpack_latents(latents, arguments.get("height") or side, arguments.get("width") or side, pipe.vae_scale_factor)
    latents = latents.to(vae.dtype)
    if vae.config.get("latents_mean") is not None:
        mean, std = _statistics(vae, latents)
        latents = latents / (vae.config.get("scaling_factor") or 1) / (1 / std) + mean
    else:
        latents = latents / vae.config["scaling_factor"] + (vae.config.get("shift_factor") or 0)
    pixels: Tensor = vae.decode(latents, return_dict=False)[0]
    still = pixels.ndim == 5 and family.latents != "bcfhw"  # an autoencoder for video that makes one frame
    return pixels[:, :, 0] if still else pixels


def to_latents(pipe: Any, family: Family, pixels: Tensor, *, float32: bool = False) -> Tensor:
    """The clean latents of pixels as :func:`to_pixels` gives them, at the mode of the autoencoder's posterior; the way back, with gradients
    where the caller has them on, and with the same ``float32``.

    Raises:
        Unsupported: the pipeline has no autoencoder of which it is known how the latents are laid out.
    """
    ensure_decodes(pipe, family, float32)
    if family.latents == "pixels":
        return pixels.float() if float32 else pixels
    vae = _autoencoder(pipe, float32, pixels.device)
    if family.latents == "packed" and vae.config.get("latents_mean") is not None:
        raise Unsupported(f"{type(pipe).__name__} encodes pictures by an autoencoder for video, in a way that is not known here")
    latents = scaled_latents(vae, vae.encode(pixels.to(vae.dtype)).latent_dist.mode())
    return pipe._pack_latents(latents, *latents.shape) if family.latents == "packed" else latents  # type: ignore[no-any-return]


def scaled_latents(vae: Any, encoded: Tensor) -> Tensor:
    """What an autoencoder's encoder gives, in the scale of the pipeline's latents."""
    if vae.config.get("latents_mean") is not None:
        mean, std = _statistics(vae, encoded)
        return (encoded - mean) * (1 / std) * (vae.config.get("scaling_factor") or 1)
    return (encoded - (vae.config.get("shift_factor") or 0)) * vae.config["scaling_factor"]  # type: ignore[no-any-return]


def _statistics(vae: Any, latents: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation of each channel of an autoencoder's latents, as they broadcast to these."""
    shape = (1, -1, *[1] * (latents.ndim - 2))
    mean, std = (torch.tensor(vae.config[name]).view(shape).to(latents) for name in ("latents_mean", "latents_std"))
    return mean, std


def picture_channels(pipe: Any, family: Family) -> int:
    """Of the pictures that the pipeline makes: those that its autoencoder takes, without one those of the denoiser."""
    vae = getattr(pipe, "vae", None)
    if vae is not None:
        channels, side = int(vae.config.get("in_channels", 3)), vae.config.get("patch_size")
        squares = isinstance(side, int) and channels % side**2 == 0  # Wan 2.2's counts the pixels of a square, LTX's does not
        return channels // side**2 if squares else channels
    return int(next(iter(denoisers_of(pipe, family).values())).config["in_channels"])  # type: ignore[index]


@torch.no_grad()
def decode(pipe: Any, family: Family, latents: Tensor, arguments: Mapping[str, Any]) -> list[Any]:
    """PIL pictures of clean latents, see :func:`to_pixels`; for video a list of frames for each.

    Raises:
        Unsupported: see :func:`ensure_decodes`.
    """
    pixels = to_pixels(pipe, family, latents, arguments)
    if family.latents == "bcfhw":
        return pipe.video_processor.postprocess_video(pixels, output_type="pil")  # type: ignore[no-any-return]
    processor = getattr(pipe, "image_processor", None) or VaeImageProcessor()  # DiT and DDPM have none, and do what it does
    return processor.postprocess(pixels, output_type="pil")  # type: ignore[no-any-return]
