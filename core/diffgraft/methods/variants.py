"""The pipeline of the same family that starts from a picture, fills a mask, or follows a ControlNet: one set of weights, another class."""

from __future__ import annotations

import re
from typing import Any

import diffusers

from diffgraft.installed import registry
from diffgraft.installed.anatomy import denoisers_of
from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.defaults import give_defaults, own_defaults, plain_class
from diffgraft.methods.inputs import parameters_of

AUTO: dict[str, Any] = {
    "Img2Img": diffusers.AutoPipelineForImage2Image,
    "Inpaint": diffusers.AutoPipelineForInpainting,
    "": diffusers.AutoPipelineForText2Image,
}
WHAT = {"Img2Img": "image-to-image", "Inpaint": "inpainting", "": "text-to-image"}


def variant_of(name: str, *, image: bool = False, mask: bool = False, control: bool = False) -> type:
    """The class that does for the pipeline class ``name`` what is asked; ``name``'s own where that does it already. Loads nothing.

    Raises:
        Unsupported: diffusers or diffgraft's families have no such class.
    """
    known = {pipeline for family in registry.families().values() for pipeline in family.pipelines}
    control = control or "ControlNet" in name
    own: type | None = getattr(diffusers, name, None)
    if own is not None and name in known and image and not control:
        takes = parameters_of(own)
        if "image" in takes and ("mask_image" in takes) == mask:
            return own  # made for pictures, whatever its name (Kontext, image to video)
    task = "Inpaint" if mask else "Img2Img" if image else ""
    stem = re.sub(r"(ControlNet)?(Img2Img|Inpaint)?Pipeline$", "", name)
    wanted = f"{stem}{'ControlNet' if control else ''}{task}Pipeline"
    found: type | None = getattr(diffusers, wanted, None)
    if wanted not in known or found is None or "image" not in parameters_of(found):
        ending = f"{'ControlNet' if control else ''}{task}Pipeline"
        others = ", ".join(sorted(pipeline for pipeline in known if pipeline.endswith(ending)))
        what = WHAT[task] + (" with a ControlNet" if control else "")
        raise Unsupported(f"{name} has no pipeline for {what} that diffgraft knows; there are {others}")
    return found


def as_variant(pipe: Any, cls: type, controlnet: Any = None) -> Any:
    """``pipe``'s components in a pipeline of class ``cls``, with its defaults; the weights are shared, none is copied or cast."""
    if plain_class(type(pipe)) is cls and controlnet is None:
        return pipe
    parts = {} if controlnet is None else {"controlnet": controlnet}
    auto = next(auto for task, auto in AUTO.items() if f"{task}Pipeline" in cls.__name__)
    new = auto.from_pipe(pipe, **parts)  # `cls.from_pipe` would cast everything, also what a text encoder keeps in float32
    new.set_progress_bar_config(**getattr(pipe, "_progress_bar_config", {}))
    if own := {name: value for name, value in own_defaults(pipe).items() if name in parameters_of(cls)}:
        give_defaults(new, own)
    return new


def own_size(pipe: Any) -> tuple[int, int] | None:
    """(height, width) of the pictures that the pipeline makes where nobody says; None where it does not tell."""
    own = own_defaults(pipe)
    if "height" in own and "width" in own:
        return own["height"], own["width"]
    side = getattr(pipe, "default_sample_size", None)
    if side is None:
        denoiser = next(iter(denoisers_of(pipe, registry.find_family(type(pipe))).values()))
        side = getattr(denoiser.config, "sample_size", None)
    scale = getattr(pipe, "vae_scale_factor", None)
    if scale is None:  # DiT keeps none; without an autoencoder the denoiser works on the pixels themselves
        vae = getattr(pipe, "vae", None)
        widths = getattr(getattr(vae, "config", None), "block_out_channels", None)
        scale = 1 if vae is None else None if widths is None else 2 ** (len(widths) - 1)
    if side is None or scale is None:
        return None
    height, width = side if isinstance(side, (list, tuple)) else (side, side)
    return height * scale, width * scale
