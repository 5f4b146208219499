"""What a prediction says about the clean sample, for epsilon, v, sample and flow models, in one place.

A noisy sample is ``x = a x0 + s eps``, with signal level ``a`` and noise level ``s`` (0-dim tensors or anything that broadcasts):

    variance preserving (DDIM, DPM++, ...)   a = sqrt(abar_t), s = sqrt(1 - abar_t)
    variance exploding (Euler, Heun, ...)    a = 1,            s = sigma
    flow matching                            a = 1 - sigma,    s = sigma

epsilon and v are predicted for the variance-preserving sample of the same noise-to-signal ratio, whatever scale the scheduler keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from diffgraft.installed.errors import Unsupported
from diffgraft.kernel.slots import is_strided
from diffgraft.kernel.units import LEAST
from diffgraft.kernel.units import is_exploding as is_exploding

if TYPE_CHECKING:
    from diffgraft.installed.family import Family
    from diffgraft.kernel.calls import DenoiseCall, StepCall

KINDS = ("epsilon", "v_prediction", "sample", "flow")


class SignalNoise(NamedTuple):
    """Signal level ``a`` and noise level ``s`` of a sample."""

    a: Tensor
    s: Tensor


def clean_estimate(x: Tensor, output: Tensor, levels: SignalNoise, kind: str) -> Tensor:
    """x0 that a denoiser's ``output`` implies for the sample ``x``; ``kind`` is one of :data:`KINDS`."""
    if kind == "sample":
        return output
    a, s = levels
    if kind == "flow":  # output = eps - x0, and a + s = 1
        return (x - s * output) / (a + s)
    r = (a * a + s * s).sqrt()  # 1 for variance-preserving samples
    if kind == "epsilon":
        return (x - s * output) / a
    if kind == "v_prediction":  # v = (a eps - s x0) / r
        return (a * x / r - s * output) / r
    raise Unsupported(f"prediction type {kind!r} is not known; known: {', '.join(KINDS)}")


def noise_estimate(x: Tensor, output: Tensor, levels: SignalNoise, kind: str) -> Tensor:
    """eps that a denoiser's ``output`` implies for the sample ``x``."""
    if kind == "epsilon":
        return output
    a, s = levels
    if kind == "flow":
        return (x + a * output) / (a + s)
    if kind == "v_prediction":
        r = (a * a + s * s).sqrt()
        return (s * x / r + a * output) / r
    return (x - a * clean_estimate(x, output, levels, kind)) / s


def prediction_target(x0: Tensor, noise: Tensor, levels: SignalNoise, kind: str) -> Tensor:
    """What a denoiser of this ``kind`` (one of :data:`KINDS`) should predict for ``a x0 + s noise``."""
    a, s = levels
    targets: dict[str, Callable[[], Tensor]] = {
        "epsilon": lambda: noise,
        "v_prediction": lambda: a * noise - s * x0,
        "sample": lambda: x0,
        "flow": lambda: noise - x0,
    }
    return targets[kind]()


def prediction_kind(family: Family, scheduler: Any) -> str:
    """What the denoiser predicts: one of :data:`KINDS`, or the family's or scheduler's own word for something else."""
    if family.prediction != "scheduler":
        return family.prediction
    word = str(scheduler.config.get("prediction_type", "epsilon"))
    return f"EDM's {word}" if hasattr(scheduler, "precondition_outputs") else word  # between noise and clean sample, by the level


def known_kind(family: Family, scheduler: Any, plugin: str | None = None) -> str:
    """What the denoiser predicts, where it is one of :data:`KINDS`: for plugins that need x0 or the noise.

    Args:
        plugin: who asks, for the refusal.

    Raises:
        Unsupported: it is something else.
    """
    kind = prediction_kind(family, scheduler)
    if kind not in KINDS:
        who = f"{plugin}: " if plugin else ""
        raise Unsupported(f"{who}{type(scheduler).__name__} wants {kind!r} of a denoiser; known is what {', '.join(KINDS)} mean")
    return kind


def is_flow(family: Family, scheduler: Any) -> bool:
    """Whether samples are ``(1 - sigma) x0 + sigma eps``: those of flow models, and of schedulers with ``use_flow_sigmas``."""
    return family.prediction == "flow" or bool(scheduler.config.get("use_flow_sigmas"))


def levels_at(
    family: Family, scheduler: Any, t: Tensor, sigma: Tensor | None, device: torch.device, plugin: str | None = None
) -> SignalNoise:
    """The levels of the pipeline's latents at one step (0-dim, float32), as ``scheduler.step`` gets them.

    Args:
        t, sigma: of the step (``call.step.t``, ``call.step.sigma``).
        plugin: who asks, for the refusal.

    Raises:
        Unsupported: the scheduler does not say how noisy its samples are.
    """
    if sigma is not None:
        s = sigma.to(device, torch.float32, non_blocking=True)
        if is_flow(family, scheduler):
            return SignalNoise(1 - s, s)
        if is_exploding(scheduler):
            return SignalNoise(torch.ones_like(s), s)
        a = (1 + s * s).rsqrt()
        return SignalNoise(a, s * a)
    abar = getattr(scheduler, "alphas_cumprod", None)
    if family.prediction == "flow" or abar is None:
        who = f"{plugin}: " if plugin else ""
        raise Unsupported(
            f"{who}{type(scheduler).__name__} has neither sigmas nor alphas_cumprod, so the noise level of a step is not known; use DDIM "
            "or Euler"
        )
    return _levels_of_abar(scheduler, abar.to(device, torch.float32).take(t.to(device, torch.long, non_blocking=True)))


def _levels_of_abar(scheduler: Any, abar: Tensor) -> SignalNoise:
    if is_exploding(scheduler):
        return SignalNoise(torch.ones_like(abar), (1 / abar.clamp(min=LEAST**2) - 1).sqrt())
    return SignalNoise(abar.sqrt(), (1 - abar).sqrt())


def levels_of(call: DenoiseCall | StepCall) -> SignalNoise:
    """The levels of the pipeline's latents at the step of a denoiser's or scheduler's call, before it."""
    step = call.step
    return levels_at(call.family, call.pipe.scheduler, step.t, step.sigma, call.sample.device, _asking(call))


def _asking(call: DenoiseCall | StepCall) -> str | None:
    """The plugin that a call is shown to; None of the core's own."""
    entry = getattr(call, "entry", None)
    return None if entry is None else entry.name


def levels_after(call: DenoiseCall | StepCall) -> SignalNoise:
    """The levels of what ``scheduler.step`` itself makes of them at this step: for plugins that change what it makes.

    DDIM's kind goes to t - T // N, which is the schedule's next timestep of some spacings and numbers of steps only; the last steps of LCM
    and TCD have ends of their own. Of all others, and where a plugin edited the schedule, they are those of :func:`levels_next`.
    """
    abar = _own_abar(call)
    return levels_next(call) if abar is None else _levels_of_abar(call.pipe.scheduler, abar)


def levels_next(call: DenoiseCall | StepCall) -> SignalNoise:
    """The levels at which the next step asks the denoiser: for plugins that make the next sample themselves.

    Behind the last step they are those of the schedule's own end (``sigmas[-1]``, ``final_alpha_cumprod``), which need not be noise-free,
    and where a run stops before that (``denoising_end``) those of the schedule's next step.
    """
    scheduler, step, after = call.pipe.scheduler, call.step, call.step_at(1)
    if after.call != step.call:
        return levels_at(call.family, scheduler, after.t, after.sigma, call.sample.device, _asking(call))
    if step.sigma is not None:
        return levels_at(call.family, scheduler, step.t, scheduler.sigmas[-1], call.sample.device)
    abar = torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0), dtype=torch.float32, device=call.sample.device)
    return _levels_of_abar(scheduler, abar)


STRIDED = frozenset({"CogVideoXDPMScheduler", "RePaintScheduler"})
"""Schedulers beside DDIM's and PNDM that go from t to t - T // N, whatever their timesteps are."""


def _own_abar(call: DenoiseCall | StepCall) -> Tensor | None:
    """abar of where the scheduler's step goes, where that is not the schedule's next timestep."""
    scheduler, step, device = call.pipe.scheduler, call.step, call.sample.device
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    ends, pndm = step.ends_schedule and names & {"LCMScheduler", "TCDScheduler"}, "PNDMScheduler" in names
    strided = (pndm or is_strided(scheduler) or names & STRIDED) and not getattr(call.run, "strides", None)
    if not (ends or strided):
        return None
    table = scheduler.alphas_cumprod.to(device, torch.float32)
    if ends:  # TCD goes to timestep 0; LCM gives its clean sample
        return table[0] if "TCDScheduler" in names else torch.ones_like(table[0])
    stride = int(scheduler.config.num_train_timesteps // scheduler.num_inference_steps)
    if pndm and not scheduler.config.skip_prk_steps and step.call < len(scheduler.prk_timesteps):
        stride = 0 if step.call % 2 else stride // 2
    elif pndm and step.call == 1:  # makes the first step once more, which ends at this one's timestep
        stride = 0
    t = step.t.to(device, torch.long, non_blocking=True) - stride
    end = torch.as_tensor(scheduler.final_alpha_cumprod, dtype=torch.float32, device=device)
    return torch.where(t >= 0, table.take(t.clamp(min=0)), end)
