"""A pipeline's denoiser as a judge of (picture, prompt) pairs, without the pipeline's loop and past the plugins that are on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from diffgraft import ConfigError, Family, Step, Unsupported, denoisers_of, find_family, load_pipeline
from diffgraft.methods.conditioning import Listening, sibling, takes_pictures
from diffgraft.methods.decoding import ensure_decodes, to_latents
from diffgraft.methods.inputs import parameters
from diffgraft.methods.inversion import size_arguments
from diffgraft.methods.predictions import known_kind, prediction_kind
from diffgraft.methods.variants import own_size
from torch import Tensor

from diffgraft_diffusion_classifier.method import Level, error, flow_schedule, late, noised, spread, target, vp_schedule, weighting

if TYPE_CHECKING:
    from diffgraft_diffusion_classifier import DiffusionClassifier, DiffusionClassifierConfig

NAME = "diffusion_classifier"
Size = tuple[int, int]


class Errors(NamedTuple):
    """What was measured.

    values    err_t [pairs, T] (of :meth:`DiffusionClassifier.errors` [pictures, prompts, T]), float32, on the CPU
    times     of the T levels, in the scheduler's numbers
    forwards  of the denoiser that it took, each of up to ``batch`` pairs
    """

    values: Tensor
    times: tuple[float, ...]
    forwards: int


def ensure_scores(pipe: Any, family: Family) -> None:
    """Refuse a pipeline whose denoiser cannot be asked about pictures.

    Raises:
        Unsupported: with the reason.
    """
    name, scheduler = type(pipe).__name__, pipe.scheduler
    ensure_decodes(pipe, family)
    kind = known_kind(family, scheduler)
    if kind != "flow" and getattr(scheduler, "alphas_cumprod", None) is None:
        raise Unsupported(
            f"{NAME}: {type(scheduler).__name__} has no alphas_cumprod, so the levels that {name} was trained on are not known"
        )


def why_not_now(pipe: Any) -> str | None:
    """Why prompts alone cannot be scored by the pipeline as it is."""
    denoisers = denoisers_of(pipe, find_family(type(pipe))).values()
    if any(map(takes_pictures, denoisers)):
        return "an IP-Adapter is loaded, so that its denoiser wants a picture beside each prompt: pipe.unload_ip_adapter() first"
    if any(getattr(denoiser, "is_cache_enabled", False) for denoiser in denoisers):
        return "a cache of diffusers itself is on, which would answer with the features of another prompt: disable_cache() first"
    return None


def where(config: DiffusionClassifierConfig, family: Family, scheduler: Any) -> tuple[list[Level], Tensor]:
    """(the levels at which errors are measured, of the schedule that the model was trained on, least noise first; w_t [T]).

    Raises:
        ConfigError: the schedule has not so many levels, or other weights are given than there are levels.
    """
    knows, kind = scheduler.config, prediction_kind(family, scheduler)
    number = int(knows.get("num_train_timesteps", 1000))
    margin = config.margin if config.margin is not None else (2 if kind == "flow" else 1) * number // 100
    if config.timesteps > number // 2 or 2 * margin >= number:
        raise ConfigError(
            f"plugin {NAME!r}: timesteps = {config.timesteps} with margin = {margin}: the schedule has {number} levels; give at most "
            f"{number // 2} timesteps, and leave some levels between the margins"
        )
    if kind == "flow":  # a shift that follows from the size of the picture is one of sampling
        shift = 1.0 if knows.get("use_dynamic_shifting") else knows.get("shift", knows.get("flow_shift")) or 1.0
        schedule = flow_schedule(number, shift)
    else:
        schedule = vp_schedule(scheduler.alphas_cumprod.double().tolist())
    levels = late(schedule, config.timesteps) if config.window == "late" else spread(schedule, config.timesteps, margin)
    if isinstance(config.weights, str):
        return levels, weighting(config.weights, levels, kind)
    if len(config.weights) != len(levels):
        raise ConfigError(
            f"plugin {NAME!r}: weights = {len(config.weights)} numbers, but errors are measured at {len(levels)} levels "
            f"(timesteps = {config.timesteps}, window = {config.window!r}): give one for each, least noise first"
        )
    return levels, torch.tensor(config.weights)


def size_of(pipe: Any, family: Family, given: Size | None) -> Size:
    """Height and width of the pictures that are scored.

    Raises:
        ConfigError: they are not known, or the pipeline's latents have no such size.
    """
    found = given or own_size(pipe)
    if found is None:
        raise ConfigError(f"plugin {NAME!r}: {type(pipe).__name__} does not say how large its pictures are: give size = (height, width)")
    multiple = pipe.vae_scale_factor * (2 if family.latents == "packed" else 1)
    if any(side < 1 or side % multiple for side in found):
        raise ConfigError(
            f"plugin {NAME!r}: size = {found}: height and width of {type(pipe).__name__}'s pictures are multiples of {multiple}"
        )
    return found


class Scorer:
    """Measures with the denoiser of ``pipe``, by a pipeline of the same parts without its other plugins; ``pipe`` may be running.

    Args:
        size: height and width of the pictures; by default those of the plugin's knob, or that the pipeline makes.

    Raises:
        ConfigError, Unsupported: before anything runs.
    """

    def __init__(self, pipe: Any, plugin: DiffusionClassifier, size: Size | None = None) -> None:
        if why := why_not_now(pipe):
            raise Unsupported(f"{NAME}: {why}")
        self.config = config = plugin.config
        self.pipe = load_pipeline(sibling(pipe), [plugin])  # checked as at every pipeline that it is put on
        self.family: Family = self.pipe.plugins.family
        self.kind = prediction_kind(self.family, pipe.scheduler)
        self.levels, self.weights = where(config, self.family, pipe.scheduler)
        self.size = size_of(self.pipe, self.family, size or config.size)
        self.listening = Listening(pipe)
        self.device = self.pipe._execution_device
        self.forwards = 0

    @torch.no_grad()
    def latents(self, pixels: Tensor) -> Tensor:
        """Clean latents [pictures, ...] of pixels [pictures, 3, height, width] in -1 to 1: the mode of the autoencoder's posterior."""
        parts = [to_latents(self.pipe, self.family, part.to(self.device)) for part in pixels.split(self.config.batch)]
        return torch.cat(parts).float()

    def arguments(self, prompts: Sequence[str]) -> dict[str, Any]:
        """Of a call that hands these prompts to the denoiser, without guidance."""
        own = self.family.guidance.scale
        # a model that was distilled from guidance is told a scale of its own
        told = {"guidance_scale": self.config.guidance} if own != "guidance_scale" and "guidance_scale" in parameters(self.pipe) else {}
        return {**size_arguments(self.pipe, self.size), **told, own: 1.0, "prompt": list(prompts)}

    @torch.no_grad()
    def errors(self, latents: Tensor, pairs: Sequence[tuple[int, str]]) -> Tensor:
        """err_t [pairs, T] of (row of ``latents``, prompt) pairs, on the CPU. The memory follows from ``batch``, not from their number."""
        generator = torch.Generator().manual_seed(self.config.seed)
        bank = torch.randn(len(self.levels), *latents.shape[1:], generator=generator)  # the same for all pictures and prompts
        rows = []
        for begin in range(0, len(pairs), self.config.batch):
            part = pairs[begin : begin + self.config.batch]
            z = latents[[i for i, _ in part]].to(self.device)
            asked = self.listening.conditioning(self.arguments([prompt for _, prompt in part])).whole["cond"]
            rows.append(self.errors_of(z, bank, asked).cpu())
        return torch.cat(rows) if rows else latents.new_zeros(0, len(self.levels)).cpu()

    def errors_of(self, z: Tensor, bank: Tensor, asked: Mapping[str, Any]) -> Tensor:
        """err_t [rows, T] of one batch; ``asked`` is the denoiser's call."""
        sample, timestep = asked[self.family.sample], asked[self.family.timestep]
        found = []
        with self.pipe.plugins.session() as session:
            for index, (level, drawn) in enumerate(zip(self.levels, bank, strict=True)):
                noise = drawn.to(self.device, non_blocking=True)[None]
                told = torch.full_like(timestep, self.family.told(level.t))
                session.at(Step(index=index, total=len(self.levels), t=told, sigma=None))
                arguments = {self.family.sample: noised(z, noise, level).to(sample.dtype), self.family.timestep: told}
                prediction = session.predict({**asked, **arguments})
                found.append(error(prediction, target(self.kind, z, noise, level), self.config.norm))
        self.forwards += sum(session.report.forwards.values())
        return torch.stack(found, 1)

    def scores(self, latents: Tensor, prompts: Sequence[str]) -> Tensor:
        """How well each prompt describes its picture [pictures], the larger the better."""
        pairs = [*enumerate(prompts), *([(i, "") for i in range(len(prompts))] if self.config.relative else [])]
        errors = (self.errors(latents, pairs) * self.weights).mean(-1)
        return errors[len(prompts) :] - errors[: len(prompts)] if self.config.relative else -errors
