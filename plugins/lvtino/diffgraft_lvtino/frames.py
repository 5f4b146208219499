"""The image model beside the video model: its step on every frame of a video."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffgraft import ConfigError, Family, RunCall, StepCall, Unsupported, find_family
from diffgraft.methods.conditioning import ask, for_each_prompt, number_of_prompts, own_conditioning
from diffgraft.methods.decoding import picture_channels, to_latents, to_pixels
from diffgraft.methods.predictions import SignalNoise, clean_estimate, known_kind
from diffgraft.methods.problems import Problem
from diffgraft.methods.restoring import needs_float32
from diffgraft.methods.second import unhooked
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgraft_lvtino.method import at_step, framewise, joined, nearest_level

FAMILIES = ("sd", "sdxl", "latent_consistency")
"""Image models with timesteps of alphas_cumprod, as the published one."""


def ensure_image_model(second: Any, problem: Problem, times: tuple[int, ...] | None) -> None:
    """Refuse a second pipeline that cannot make a step on frames like these.

    Raises:
        Unsupported, ConfigError: with the reason.
    """
    name, scheduler = type(second).__name__, second.scheduler
    if getattr(scheduler, "alphas_cumprod", None) is None:
        raise Unsupported(f"lvtino: image = {name} with {type(scheduler).__name__}, which has no alphas_cumprod: use LCMScheduler or DDIM")
    known_kind(find_family(type(second)), scheduler)
    if second.unet.config.in_channels != second.vae.config.latent_channels:
        raise Unsupported(f"lvtino: image = {name}: its unet wants more than noisy latents; give one from text to picture")
    channels, size = picture_channels(second, find_family(type(second))), problem.shape[-2:]
    if problem.shape[1] != channels:
        raise ConfigError(f"lvtino: problem is of pictures with {problem.shape[1]} channel(s), and those of image = {name} have {channels}")
    if any(side % 8 for side in size) or any(side % second.vae_scale_factor for side in size):
        raise ConfigError(f"lvtino: problem is of {size[0]}x{size[1]} pixels, and image = {name} takes multiples of 8")
    last = len(scheduler.alphas_cumprod) - 1
    if times is not None and max(times) > last:
        raise ConfigError(f"lvtino: image_times = {times}: {name} was trained with timesteps of 0 to {last}")


@dataclass
class ImageModel:
    """What a run keeps of the second pipeline: whom it asks, and with which text."""

    pipe: Any
    family: Family
    asked: Mapping[str, Any]
    """Denoiser arguments for the run's prompts, one row each."""
    conditioning: tuple[str, ...]

    @classmethod
    def of(cls, call: RunCall, second: Any, problem: Problem, text: str | tuple[str, ...] | None) -> ImageModel:
        """Ask the second pipeline what it hands to its denoiser for these texts."""
        family, prompt = find_family(type(second)), call.get("prompt")
        if text is None and not isinstance(prompt, (str, list, tuple)):
            if call.get("prompt_embeds") is not None:
                call.note("the image model has no text: embeddings say nothing to it; give image_prompt")
            text = ""
        texts = for_each_prompt("lvtino", prompt if text is None else text, call.arguments(), "image_prompt")  # type: ignore[arg-type]
        if text is not None and number_of_prompts(call.arguments()) == 1:
            texts = texts[:1]
        said = {"prompt": texts, "height": problem.shape[-2], "width": problem.shape[-1], "num_inference_steps": 4}
        if second.unet.config.get("time_cond_proj_dim") is None:
            said["guidance_scale"] = 1.0  # one that takes the scale as an input has a default of its own
        heard = own_conditioning(second, said)
        branch = "cond" if "cond" in heard.whole else next(iter(heard.whole))
        return cls(second, family, heard.whole[branch], family.conditioning)

    def step(self, call: StepCall, x: Tensor, at: SignalNoise, times: tuple[int, ...] | None, ahead: int) -> tuple[Tensor, SignalNoise]:
        """What the image model says of the frames of x [n, c, (f,) h, w], and its level: all with the same noise, one after the other.

        Args:
            at: the level of the step that follows, of which the image model's is the nearest where ``times`` does not say it.
            ahead: number of that step.
        """
        pipe, frames = self.pipe, framewise(x)
        abar = pipe.scheduler.alphas_cumprod.to(x.device, torch.float32)
        if times is None:
            t = nearest_level(abar, at.a, at.s)
        else:
            t = torch.tensor(at_step(times, ahead - 1), device=x.device)
        level = SignalNoise(abar[t].sqrt(), (1 - abar[t]).sqrt())
        kind = known_kind(self.family, pipe.scheduler)
        noise = None
        found = []
        with unhooked():
            for frame in frames:
                z = to_latents(pipe, self.family, frame, float32=needs_float32(pipe)).float()
                if noise is None:
                    noise = randn_tensor(z.shape, generator=call.generator, device=z.device, dtype=torch.float32)
                noisy = level.a * z + level.s * noise
                said = ask(self.family, pipe.unet, self.arguments(noisy.to(pipe.unet.dtype), t)).float()
                z0 = clean_estimate(noisy, said, level, kind)
                found.append(to_pixels(pipe, self.family, z0, {}, float32=needs_float32(pipe)).float())
        call.count("image", len(frames))
        return joined(found, x), level

    def arguments(self, noisy: Tensor, t: Tensor) -> dict[str, Any]:
        """For the denoiser: the kept ones, with as many rows as there are samples."""
        n = len(noisy)

        def rows(value: Any) -> Any:
            if isinstance(value, dict):
                return {key: rows(each) for key, each in value.items()}
            if isinstance(value, Tensor) and value.ndim and len(value) != n:
                return value.repeat_interleave(n // len(value), 0)
            return value

        kept = {name: rows(value) if name in self.conditioning else value for name, value in self.asked.items()}
        return {**kept, self.family.sample: noisy, self.family.timestep: t}
