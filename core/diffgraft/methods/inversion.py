"""``invert``: walk from a picture back to the noise that it comes from, and keep that as a file from which a plugin makes it again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Plugin
from diffgraft.kernel.defaults import own_defaults
from diffgraft.kernel.loading import load_pipeline
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.decoding import decode, ensure_decodes, to_latents
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments, default_steps, parameters, to_float
from diffgraft.methods.named import declared
from diffgraft.methods.watching import made_for, watching


def invert(
    pipe: Any, plugin: Plugin, image: Any, sample: Sample, settings: CallSettings, out: str | os.PathLike[str] | None = None
) -> Artefact:
    """The code of ``image`` for this pipeline, written to ``out`` if that is given; afterwards the pipeline is as it was.

    Args:
        pipe: a diffusers pipeline without plugins, on its device.
        image: a PIL picture, or its latents [1, ...] as the pipeline's ``output_type="latent"`` gives them.
        sample: the prompt under which it is inverted (its seed does not matter).
        settings: steps, guidance scale and size. Guidance that is not named is off (1): a walk back under more leads to latents that are
            no noise that the model knows, from which edits come out torn.

    The code's facts say what it was asked for: ``prompt``, ``knobs``, ``guidance_scale``, the whole schedule's ``steps`` (None where
    the call brought a schedule of its own; the walk may have made fewer: ``made_for.steps``) and the picture's ``size`` (height, width), if
    it is known.

    Raises:
        ConfigError: latents of several pictures.
        Unsupported: the plugin cannot invert, does not work on this pipeline, or the pipeline has no way from pictures to latents.
    """
    made_by = declared(plugin, "inversion")
    if "latents" not in parameters(pipe):
        raise Unsupported(f"{type(pipe).__name__} takes no latents, so a picture cannot be walked back through it")
    if isinstance(image, Tensor) and len(image) != 1:
        raise ConfigError(f"latents of {len(image)} pictures: a code is that of one; invert each by itself (latents[i : i + 1])")
    inverter = made_by(**plugin.own_knobs)
    with watching(pipe, plugin, inverter) as stack:
        latents, size = (image, None) if isinstance(image, Tensor) else encode_sized(pipe, stack.family, image, settings)
        guidance = stack.family.guidance
        off = {} if guidance.layout == "none" or guidance.scale not in parameters(pipe) else {guidance.scale: guidance.off}
        arguments = off | size_arguments(pipe, size) | call_arguments(pipe, [sample], settings)
        pipe(**{**arguments, "latents": latents, "output_type": "latent"})
        knobs = inverter.config.model_dump(mode="json")
        facts = {
            "prompt": sample.prompt,
            "knobs": knobs,
            "guidance_scale": arguments.get(guidance.scale),
            "steps": steps_asked(pipe, arguments),
            "size": size,
        }
        code = Artefact(made_for(plugin, stack), stack.report().plugins[inverter.name].records, facts, kind="inversion")
    if out is not None:
        code.save(out)
    return code


def steps_asked(pipe: Any, arguments: Mapping[str, Any]) -> int | None:
    """How many steps the whole schedule of a call has; None where the call brings its own."""
    if any(arguments.get(name) is not None for name in ("timesteps", "sigmas")):
        return None
    return arguments.get("num_inference_steps") or default_steps(pipe)


def size_arguments(pipe: Any, size: tuple[int, int] | None) -> dict[str, int]:
    """What a call names for pictures of that height and width; nothing where they are not known, or the pipeline has one size."""
    return {} if size is None or "height" not in parameters(pipe) else {"height": size[0], "width": size[1]}


def encode(pipe: Any, family: Family, image: Any, settings: CallSettings) -> Tensor:
    """A picture as the pipeline's clean latents [1, ...], see :func:`encode_sized`."""
    return encode_sized(pipe, family, image, settings)[0]


@torch.no_grad()
def encode_sized(pipe: Any, family: Family, image: Any, settings: CallSettings) -> tuple[Tensor, tuple[int, int]]:
    """(a picture as the pipeline's clean latents [1, ...], height and width that it has there): the size that the settings name, else the
    pipeline's own, else the picture's.

    Raises:
        Unsupported: the pipeline has no autoencoder for pictures, or lays its latents out in a way that is not known here.
    """
    if family.latents not in ("bchw", "packed") or not hasattr(pipe, "image_processor"):
        raise Unsupported(f"{type(pipe).__name__} makes no single pictures, so one has no place among its latents")
    ensure_decodes(pipe, family)
    given = {"height": settings.height, "width": settings.width} if settings.height else settings.extra
    own = own_defaults(pipe)
    size = {name: value for name in ("height", "width") if (value := given.get(name, own.get(name))) is not None}
    pixels = pipe.image_processor.preprocess(image, **size).to(pipe.device)
    return to_latents(pipe, family, pixels), (pixels.shape[-2], pixels.shape[-1])


def round_trip(pipe: Any, plugin: Plugin, image: Any, sample: Sample, settings: CallSettings, code: Artefact) -> tuple[float, float]:
    """(PSNR of what the autoencoder alone leaves of the picture, PSNR of the picture made again from its code), both to the picture, in dB.

    One more run; afterwards the pipeline is as it was.
    """
    knob = next(need.knob for need in plugin.needs if need.kind == "inversion")
    stack = load_pipeline(pipe, [type(plugin)(**{**plugin.own_knobs, knob: code})]).plugins
    try:
        latents, size = encode_sized(pipe, stack.family, image, settings)
        arguments = size_arguments(pipe, size) | call_arguments(pipe, [sample], settings)
        own = own_defaults(pipe)
        [alone] = decode(pipe, stack.family, latents, {**own, **arguments})
        again = pipe(**{**arguments, "output_type": "pil"}).images[0]
    finally:
        stack.clear()
    given = image.resize(again.size)
    return nearness(alone, given), nearness(again, given)


def nearness(picture: Any, other: Any) -> float:
    """PSNR of two PIL pictures in dB; infinite where they are equal."""
    error = float(np.square(to_float(picture) - to_float(other)).mean())
    return math.inf if error == 0 else -10 * math.log10(error)
