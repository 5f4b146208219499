"""Bottleneck Sampling: full resolution at both ends of the denoising, low resolution in its middle (Tian et al., arXiv 2503.18940).

A run becomes K calls of the pipeline, one a stage, at the stage's size and with its part of the schedule. Between two of them the estimate
of the clean sample is resized and noised again to the level at which the next stage begins (see :mod:`.method`).
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
from diffgraft.methods.predictions import KINDS, clean_estimate, levels_at, noise_estimate, prediction_kind
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


class BottleneckSamplingConfig(PluginConfig):
    """Knobs of :class:`BottleneckSampling`."""

    scales: tuple[float, ...] = Field(
        (1.0, 0.5, 1.0),
        min_length=1,
        description="(h_i, w_i) of stage i as a share of the sides asked for, 0 < scale <= 1, one a stage; the last is 1",
    )
    shares: tuple[float, ...] = Field(
        (4.0, 12.0, 5.0),
        min_length=1,
        description="N_1 : N_2 : ... of the steps, one a stage, > 0; only their ratios count",
    )
    shifts: tuple[float, ...] | None = Field(
        None,
        description="s_i, the timestep shift of stage i, > 0, flow models only; on top of what the scheduler does itself at the stage's "
        "size; none = all 1",
    )
    resampling: Literal["lanczos", "bicubic", "bilinear", "box"] = Field(
        "lanczos", description="how the clean latents are resized between two stages; widened when reducing, so that nothing aliases"
    )
    noise: Literal["fresh", "implied"] = Field(
        "fresh",
        description="eps of the noise re-introduction: 'fresh' from the call's generator (paper), or 'implied' by the last step (only "
        "where all scales are 1: then the stages are one solver's run cut in pieces)",
    )
    multiple: int | None = Field(
        None, ge=1, description="stage sizes are rounded to multiples of this many pixels; none = what VAE and patches need"
    )

    @model_validator(mode="after")
    def _fit(self) -> Self:
        K = len(self.scales)
        shifts = (1.0,) * K if self.shifts is None else self.shifts
        if len(self.shares) != K or len(shifts) != K:
            raise ValueError(f"scales has {K} stages, shares {len(self.shares)}, shifts {len(shifts)}: give each one value a stage")
        if not all(0 < scale <= 1 for scale in self.scales) or self.scales[-1] != 1:
            raise ValueError(f"scales = {self.scales}: each must be > 0 and <= 1, and the last 1 (the size that is asked for)")
        if not all(0 < value < math.inf for value in (*self.shares, *shifts)):
            raise ValueError(f"shares = {self.shares}, shifts = {self.shifts}: each must be > 0")
        if self.noise == "implied" and set(self.scales) != {1}:
            raise ValueError(f"noise = 'implied': the noise of one size says nothing at another, so scales = {self.scales} must all be 1")
        return self


@dataclass
class Progress:
    """Where a run is: its stage, and what the stage begins from. Tensors are in the layout of the pipeline's latents."""

    stage: int = 0
    sizes: tuple[tuple[int, int], ...] = ()
    steps: tuple[int, ...] = ()
    x0: Tensor | None = None
    """The clean estimate at the size of the stage, until its first step is done."""
    eps: Tensor | None = None
    start: Tensor | None = None
    """x0 with eps at the stage's first level: what its first step really begins from."""


class BottleneckSampling(Plugin):
    """High-low-high denoising (see :mod:`.method`)."""

    name = "bottleneck_sampling"
    paper = Paper(
        title="Training-free Diffusion Acceleration with Bottleneck Sampling",
        arxiv="2503.18940",
        implemented="K stages of their own resolution, part of the schedule and timestep shift; noise re-introduction at the transitions; "
        "flow models as in the paper, epsilon, v and sample models too",
        omitted="the authors' own settings (official code not available here: steps are those of the RALU paper's comparison); "
        "image to image and inpainting",
        licence="written from the paper's description; official code not seen",
    )
    families = ("sd", "latent_consistency", "sdxl", "animatediff", "pixart", "cogvideox", "sd3", "flux", "qwen_image", "wan", "ltx")
    Config = BottleneckSamplingConfig
    State = Progress
    neutral: ClassVar[dict[str, Any]] = {"scales": (1.0,), "shares": (1.0,), "shifts": None}
    # LTX takes multiples of 32 pixels only, whatever its VAE
    active: ClassVar[dict[str, Any]] = {"scales": (1.0, 0.5, 1.0), "shares": (1.0, 2.0, 1.0), "multiple": 32}
    effects = Effects(edits=frozenset({"schedule", "latents", "resolution"}), stochastic=True)
    tune: ClassVar[dict[str, Any]] = {
        "scales": ((1.0, 0.75, 1.0), (1.0, 0.5, 1.0)),
        "shares": ((6.0, 8.0, 7.0), (4.0, 12.0, 5.0)),
    }
    config: BottleneckSamplingConfig

    # refusals -------------------------------------------------------------------------------------------------------------------

    def check(self, target: Target) -> None:
        self._ensure_supported(target.pipe, target.family)

    def _ensure_supported(self, pipe: Any, family: Family) -> None:
        """Raises Unsupported, with the reason and the way out, where the pipeline or its scheduler cannot run in stages."""
        known, scheduler, kind = parameters(pipe), pipe.scheduler, prediction_kind(family, pipe.scheduler)
        name, why = type(scheduler).__name__, None
        if self.config.shifts is not None and kind != "flow":
            why = f"shifts are those of flow models, and this one predicts {kind}; set shifts to none"
        elif self._is_one_stage:
            return
        elif "strength" in known:
            why = f"{type(pipe).__name__} starts from a given picture, which belongs to one size; use the text-to-image pipeline"
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

    @property
    def _is_one_stage(self) -> bool:
        return len(self.config.scales) == 1

    def _shift(self, stage: int) -> float:
        return 1.0 if self.config.shifts is None else self.config.shifts[stage]

    # one call of the pipeline a stage -----------------------------------------------------------------------------------------------

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        if self._is_one_stage:
            return next(call)
        self._ensure_supported(call.pipe, call.family)  # again: the scheduler may be another one now
        refuse_fractions(call)
        grid = Grid.of(call)
        progress, last = call.shared, len(self.config.scales) - 1
        progress.sizes = self._sizes(call, grid)
        progress.x0 = progress.eps = progress.start = None
        progress.steps = ()
        for stage, size in enumerate(progress.sizes):
            progress.stage = stage
            changes: dict[str, Any] = {} if size == grid.full else at_size(call, size, grid.full)
            if "use_resolution_binning" in parameters(call.pipe):
                changes["use_resolution_binning"] = False  # it would undo the stage's size
            if stage:
                changes["latents"] = progress.x0  # of the right shape, so that no noise is drawn; `denoise` puts in the real start
            if stage == last:
                result = next(call.replace(**changes))
                self._explain(call)
                return result
            x0 = next(call.replace(**changes, output_type="latent", return_dict=False))[0]
            self._change_size(call, x0, grid, progress.sizes[stage + 1])

    def _sizes(self, call: RunCall, grid: Grid) -> tuple[tuple[int, int], ...]:
        """(height, width) of each stage in pixels.

        Raises:
            ConfigError: a stage would be smaller than the smallest picture.
            Unsupported: latents were given for another size than the first stage's.
        """
        multiple = math.lcm(self.config.multiple or 1, grid.factor * grid.patch)
        height, width = grid.full
        sizes: list[tuple[int, int]] = []
        for stage, scale in enumerate(self.config.scales):
            size = method.stage_side(height, scale, multiple), method.stage_side(width, scale, multiple)
            if scale == 1:
                size = grid.full
            if 0 in size:
                raise ConfigError(
                    f"plugin 'bottleneck_sampling': scales = {self.config.scales}: stage {stage + 1} cannot have {scale:g} times "
                    f"{height} x {width} pixels, sizes are multiples of {multiple}; use a larger scale or a larger picture"
                )
            sizes.append(size)
        if call.get("latents") is not None and sizes[0] != grid.full:
            raise Unsupported(
                f"bottleneck_sampling: latents were given, and the first stage has another size (scales = {self.config.scales}); "
                "let it begin with 1"
            )
        return tuple(sizes)

    def _change_size(self, call: RunCall, x0: Tensor, grid: Grid, size: tuple[int, int]) -> None:
        """Resize the estimate of the stage that has ended, and draw the noise of the next one."""
        progress = call.shared
        here, there = grid.latents(progress.sizes[progress.stage]), grid.latents(size)
        maps = method.unpack(x0, *here, grid.patch) if grid.packed else x0
        if here != there:
            maps = method.resize(maps, *there, self.config.resampling)
        if self.config.noise == "fresh":
            eps = randn_tensor(maps.shape, generator=call.get("generator"), device=maps.device, dtype=torch.float32)
            progress.eps = method.pack(eps, grid.patch) if grid.packed else eps
        progress.x0 = method.pack(maps, grid.patch) if grid.packed else maps

    def _explain(self, call: RunCall) -> None:
        progress = call.shared
        areas = [height * width for height, width in progress.sizes]
        stages = ", ".join(f"{n} at {w} x {h}" for n, (h, w) in zip(progress.steps, progress.sizes, strict=True))
        call.note(f"steps: {stages} pixels; pixels x steps are {method.work(progress.steps, areas):.0%} of as many full ones")

    # inside a stage -------------------------------------------------------------------------------------------------------------------

    def schedule(self, call: ScheduleCall, next: Callable[[ScheduleCall], Schedule]) -> Schedule:
        """The stage's part of the schedule that the scheduler makes at the stage's size, shifted by s_i."""
        whole = next(call)
        stage, scheduler = call.shared.stage, call.scheduler
        timesteps, sigmas = whole
        if (s := self._shift(stage)) != 1 and sigmas is not None:
            sigmas = method.shifted(sigmas, s)
            t = sigmas[: len(timesteps)] * scheduler.config.num_train_timesteps
            timesteps = t.to(timesteps.device, timesteps.dtype)
        if self._is_one_stage:
            return Schedule(timesteps, sigmas) if s != 1 else whole
        T = len(timesteps) - 1 if is_plms(scheduler) else -(-len(timesteps) // scheduler.order)
        try:
            ends = method.stage_ends(T, self.config.shares)
        except ValueError as error:
            raise ConfigError(f"plugin 'bottleneck_sampling': scales = {self.config.scales}: {error}; use more steps") from None
        begin, end = (0, *ends)[stage], ends[stage]
        call.shared.steps = (*call.shared.steps[:stage], end - begin)
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)  # else it looks the first timestep up by value, and a repeated one leads to the second place
        if is_plms(scheduler):
            return Schedule(plms_part(timesteps, begin, end), sigmas)
        begin, end = scheduler.order * begin, min(scheduler.order * end, len(timesteps))
        part = timesteps[begin:end].data  # `.data`: a view would keep the whole schedule's tensor alive with it
        return Schedule(part, None if sigmas is None else sigmas[begin : end + len(sigmas) - len(timesteps)].data)

    def control(self, call: ControlCall, next: Callable[[ControlCall], Any]) -> Any:
        """A ControlNet is asked before the denoiser; it must see what the stage begins from too."""
        if self._begins(call):
            start, given = self._start(call), call["sample"]
            x = torch.cat([start] * (given.numel() // start.numel()))  # guidance copies
            x = call.pipe.scheduler.scale_model_input(x, call.step.t)
            x = x.transpose(1, 2).flatten(0, 1) if start.ndim == 5 else x  # a video's frames are its batch
            call = call.replace(sample=x.to(given.dtype))
        return next(call)

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        return next(call.with_latents(self._start(call)) if self._begins(call) else call)

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        if self._is_one_stage:
            return next(call)
        progress, step = call.shared, call.step
        stage = progress.stage
        height, width = progress.sizes[stage]
        call.count(f"steps of stage {stage + 1} ({width}x{height})")
        if self._begins(call):
            call = call.replace(sample=self._start(call))
            progress.x0 = progress.eps = progress.start = None
        out = next(call)
        if stage == len(self.config.scales) - 1 or not step.is_last:
            return out
        x, output = call.sample.float(), call.model_output.float()
        kind = prediction_kind(call.family, call.scheduler)
        levels = levels_at(call.family, call.scheduler, step.t, step.sigma, x.device)
        if self.config.noise == "implied":
            progress.eps = noise_estimate(x, output, levels, kind)
        return StepOutput(clean_estimate(x, output, levels, kind).to(call.sample.dtype), out.x0)

    def _begins(self, call: Call) -> bool:
        """Whether this is the first step of a stage that begins from an earlier one's estimate."""
        return call.shared.x0 is not None and call.step.index == 0

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


def refuse_fractions(call: RunCall) -> None:
    """Raises Unsupported for arguments that mean a part of the whole run, which no single call of the pipeline sees."""
    for key, harmless in OF_THE_WHOLE_RUN.items():
        value = call.get(key)
        if any(item not in harmless for item in (value if isinstance(value, (list, tuple)) else [value])):
            raise Unsupported(
                f"bottleneck_sampling: {key} = {value!r} is counted in fractions of the whole run, and every stage is a call of its own; "
                "leave it out"
            )


def is_plms(scheduler: Any) -> bool:
    """Whether the scheduler is a pseudo linear multistep one: its second timestep is there twice."""
    return hasattr(scheduler, "plms_timesteps")


def plms_part(timesteps: Tensor, begin: int, end: int) -> Tensor:
    """Steps ``begin`` to ``end`` of a PLMS schedule t_0 t_1 t_1 t_2 ...: its solver starts with a repeated timestep, so each part does.

    Written into the scheduler's own fresh tensor: only a part of that keeps the scheduler's step size.
    """
    distinct = torch.cat([timesteps[:1], timesteps[2:]])[begin:end]
    part = timesteps[begin : begin + len(distinct) + (len(distinct) > 1)].data
    part.copy_(torch.cat([distinct[:2], distinct[1:]]) if len(distinct) > 1 else distinct)
    return part
