"""``invert``: walk from a picture back to the noise that it comes from, and keep that as a file from which a plugin makes it again."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from diffgraft.kernel.errors import Unsupported
from diffgraft.kernel.family import Family
from diffgraft.kernel.plugin import Plugin
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments, parameters
from diffgraft.methods.watching import made_for, watching


def invert(
    pipe: Any, plugin: Plugin, image: Any, sample: Sample, settings: CallSettings, out: str | os.PathLike[str] | None = None
) -> Artefact:
    """The code of ``image`` for this pipeline, written to ``out`` if that is given; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        image: a PIL picture, or latents as the pipeline's ``output_type="latent"`` gives them.
        sample: the prompt under which it is inverted (its seed does not matter).
        settings: steps, guidance scale and size.

    Raises:
        Unsupported: the plugin cannot invert, does not work on this pipeline, or the pipeline has no way from pictures to latents.
    """
    if plugin.inversion is None:
        raise Unsupported(f"{plugin.name} cannot invert pictures")
    if "latents" not in parameters(pipe):
        raise Unsupported(f"{type(pipe).__name__} takes no latents, so a picture cannot be walked back through it")
    inverter = plugin.inversion(**plugin.own_knobs)
    with watching(pipe, plugin, inverter) as stack:
        latents = image if isinstance(image, Tensor) else encode(pipe, stack.family, image, settings)
        arguments = call_arguments(pipe, [sample], settings)
        pipe(**{**arguments, "latents": latents, "output_type": "latent"})
        facts = {"prompt": sample.prompt, "knobs": inverter.config.model_dump(mode="json"), "guidance_scale": settings.guidance_scale}
        code = Artefact(made_for(plugin, stack), stack.report().plugins[inverter.name].records, facts, kind="inversion")
    if out is not None:
        code.save(out)
    return code


@torch.no_grad()
def encode(pipe: Any, family: Family, image: Any, settings: CallSettings) -> Tensor:
    """A picture as the pipeline's clean latents [1, ...].

    Raises:
        Unsupported: the pipeline has no autoencoder for pictures, or lays its latents out in a way that is not known here.
    """
    vae = getattr(pipe, "vae", None)
    if vae is None or not hasattr(vae.config, "scaling_factor") or family.latents not in ("bchw", "packed"):
        raise Unsupported(f"{type(pipe).__name__} has no autoencoder for pictures of which it is known how the latents are laid out")
    size = {"height": settings.height, "width": settings.width} if settings.height else {}
    pixels = pipe.image_processor.preprocess(image, **size).to(vae.device, vae.dtype)
    latents = (vae.encode(pixels).latent_dist.mode() - (vae.config.get("shift_factor") or 0)) * vae.config.scaling_factor
    return pipe._pack_latents(latents, *latents.shape) if family.latents == "packed" else latents  # type: ignore[no-any-return]
