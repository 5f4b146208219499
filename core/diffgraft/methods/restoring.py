"""What plugins share that find a picture from its measurement on the pipeline's own loop (:mod:`diffgraft.methods.problems`).

The picture that is looked for is mu, in the layout and scale of ``scheduler.step``; ``denoise`` puts a noisy mu in, ``step`` answers with
the next one. The measurement speaks of pixels: of mu, or of what the autoencoder makes of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.calls import DenoiseCall
from diffgraft.methods.decoding import picture_channels, to_latents, to_pixels
from diffgraft.methods.predictions import known_kind
from diffgraft.methods.problems import Problem
from diffgraft.methods.solvers import asks_once_a_step


def begins_with_its_own(plugin: str) -> dict[str, str]:
    """``Plugin.not_on`` of a plugin that looks for the picture from the measurement alone."""
    own = f"it begins with a picture of its own; the measurement is {plugin}'s"
    return {"*Img2Img*": own, "*Depth2Img*": own, "*Inpaint*": f"it keeps parts of a picture of its own; give {plugin} a mask"}


def ensure_one_call_a_step(plugin: str, family: Family, scheduler: Any) -> None:
    """Refuse a scheduler of whose steps only some are asked at their own level, in the other direction, or that says no level.

    Raises:
        Unsupported: with the way out.
    """
    name = type(scheduler).__name__
    known_kind(family, scheduler, plugin)
    if getattr(scheduler, "sigmas", None) is None and getattr(scheduler, "alphas_cumprod", None) is None:
        raise Unsupported(f"{plugin}: {name} does not say how noisy its samples are; use DDIM, Euler or FlowMatchEuler, as the model is")
    if not asks_once_a_step(scheduler):
        raise Unsupported(
            f"{plugin}: {name} asks more than once for a step, and {plugin} takes a step at each question; use a first-order scheduler "
            "(DDIM, Euler, FlowMatchEuler)"
        )
    if "Inverse" in name:
        raise Unsupported(f"{plugin}: {name} goes from the picture to noise, and {plugin} the other way; use DDIM or Euler")


def problem_of(call: DenoiseCall, plugin: str, key: str = "problem", volumes: bool = False) -> Problem:
    """The run's problem where its samples are, in float32.

    Args:
        volumes: whether the pictures of a run may be the frames of one "video".

    Raises:
        ConfigError: it is of videos and the pipeline makes pictures, or the other way; it has another number of measurements than the run
            has pictures, or other channels than they.
    """
    problem: Problem = call.given(key).to(call.latents.device, torch.float32)
    wanted, given = len(call.latents), len(problem.y)
    if given not in (1, wanted):
        raise ConfigError(f"{plugin}: {key} has {given} measurements for {wanted} pictures: give one, or one for each")
    if not volumes and len(problem.shape) != (axes := 5 if call.family.latents in ("bcfhw", "bfchw") else 4):
        raise ConfigError(
            f"{plugin}: {key} is of {'videos' if axes == 4 else 'pictures'} {list(problem.shape)}, and {type(call.pipe).__name__} makes "
            f"{'pictures' if axes == 4 else 'videos'}: take an operator of these"
        )
    channels = picture_channels(call.pipe, call.family)
    if problem.shape[1] != channels:
        raise ConfigError(
            f"{plugin}: {key} is of pictures with {problem.shape[1]} channel(s), and the pipeline's have {channels}: measure "
            "such pictures, or give your operator a `domain` with so many"
        )
    return problem


def first_guess(call: DenoiseCall, problem: Problem, plugin: str, pixels: Tensor | None = None) -> Tensor:
    """mu of ``pixels``: where None of the pseudo-inverse, of a measurement that is not linear of a grey picture. In float32, a copy.

    Raises:
        ConfigError: the problem is of pictures of another size than this run's.
    """
    x = call.latents
    if pixels is None:
        pixels = problem.operator.pinv(problem.y) if problem.operator.linear else torch.zeros(problem.shape, device=x.device)
    mu = latents_of(call, pixels)
    if mu.shape[1:] != x.shape[1:]:
        size = "x".join(map(str, problem.shape[-2:]))
        of = f"{problem.shape[2]} frames of {size}" if len(problem.shape) == 5 else f"pictures of {size}"
        raise ConfigError(
            f"{plugin}: problem is of {of} with {problem.shape[1]} channels, whose latents are {list(mu.shape[1:])}, and "
            f"this run makes {list(x.shape[1:])}: ask the pipeline for that size"
        )
    return mu.expand_as(x).clone()


@torch.no_grad()
def latents_of(call: Any, pixels: Tensor) -> Tensor:
    """mu of pixels, in float32; of any call of a run.

    Raises:
        ConfigError: the autoencoder would cut off what is beside a whole number of its squares.
    """
    side = getattr(call.pipe, "vae_scale_factor", 1) if call.family.latents != "pixels" else 1
    if isinstance(side, int) and any(length % side for length in pixels.shape[-2:]):
        size, near = ("x".join(map(str, (f(length) for length in pixels.shape[-2:]))) for f in (int, lambda n: n // side * side))
        name = type(call.pipe).__name__
        raise ConfigError(f"{call.entry.name}: pictures of {size}, and those of {name} have multiples of {side}: {near}, say")
    return to_latents(call.pipe, call.family, pixels, float32=needs_float32(call.pipe)).float()


def pixels_of(call: Any, mu: Tensor) -> Tensor:
    """Pixels of mu, in float32; gradients flow where the caller has them on. ``call`` is any call of the run."""
    return to_pixels(call.pipe, call.family, mu, call.run.arguments, float32=needs_float32(call.pipe)).float()


def unit_noise(call: DenoiseCall) -> Tensor:
    """The noise of deviation 1 that the run begins with, in float32, at its first step."""
    scaled = 1.0 if call.family.unit_start else float(getattr(call.pipe.scheduler, "init_noise_sigma", 1.0))
    return call.latents.float() / scaled


def needs_float32(pipe: Any) -> bool:
    """Whether the autoencoder is kept in float16, which gradients leave: it is copied then."""
    vae = getattr(pipe, "vae", None)
    return vae is not None and vae.dtype == torch.float16
