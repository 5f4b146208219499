"""Bottleneck Sampling: full resolution at both ends of the denoising, low resolution in its middle (Tian et al., arXiv 2503.18940).

A run becomes K calls of the pipeline, one a stage, at the stage's size and with a schedule of its own that ends in the clean sample.
Between two of them that sample is resized and noised again to the next stage's strength (see :mod:`.method`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffgraft import (
    Call,
    ConfigError,
    ControlCall,
    DenoiseCall,
    Effects,
    Family,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
    Unsupported,
)
from diffgraft.methods.inputs import parameters
from diffgraft.methods.predictions import KINDS, levels_at, prediction_kind
from diffusers.utils.torch_utils import randn_tensor
from pydantic import Field, model_validator
from torch import Tensor
from typing_extensions import Self

from diffgraft_bottleneck_sampling import method

__version__ = "0.1.0"
__all__ = ["BottleneckSampling", "BottleneckSamplingConfig"]

MICRO_CONDITIONING = ("original_size", "target_size", "crops_coords_top_left")
"""Call arguments that are sizes or places in pixels (SDXL), each also with ``negative_`` before it."""

OF_THE_WHOLE_RUN = {
    "denoising_end": (None,),
    "control_guidance_start": (None, 0),
    "control_guidance_end": (None, 1),
    "skip_guidance_layers": (None,),
}
"""Call arguments that pipelines count in fractions of the steps they see, which here are a stage's, and the values that say nothing."""

PRESETS: dict[str, dict[str, tuple[float, ...]]] = {
    "flux": {"scales": (1, 0.5, 1), "shares": (6, 20, 8), "strengths": (1, 0.8, 0.6), "shifts": (9, 6, 9)},
    "hunyuan_video": {"scales": (1, 0.75, 1), "shares": (4, 24, 16), "strengths": (1, 0.8, 0.7), "shifts": (7, 9, 9)},
}
"""The paper's settings: FLUX.1-dev 1024 / 512 / 1024, HunyuanVideo 720x1280 / 544x960 / 720x1280."""

OF_A_STAGE = ("scales", "shares", "strengths", "shifts")


class BottleneckSamplingConfig(PluginConfig):
    """Knobs of :class:`BottleneckSampling`. What a stage is (:data:`OF_A_STAGE`) is the preset's unless given."""

    preset: Literal["flux", "hunyuan_video"] = Field("flux", description="the paper's settings for these models, for the next four")
    scales: tuple[float, ...] | None = Field(
        None,
        min_length=1,
        description="(h_i, w_i) of stage i as a share of the sides asked for, 0 < scale <= 1, one a stage; the last is 1",
    )
    shares: tuple[float, ...] | None = Field(
        None, min_length=1, description="N_1 : N_2 : ... of the steps asked for, one a stage, > 0; only their ratios count"
    )
    strengths: tuple[float, ...] | None = Field(
        None, min_length=1, description="w_i, from how much noise stage i begins, 0 < w <= 1, one a stage; the first is 1"
    )
    shifts: tuple[float, ...] | Literal["own"] | None = Field(
        None,
        description="s_i, the timestep shift of stage i in the place of the scheduler's, > 0; own = as the scheduler shifts at the stage's "
        "size; models that are no flows have none",
    )
    strength_of: Literal["time", "sigma"] = Field(
        "time", description="what w_i is: the time before the shift (image to image's strength), or the level sigma after it (flow models)"
    )
    runs: Literal["part", "whole"] = Field(
        "part",
        description="steps of stage i: those of a whole run of N_i that lie below w_i, N_i w_i of them where w_i is a time (part), or N_i, "
        "all below w_i (whole)",
    )
    resampling: Literal["lanczos", "bicubic", "bilinear", "box"] = Field(
        "lanczos", description="how the clean latents are resized between two stages; widened when reducing, so that nothing aliases"
    )
    multiple: int | None = Field(
        None, ge=1, description="stage sizes are rounded to multiples of this many pixels; none = what VAE and patches need"
    )

    def of_stages(self, name: str) -> Any:
        """A knob of :data:`OF_A_STAGE` as given, or the preset's."""
        given = getattr(self, name)
        return PRESETS[self.preset][name] if given is None else given

    @model_validator(mode="after")
    def _fit(self) -> Self:
        values = {name: value for name in OF_A_STAGE if (value := self.of_stages(name)) != "own"}
        if len({len(value) for value in values.values()}) > 1:
            stages = ", ".join(f"{name} {len(value)}" for name, value in values.items())
            raise ValueError(
                f"numbers of stages: {stages}: give each one value a stage (what is not given is that of preset {self.preset!r})"
            )
        scales, strengths = values["scales"], values["strengths"]
        if not all(0 < scale <= 1 for scale in scales) or scales[-1] != 1:
            raise ValueError(f"scales = {scales}: each must be > 0 and <= 1, and the last 1 (the size that is asked for)")
        if not all(0 < w <= 1 for w in strengths) or strengths[0] != 1:
            raise ValueError(f"strengths = {strengths}: each must be > 0 and <= 1, and the first 1 (the run begins from noise alone)")
        for name in ("shares", "shifts"):
            if not all(0 < value < math.inf for value in values.get(name, ())):
                raise ValueError(f"{name} = {values[name]}: each must be > 0")
        if self.strength_of == "sigma" and self.shifts == "own":
            raise ValueError(
                "strength_of = 'sigma' with shifts = 'own': only under shifts s_i is it known which time a level has; give them"
            )
        return self


@dataclass(frozen=True)
class Stage:
    """One stage of a run: its size in pixels (height, width), the time t it begins at, shift s (None: the scheduler's own) and steps."""

    size: tuple[int, int]
    t: float
    s: float | None
    made: int
    """Steps that the scheduler is asked for."""
    run: int
    """The last so many of them are run."""
    told: int
    """Steps that the pipeline is told: two where it is one, as PixArt takes one step for another method and asks that of its scheduler."""


@dataclass
class Progress:
    """Where a run is: its stage, and what the stage begins from. Tensors are in the layout of the pipeline's latents."""

    stage: int = 0
    stages: tuple[Stage, ...] = ()
    x0: Tensor | None = None
    """The clean sample at the size of the stage, until its first step is done."""
    eps: Tensor | None = None
    start: Tensor | None = None
    """x0 with eps at the stage's first level: what its first step really begins from."""

    @property
    def now(self) -> Stage:
        return self.stages[self.stage]


class BottleneckSampling(Plugin):
    """High-low-high denoising (see :mod:`.method`)."""

    name = "bottleneck_sampling"
    paper = Paper(
        title="Training-free Diffusion Acceleration with Bottleneck Sampling",
        arxiv="2503.18940",
        implemented="K stages of their own resolution, strength, number of steps and timestep shift, with the authors' settings; noise "
        "re-introduction between them; flow models as in the paper, epsilon, v and sample models too",
        omitted="image to image and inpainting",
        licence="written from the paper's description; official code not seen",
    )
    families = ("sd", "latent_consistency", "sdxl", "animatediff", "pixart", "cogvideox", "sd3", "flux", "qwen_image", "wan", "ltx")
    not_on: ClassVar[dict[str, str]] = dict.fromkeys(
        ("*Img2Img*", "*Depth2Img*", "*Inpaint*", "*VideoToVideo*", "*SparseControlNet*", "PIA*"),
        "it starts from a given picture, which belongs to one size; use the text-to-image pipeline",
    )
    Config = BottleneckSamplingConfig
    State = Progress
    neutral: ClassVar[dict[str, Any]] = {"scales": (1.0,), "shares": (1.0,), "strengths": (1.0,), "shifts": "own"}
    # LTX takes multiples of 32 pixels only, whatever its VAE
    active: ClassVar[dict[str, Any]] = {
        "scales": (1.0, 0.5, 1.0), "shares": (1.0, 2.0, 1.0), "strengths": (1.0, 0.8, 0.6), "shifts": None, "multiple": 32,
    }  # fmt: skip
    effects = Effects(edits=frozenset({"schedule", "latents", "resolution"}), stochastic=True)
    tune: ClassVar[dict[str, Any]] = {"preset": ("flux", "hunyuan_video"), "strengths": ((1.0, 0.8, 0.6), (1.0, 0.6, 0.3))}
    config: BottleneckSamplingConfig

    # refusals -------------------------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        self._ensure_supported(target.pipe, target.family)

    def _ensure_supported(self, pipe: Any, family: Family) -> None:
        """Raises Unsupported, with the reason and the way out, where the pipeline or its scheduler cannot run in stages."""
        known, scheduler, kind = parameters(pipe), pipe.scheduler, prediction_kind(family, pipe.scheduler)
        name, knobs, why = type(scheduler).__name__, self.config, None
        if self.is_neutral:
            return
        if kind != "flow" and isinstance(knobs.shifts, tuple):
            why = f"shifts are those of flow models, and this one predicts {kind}; set shifts to none"
        elif kind != "flow" and knobs.strength_of == "sigma":
            why = f"strength_of = 'sigma' is that of flow models, and this one predicts {kind}; use 'time'"
        elif missing := [key for key in ("height", "width", "latents") if key not in known]:
            why = f"{type(pipe).__name__} takes no {', '.join(missing)}, so a stage cannot have a size of its own"
        elif pipe.config.get("expand_timesteps") and "image" in known:
            why = "this pipeline puts the start picture into the latents themselves, which the transitions would noise"
        elif kind not in KINDS:
            why = f"prediction_type {kind!r} of {name} is not one of {', '.join(KINDS)}"
        elif hasattr(scheduler, "sigmas_interpol") or hasattr(scheduler, "order_list"):  # KDPM2, single-step DPM++
            why = f"{name} keeps a plan of the whole schedule, which cannot be cut; use DDIM, Euler, Heun, DPM++ (multistep) or UniPC"
        elif is_plms(scheduler) and not scheduler.config.skip_prk_steps:
            why = f"{name} with skip_prk_steps=False begins with Runge-Kutta steps, which cannot be cut; set it True or use DDIM"
        elif kind != "flow" and getattr(scheduler, "sigmas", None) is None and getattr(scheduler, "alphas_cumprod", None) is None:
            why = f"{name} has neither sigmas nor alphas_cumprod, so the noise level of a step is not known; use DDIM, Euler or DPM++"
        if why:
            raise Unsupported(f"bottleneck_sampling: {why}")

    # one call of the pipeline a stage -----------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        if self.is_neutral:
            return next(call)
        self._ensure_supported(call.pipe, call.family)  # again: the scheduler may be another one now
        refuse_what_belongs_to_one_schedule(call)
        grid = Grid.of(call)
        progress = call.shared
        progress.stages = self._stages(call, grid)
        progress.x0 = progress.eps = progress.start = None
        last = len(progress.stages) - 1
        for number, stage in enumerate(progress.stages):
            if call.stopped and number < last:
                continue
            progress.stage = number
            changes: dict[str, Any] = {"num_inference_steps": stage.told}
            if stage.size != grid.full:
                changes |= at_size(call, stage.size, grid.full)
            if "use_resolution_binning" in parameters(call.pipe):
                changes["use_resolution_binning"] = False  # it would undo the stage's size
            if number:
                changes["latents"] = progress.x0  # of the right shape, so that no noise is drawn; `denoise` puts in the real start
            if number == last:
                result = next(call.replace(**changes))
                if not call.stopped:
                    self._explain(call)
                return result
            x0 = next(call.replace(**changes, output_type="latent", return_dict=False))[0]
            following = progress.stages[last if call.stopped else number + 1]  # what the user stopped is shown as it is, not by detours
            self._change_size(call, x0, grid, stage.size, following.size)

    def _stages(self, call: RunCall, grid: Grid) -> tuple[Stage, ...]:
        """The stages of this run.

        Raises:
            ConfigError: fewer steps than stages, or a stage would be smaller than the smallest picture.
            Unsupported: latents were given for another size than the first stage's.
        """
        knobs, T = self.config, steps_asked_for(call)
        shares, strengths, shifts = (knobs.of_stages(name) for name in OF_A_STAGE[1:])
        flow = prediction_kind(call.family, call.pipe.scheduler) == "flow"
        if shifts == "own" or not flow:
            shifts = (None,) * len(shares)
        try:
            counts = method.stage_steps(T, shares)
        except ValueError as error:
            raise ConfigError(f"plugin 'bottleneck_sampling': shares = {shares}: {error}; use more steps") from None
        stages = []
        for size, N, w, s in zip(self._sizes(call, grid), counts, strengths, shifts, strict=True):
            t = method.time_of(w, s) if s is not None and knobs.strength_of == "sigma" else w
            run = method.rounded(N * t) if knobs.runs == "part" else N
            made = run if s is not None else N if knobs.runs == "part" else method.rounded(N / t)
            stages.append(Stage(size, t, s, made, run, made if flow else max(made, 2)))
        return tuple(stages)

    def _sizes(self, call: RunCall, grid: Grid) -> tuple[tuple[int, int], ...]:
        """(height, width) of each stage in pixels."""
        multiple = math.lcm(self.config.multiple or 1, grid.factor * grid.patch)
        (height, width), scales = grid.full, self.config.of_stages("scales")
        sizes: list[tuple[int, int]] = []
        for number, scale in enumerate(scales, 1):
            size = method.stage_side(height, scale, multiple), method.stage_side(width, scale, multiple)
            if scale == 1:
                size = grid.full
            if 0 in size:
                raise ConfigError(
                    f"plugin 'bottleneck_sampling': scales = {scales}: stage {number} cannot have {scale:g} times "
                    f"{height} x {width} pixels, sizes are multiples of {multiple}; use a larger scale or a larger picture"
                )
            sizes.append(size)
        if call.get("latents") is not None and sizes[0] != grid.full:
            raise Unsupported(
                f"bottleneck_sampling: latents were given, and the first stage has another size (scales = {scales}); let it begin with 1"
            )
        return tuple(sizes)

    def _change_size(self, call: RunCall, x0: Tensor, grid: Grid, old: tuple[int, int], new: tuple[int, int]) -> None:
        """Resize the sample that a stage has ended in, and draw the noise of the next one."""
        progress, here, there = call.shared, grid.latents(old), grid.latents(new)
        maps = method.unpack(x0, *here, grid.patch) if grid.packed else x0
        if here != there:
            maps = method.resize(maps, *there, self.config.resampling)
        eps = randn_tensor(maps.shape, generator=call.get("generator"), device=maps.device, dtype=torch.float32)
        progress.eps = method.pack(eps, grid.patch) if grid.packed else eps
        progress.x0 = method.pack(maps, grid.patch) if grid.packed else maps

    def _explain(self, call: RunCall) -> None:
        stages = call.shared.stages
        parts = ", ".join(f"{stage.run} at {stage.size[1]} x {stage.size[0]}" for stage in stages)
        share = method.work([stage.run for stage in stages], [math.prod(stage.size) for stage in stages], steps_asked_for(call))
        call.note(f"steps: {parts} pixels; pixels x steps are {share:.0%} of the plain run's")

    # inside a stage -------------------------------------------------------------------------------------------------------------------

    def schedule(self, call: ScheduleCall, next: Callable[[ScheduleCall], Schedule]) -> Schedule:
        """The stage's own schedule, from its strength to the clean sample."""
        if self.is_neutral:
            return next(call)
        stage, scheduler = call.shared.now, call.scheduler
        if stage.told != stage.made:
            call = call.replace(num_inference_steps=stage.made)
        whole = next(call)
        timesteps, sigmas = whole
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks the first timestep up by value, and a repeated one leads to the second place
        if stage.s is not None and sigmas is not None:
            levels = method.stage_sigmas(stage.t, stage.s, stage.run).to(sigmas)
            levels[0] = torch.minimum(levels[0], sigmas[0])  # UniPC begins just below 1, where its logarithms are finite
            levels[-1] = sigmas[-1]
            levels = torch.cat([levels[:1], levels[1:-1].repeat_interleave(scheduler.order), levels[-1:]])
            t = levels[:-1] * scheduler.config.num_train_timesteps
            return Schedule(t.to(timesteps.device, timesteps.dtype), levels)
        if stage.run == stage.made:
            return whole
        if is_plms(scheduler):
            return Schedule(plms_tail(timesteps, stage.run), sigmas)
        begin = scheduler.order * (stage.made - stage.run)
        part = timesteps[begin:].data  # `.data`: a view would keep the whole schedule's tensor alive with it
        return Schedule(part, None if sigmas is None else sigmas[begin:].data)

    def control(self, call: ControlCall, next: Callable[[ControlCall], Any]) -> Any:
        """A ControlNet is asked before the denoiser; it must see what the stage begins from too."""
        if self._begins(call):
            start, given = self._start(call), call[call.family.sample]
            x = torch.cat([start] * (given.numel() // start.numel()))  # guidance copies
            if call.run.scale_model_input is not None:
                x = call.run.scale_model_input(x, call.step.t)
            x = x.transpose(1, 2).flatten(0, 1) if start.ndim == 5 else x  # a video's frames are its batch
            call = call.replace(**{call.family.sample: x.to(given.dtype)})
        return next(call)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        return next(call.with_latents(self._start(call)) if self._begins(call) else call)

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        if self.is_neutral:
            return next(call)
        progress = call.shared
        height, width = progress.now.size
        call.count(f"steps of stage {progress.stage + 1} ({width}x{height})")
        if self._begins(call):
            call = call.replace(sample=self._start(call))
            progress.x0 = progress.eps = progress.start = None
        return next(call)

    def _begins(self, call: Call) -> bool:
        """Whether this is the first step of a stage that begins from an earlier one's sample."""
        return call.shared.x0 is not None and call.step.call == 0

    def _start(self, call: Call) -> Tensor:
        """x0 and eps at the noise level of the stage's first step."""
        progress = call.shared
        if progress.start is None:
            a, sigma = levels_at(call.family, call.pipe.scheduler, call.step.t, call.step.sigma, progress.x0.device)
            progress.start = method.renoised(progress.x0, progress.eps, a, sigma)
        return progress.start  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Grid:
    """How pixels become latents: ``full`` size (height, width) in pixels, ``factor`` of the VAE, ``patch`` of latents in a token."""

    full: tuple[int, int]
    factor: int
    patch: int
    packed: bool

    @classmethod
    def of(cls, call: RunCall) -> Grid:
        """From the pipeline's parts and the call's arguments, with the pipeline's own defaults."""
        pipe, family = call.pipe, call.family
        config = next(model for name in family.denoisers if (model := getattr(pipe, name, None)) is not None).config
        names = ("vae_scale_factor", "vae_scale_factor_spatial", "vae_spatial_compression_ratio")
        factor = next(getattr(pipe, name) for name in names if hasattr(pipe, name))
        packed = family.latents == "packed"
        if packed:  # two by two latent pixels in a token, where the pipeline does not say something else (LTX)
            patch = getattr(pipe, "transformer_spatial_patch_size", 2)
        else:
            sizes = config.get("patch_size") or 1
            patch = sizes if isinstance(sizes, int) else sizes[-1]
        usual: Any = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
        usual = usual or (config.get("sample_height"), config.get("sample_width"))
        sides = []
        for i, name in enumerate(("height", "width")):
            given = call.get(name) or parameters(pipe)[name].default
            side = given or (usual if isinstance(usual, int) else usual[i]) * factor
            sides.append(side // (factor * patch) * factor * patch if packed else side)
        return cls((sides[0], sides[1]), factor, patch, packed)

    def latents(self, size: tuple[int, int]) -> tuple[int, int]:
        """(h, w) of the latents of a picture of ``size`` pixels."""
        return size[0] // self.factor, size[1] // self.factor


def at_size(call: RunCall, size: tuple[int, int], full: tuple[int, int]) -> dict[str, Any]:
    """The call's arguments for a smaller size: height, width, and what else the user gave in pixels, in proportion."""
    changes: dict[str, Any] = {"height": size[0], "width": size[1]}
    for name in (prefix + name for prefix in ("", "negative_") for name in MICRO_CONDITIONING):
        if (given := call.get(name)) is not None:
            changes[name] = tuple(round(value * size[i] / full[i]) for i, value in enumerate(given))
    return changes


def refuse_what_belongs_to_one_schedule(call: RunCall) -> None:
    """Raises Unsupported for arguments that mean a part of the whole run or its schedule, which no single call of the pipeline sees."""
    for key, harmless in OF_THE_WHOLE_RUN.items():
        value = call.get(key)
        if any(item not in harmless for item in (value if isinstance(value, (list, tuple)) else [value])):
            raise Unsupported(
                f"bottleneck_sampling: {key} = {value!r} is counted in fractions of the whole run, and every stage is a call of its own; "
                "leave it out"
            )
    for key in ("timesteps", "sigmas"):
        if call.get(key) is not None:
            raise Unsupported(
                f"bottleneck_sampling: {key} were given, and every stage has a schedule of its own: give num_inference_steps, and say what "
                "the stages are by shares, strengths and shifts"
            )


def steps_asked_for(call: RunCall) -> int:
    """``num_inference_steps`` of the call, or the pipeline's own."""
    return int(call.get("num_inference_steps") or parameters(call.pipe)["num_inference_steps"].default)


def is_plms(scheduler: Any) -> bool:
    """Whether the scheduler is a pseudo linear multistep one: its second timestep is there twice."""
    return hasattr(scheduler, "plms_timesteps")


def plms_tail(timesteps: Tensor, n: int) -> Tensor:
    """The last ``n`` steps of a PLMS schedule t_0 t_1 t_1 t_2 ...: its solver starts with a repeated timestep, so a tail does.

    Written into the scheduler's own fresh tensor: only a part of that keeps the scheduler's step size.
    """
    if n == 1:
        return timesteps[-1:].data
    distinct = torch.cat([timesteps[:1], timesteps[2:]])[-n:]
    part = timesteps[-n - 1 :].data
    part.copy_(torch.cat([distinct[:2], distinct[1:]]))
    return part
