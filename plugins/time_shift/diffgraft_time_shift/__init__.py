"""Time-Shift Sampler: tell the denoiser the time that the sample's variance belongs to, instead of the scheduler's nominal one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from diffgraft import Call, DenoiseCall, Effects, Family, Paper, Plugin, PluginConfig, RunCall, StepCall, StepOutput, Target, Unsupported
from diffgraft.methods.predictions import SignalNoise, clean_estimate, noise_estimate, prediction_kind
from pydantic import Field, field_validator
from torch import Tensor

from diffgraft_time_shift import method
from diffgraft_time_shift.method import UNINFORMATIVE, Levels

__version__ = "0.1.0"
__all__ = ["TimeShift", "TimeShiftConfig"]


class TimeShiftConfig(PluginConfig):
    """Knobs of :class:`TimeShift`."""

    window: int = Field(
        default=30,
        ge=0,
        description="w: t_s is searched in [t-w/2, t+w/2] around the nominal next time; in training timesteps; 0 = no shift "
        "(official code: 5 to 30)",
    )
    cutoff: float = Field(
        default=300,
        ge=0,
        description="t_c: only after steps at t > t_c; in training timesteps (0 ... T); T or more = no shift (official code: 300 to 900)",
    )
    mode: Literal["network", "target"] = Field(
        default="network",
        description="'network': t_s is the denoiser's time at the next step (paper); 'target': t_s is the time that the DDIM transfer goes "
        "to, the denoiser's time stays nominal (official DDIM sampler)",
    )
    data_variance: float | None = Field(
        default=None,
        ge=0,
        le=UNINFORMATIVE,
        description="sigma_d^2: variance of the clean data over all dimensions of a sample, 0 to 0.8; 0 = the paper's criterion "
        "(v - (1 - abar))^2; none or 'auto' = bounded during the run from the x_0 estimates",
    )

    @field_validator("data_variance", mode="before")
    @classmethod
    def _auto(cls, value: Any) -> Any:
        return None if value == "auto" else value


@dataclass
class TimeShiftState:
    """Kept in one run. [B] = one entry a sample, without guidance copies."""

    t_previous: Tensor | None = None
    """t of the scheduler step that made the present sample, 0-dim."""
    shape: torch.Size | None = None
    """Shape of x in the denoiser's layout, without what the pipeline appends to it."""
    levels: Levels | None = None
    offset: Tensor | None = None
    """k [B] of this step, once it is known: every branch gets the same."""
    bounds: tuple[Tensor, Tensor] | None = None
    """Lower and upper bound of sigma_d^2 [B] from the latest x_0 estimate."""
    sums: Tensor | None = None
    """Over samples and steps [5]: considered (t > t_c), informative, shifted, shifted to the window's edge, sum of k."""


class TimeShift(Plugin):
    """Feed the denoiser ``t_s = argmin_tau (Var(x) - Var_model(tau))^2`` instead of the nominal time (see :mod:`.method`)."""

    name = "time_shift"
    paper = Paper(
        title="Alleviating Exposure Bias in Diffusion Models through Sampling with Shifted Time Steps",
        arxiv="2305.15583",
        implemented="per sample, the time whose model variance is nearest to the sample's variance replaces the nominal one: in the "
        "denoiser (mode 'network') or as the target of the DDIM transfer (mode 'target'); also for data variance sigma_d^2 and flow models",
        omitted="target mode for anything but DDIM: the official F-PNDM and S-PNDM (the paper's headline FID), DDPM, DPM-Solver (it "
        "takes the variance of the predicted noise); the window of +-w of DEIS",
        licence="official code Apache-2.0; written from the paper's description",
    )
    families = (
        *("pixel", "sd", "sdxl", "animatediff", "dit", "pixart", "cogvideox"),
        *("sd3", "flux", "flux_fill", "qwen_image", "wan", "ltx", "anima", "sdxl_modular", "flux_modular", "wan_modular"),
    )
    Config = TimeShiftConfig
    State = TimeShiftState
    neutral: ClassVar[dict[str, Any]] = {"window": 0}
    active: ClassVar[dict[str, Any]] = {"window": 200, "cutoff": 0, "data_variance": 0.0}
    effects = Effects(edits=frozenset({"timestep"}))
    config: TimeShiftConfig

    def check(self, target: Target) -> None:
        self._ensure_supported(target.pipe, target.family)

    def _ensure_supported(self, pipe: Any, family: Family, eta: float = 0.0) -> None:
        """Raises Unsupported, with the reason, where the pipeline's scheduler leaves the criterion without a meaning."""
        scheduler, flow = pipe.scheduler, family.prediction == "flow"
        name = type(scheduler).__name__
        why = None
        if pipe.config.get("expand_timesteps"):
            why = "this pipeline gives the denoiser a time for every token, and a shifted time a sample has no meaning there"
        elif not flow and getattr(scheduler, "alphas_cumprod", None) is None:
            why = f"{name} has no alphas_cumprod, so the variance that belongs to a timestep is not known; use DDIM, DPM++ or Euler"
        elif not flow and scheduler.config.get("timestep_type") == "continuous":
            why = f"{name} with timestep_type='continuous' gives the denoiser log(sigma)/4 instead of a training timestep"
        elif not flow and (kind := prediction_kind(family, scheduler)) not in {"epsilon", "v_prediction", "sample"}:
            why = f"prediction_type {kind!r} of {name} is not one of epsilon, v_prediction, sample"
        elif self.config.mode == "target" and self.config.window:
            from diffusers import DDIMScheduler

            if flow or not isinstance(scheduler, DDIMScheduler):
                why = (
                    f"mode='target' moves the target of a DDIM transfer, which {name} does not make; "
                    "use DDIMScheduler, or mode='network', which works with every scheduler"
                )
            elif eta > 0:
                why = f"mode='target' needs a deterministic transfer, but eta = {eta}; use eta=0 or mode='network'"
        if why:
            raise Unsupported(f"time_shift: {why}")

    def run(self, call: RunCall, next: Callable[[RunCall], Any]) -> Any:
        self._ensure_supported(call.pipe, call.family, call.get("eta") or 0.0)  # again: the scheduler may be another one now
        result = next(call)
        if self.config.window:
            self._explain(call)
        return result

    def denoise(self, call: DenoiseCall, next: Callable[[DenoiseCall], Tensor]) -> Tensor:
        if not self.config.window:
            return next(call)
        shared, copies = call.shared, len(call.branches)
        sample = call.sample[: call.sample.shape[0] // copies]
        if self.config.mode == "network" and call.step.call > 0 and shared.t_previous is not None and shared.shape is not None:
            if shared.offset is None:
                # the denoiser's input is x in VP scale under every scheduler: scale_model_input divides by sqrt(1 + sigma^2) where it must
                shared.offset = self._offset(call, _narrow(sample, shared.shape), call.step.t, gate=shared.t_previous)
            call = call.replace(**{call.family.timestep: _shift(call.timestep, shared.offset.repeat(copies), call.family.timestep_scale)})
        prediction = next(call)
        if "cond" in call.branches:
            output = prediction.chunk(copies)[call.branches.index("cond")]
            shared.shape = torch.Size(min(sizes) for sizes in zip(sample.shape, output.shape, strict=True))
            if self.config.data_variance is None:
                a, b, _ = self._levels(call).at(_time(call.step.t, sample))
                x, output = (_narrow(y, shared.shape).float() for y in (sample, output))
                x0 = clean_estimate(x, output, SignalNoise(a.sqrt(), b.sqrt()), prediction_kind(call.family, call.pipe.scheduler))
                shared.bounds = method.data_variance_bounds(method.sample_variance(x0), a, b)
        return prediction

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        shared = call.shared
        out = next(call)
        if self.config.window and self.config.mode == "target" and call.step.call > 0:
            out = StepOutput(self._transfer(call, out), out.x0)
        shared.t_previous, shared.offset = call.step.t, None
        if call.step.is_last:
            shared.levels = None  # a further pass may have another schedule
        return out

    def _transfer(self, call: StepCall, out: StepOutput) -> Tensor:
        """DDIM's x_{t-1} with each sample's own target time t_s: sqrt(abar_ts) x_0 + sqrt(1 - abar_ts) eps.

        As in the official sampler v is the variance of x_t, the state that is about to move; unshifted samples keep the scheduler's result.
        """
        scheduler, x = call.scheduler, call.sample
        t = _time(call.step.t, x)
        t_next = t - scheduler.config.num_train_timesteps // scheduler.num_inference_steps
        k = self._offset(call, x, t_next, gate=t_next)
        a, b, _ = self._levels(call).at(t)
        a_s, b_s, _ = (y.reshape(-1, *[1] * (x.ndim - 1)) for y in self._levels(call).at(t_next + k))
        levels = SignalNoise(a.to(x.dtype).sqrt(), b.to(x.dtype).sqrt())
        eps = noise_estimate(x, call.model_output, levels, prediction_kind(call.family, scheduler))
        moved = a_s.sqrt().to(x.dtype) * out.x0 + b_s.sqrt().to(x.dtype) * eps
        return torch.where(k.reshape(a_s.shape) == 0, out.sample, moved)

    def _offset(self, call: Call, x: Tensor, t: Tensor, gate: Tensor) -> Tensor:
        """k [rows of x]: how far to shift ``t``, the nominal time (0-dim) of ``x``.

        0 unless ``gate`` > cutoff and the criterion is informative.
        """
        shared, config = call.shared, self.config
        v = method.sample_variance(x)
        half = config.window // 2
        offsets = torch.arange(-half, half + 1, device=x.device)
        levels = self._levels(call)
        a, b, valid = levels.at(_time(t, x) + offsets)
        if config.data_variance is not None:
            lower = upper = torch.full_like(v, config.data_variance)
        elif shared.bounds is not None:
            lower, upper = (bound.repeat(len(v) // len(bound)) for bound in shared.bounds)
        else:
            lower = upper = torch.full_like(v, torch.inf)
        k = method.best_offset(v, a, b, valid, offsets, upper)
        if lower is not upper:
            k = method.smaller_shift(method.best_offset(v, a, b, valid, offsets, lower), k)
        considered = (_time(gate, x) > config.cutoff).expand(len(v))
        informative = considered & (upper <= UNINFORMATIVE)
        if levels.abar is None:
            informative &= method.flow_rises(a[0], b[0], upper)
        k = torch.where(informative, k, 0)
        sums = torch.stack([considered.sum(), informative.sum(), (k != 0).sum(), ((k.abs() == half) & (k != 0)).sum(), k.sum()])
        shared.sums = sums if shared.sums is None else shared.sums + sums
        return k

    def _levels(self, call: Call) -> Levels:
        shared = call.shared
        if shared.levels is None:
            scheduler = call.pipe.scheduler
            steps = scheduler.config.num_train_timesteps
            if call.family.prediction == "flow":
                shared.levels = Levels(None, steps)
            else:
                shared.levels = Levels(scheduler.alphas_cumprod.to(call.step.t.device, torch.float32), steps)
        return shared.levels  # type: ignore[no-any-return]

    def _explain(self, call: RunCall) -> None:
        """Say in the report what was done; the one place where values leave the device, after the run."""
        shared = call.shared
        if shared.sums is None:
            call.note("inactive: the run had one step, and the first step is never shifted")
            return
        considered, informative, shifted, edge, total = (int(n) for n in shared.sums.tolist())
        known = ""
        if shared.bounds is not None:
            low, high = torch.stack(shared.bounds).mean(dim=1).tolist()
            known = f"sigma_d^2 of this run's samples is between {low:.3g} and {high:.3g} (x_0 estimates of the last step)"
            call.note(known + (f"; data_variance={low:.2g} fixes it" if high <= UNINFORMATIVE else ""))
        if not considered:
            call.note(f"inactive: no step at t > cutoff = {self.config.cutoff:g}")
        elif not informative:
            call.note(
                f"inactive: at none of {considered} shifts could sigma_d^2 > {UNINFORMATIVE} be ruled out; there Var(x_t) hardly depends "
                "on t and the criterion carries no information (latents scaled to unit variance are of this kind)"
            )
        else:
            mean = f", by {total / shifted:+.1f} on average" if shifted else ""
            call.note(
                f"shifted {shifted} of {considered} (samples x steps at t > cutoff){mean}; {edge} to the edge of the window; "
                f"{considered - informative} left alone because the criterion carried no information"
            )


def _time(t: Tensor, like: Tensor) -> Tensor:
    return t.to(like.device, torch.float32, non_blocking=True)


def _narrow(x: Tensor, shape: torch.Size) -> Tensor:
    """The first ``shape[d]`` entries of every dimension but the batch: without appended channels or a learned variance."""
    for d in range(1, x.ndim):
        x = x.narrow(d, 0, shape[d])
    return x


def _shift(timestep: Tensor, k: Tensor, scale: float) -> Tensor:
    """The denoiser's timestep, 0-dim or [rows], moved by ``k`` [rows] training timesteps: [rows], of its dtype."""
    if not timestep.is_floating_point():
        return timestep.to(k.device) + k.to(timestep.dtype)
    return (timestep.to(k.device, torch.float32) + k * scale).to(timestep.dtype)
