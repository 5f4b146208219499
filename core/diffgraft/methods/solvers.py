"""For plugins that bring a solver of the diffusion ODE: what it takes over from the pipeline's scheduler, and states between its steps."""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.installed.family import Family
from diffgraft.kernel.slots import place_in as place_in  # for plugins that read a schedule by a timestep that is a view of it
from diffgraft.kernel.units import LEAST, is_exploding

WITHOUT_NOISE = (
    "set pipe.scheduler to one without noise (DDIM, EulerDiscreteScheduler, DPMSolverMultistepScheduler with "
    "algorithm_type='dpmsolver++', FlowMatchEulerDiscreteScheduler)"
)
STEPS = 6
"""Of a probe."""


def ode_settings(plugin: str, old: Any, family: Family) -> dict[str, Any]:
    """The settings of the pipeline's scheduler ``old``, for ``from_config`` of one that solves the same ODE.

    What ``old`` is, is seen by what it does: a copy of it takes some steps on four numbers. A flow model's shift is called ``shift``,
    whatever ``old`` calls it.

    Raises:
        Unsupported: ``old`` draws noise, belongs to a distilled model, clips its x0, or has a noise schedule that its settings do not tell.
    """
    config, name = settings_of(old), type(old).__name__
    kind = "flow" if family.prediction == "flow" else "diffusion"
    if why := _seen(old, kind):
        raise Unsupported(f"{plugin}: {name} {why}")
    for key in ("clip_sample", "thresholding"):
        if config.get(key):
            raise Unsupported(f"{plugin}: {name}.{key} = True: a clipped x0 leaves the diffusion ODE; set pipe.scheduler with {key}=False")
    if kind == "flow":
        return {**config, "shift": config["flow_shift"]} if "flow_shift" in config else config  # as DPM-Solver and UniPC call it
    return config


# what a scheduler does ------------------------------------------------------------------------------------------------------------

_SEEN: weakref.WeakKeyDictionary[Any, tuple[Any, str, str | None]] = weakref.WeakKeyDictionary()


def _seen(old: Any, kind: str) -> str | None:
    """Why the scheduler cannot be replaced by a solver of the ODE of a ``kind`` of model, or None; tried once for its settings."""
    known = _SEEN.get(old)
    if known is None or known[0] is not old.config or known[1] != kind:
        known = _SEEN[old] = (old.config, kind, _tried(old, kind))
    return known[2]


def _tried(old: Any, kind: str) -> str | None:
    config = old.config
    takes = inspect.signature(getattr(old, "step", lambda: None)).parameters
    if "r_timestep" in takes or "original_inference_steps" in config:  # flow maps, TCD at eta = 0: they may jump without noise
        return "is made for a distilled model, which jumps and does not follow the diffusion ODE"
    if config.get("timestep_type") == "continuous":
        return OWN_LEVELS
    try:
        probe = _probe(old, kind)
        (levels, end), (_, again) = _walk(probe, kind, 0), _walk(probe, kind, 1)
    except Exception as error:  # any class may be there, and fail in any way
        why = f"{type(error).__name__}: {error}".split("\n")[0][:120]
        return f"cannot be tried on four numbers ({why}), so it is not known what it solves: {WITHOUT_NOISE}"
    if not torch.equal(end, again):
        return (
            "samples the diffusion SDE, or jumps as schedulers of distilled models do: it draws noise at its steps, and this method solves "
            f"the ODE: {WITHOUT_NOISE}"
        )
    if levels is not None or not bool((end - X0).abs().max() < 0.2):
        return levels or f"does not follow the ODE of this model: {WITHOUT_NOISE}"
    return None


OWN_LEVELS = "has a noise schedule of its own, which its settings do not tell"
X0 = torch.tensor([0.7, -0.4, 0.2, -0.9]).reshape(1, 4, 1, 1)
EPS = torch.tensor([0.6, 1.1, -1.3, -0.5]).reshape(1, 4, 1, 1)
"""Clean sample and noise of a probe, whose denoiser always answers with them: then the ODE's solution is a x0 + s eps at every level."""


def _probe(old: Any, kind: str) -> Any:
    """A scheduler like ``old`` that takes a denoiser's answer whose meaning needs no noise level, and does not clip."""
    config = settings_of(old)
    simple: dict[str, Any] = {"use_dynamic_shifting": False, "clip_sample": False, "thresholding": False}
    if kind == "diffusion":  # a terminal SNR of 0 leaves no x0 in a noise prediction
        simple["prediction_type"] = "sample" if config.get("rescale_betas_zero_snr") else "epsilon"
    return type(old).from_config(config | {key: value for key, value in simple.items() if key in config})


def settings_of(scheduler: Any) -> dict[str, Any]:
    """Its settings, also those that it has by default: ``from_config`` would take another class's defaults for them (Heun's betas)."""
    return {key: value for key, value in scheduler.config.items() if key != "_use_default_values"}


def _walk(probe: Any, kind: str, seed: int) -> tuple[str | None, Tensor]:
    """(what is wrong with its noise levels or None, state at the end)."""
    answer = EPS - X0 if kind == "flow" else X0 if probe.config.get("prediction_type") == "sample" else EPS
    probe.set_timesteps(STEPS)
    t = probe.timesteps[:1]
    x = probe.scale_noise(X0, t, EPS) if hasattr(probe, "scale_noise") else probe.add_noise(X0, EPS, t)
    wrong = _levels_differ(probe, kind, x, t)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for t in probe.timesteps:
            if hasattr(probe, "scale_model_input"):
                probe.scale_model_input(x, t)
            x = probe.step(answer, t, x, return_dict=False)[0]
    return wrong, x


def _levels_differ(probe: Any, kind: str, x: Tensor, t: Tensor) -> str | None:
    """Whether the first state is as noisy as the settings say."""
    a, s = torch.linalg.lstsq(torch.stack([X0.flatten(), EPS.flatten()], 1).double(), x.double().flatten()[:, None]).solution.flatten()
    if kind == "flow":
        told = float(t) / probe.config.num_train_timesteps
        fits = math.isclose(float(a + s), 1, abs_tol=1e-2) and math.isclose(float(s), told, abs_tol=2e-2)
        return None if fits else f"is none of flow matching (its first state is {a:.3g} x0 + {s:.3g} eps), and this model is one"
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr")
    if "beta_schedule" not in probe.config or probe.config.get("use_flow_sigmas"):
        return OWN_LEVELS
    abar = DDIMScheduler(**{key: probe.config[key] for key in keys if key in probe.config}).alphas_cumprod
    level = float(abar.double().clamp(min=LEAST**2)[round(float(t))]) if 0 <= float(t) <= len(abar) - 1 else 0.0
    told = math.sqrt(1 / level - 1) if level else math.inf
    unit = float(a) if is_exploding(probe) else float(a * a + s * s)
    ratio = float(s) / max(float(a), LEAST)
    fits = math.isclose(unit, 1, abs_tol=1e-2) and math.isclose(ratio, told, rel_tol=0.05)
    return None if fits else OWN_LEVELS


# schedules and states -------------------------------------------------------------------------------------------------------------


def falling(values: Sequence[float], name: str, low: float, high: float) -> Tensor:
    """A user's ``timesteps`` or ``sigmas`` [n], float64.

    Raises:
        ValueError: none, not falling, not finite, or outside of ``low`` to ``high``.
    """
    found = [float(value) for value in values]
    if not found or not all(low <= value <= high and math.isfinite(value) for value in found):
        raise ValueError(f"{name} = {found}: give one or more numbers from {low:g} to {high:g}")
    if any(a <= b for a, b in pairwise(found)):
        raise ValueError(f"{name} = {found}: each must be smaller than the one before")
    return torch.tensor(found, dtype=torch.float64)


@contextmanager
def schedule_errors(plugin: str) -> Iterator[None]:
    """What a solver's ``set_timesteps`` refuses, as an error of ours; around ``next(call)`` of a ``schedule`` hook."""
    try:
        yield
    except ValueError as error:
        raise ConfigError(f"plugin {plugin!r}: {error}") from error


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    """In which states are kept, and what follows from them is computed."""
    return torch.promote_types(dtype, torch.float32)


def unrounded(sample: Tensor, kept: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(the state that ``sample`` stands for, where somebody has edited it).

    A solver keeps its states in ``dtype`` and hands out rounded copies. What comes back is the state that was ``kept`` where it equals that
    copy, and what was handed in where somebody has edited it. Identity would not tell (latents are edited in place, or cloned
    unchanged), a version counter is not there under ``inference_mode``, and comparing waits for no device.

    A solver hands out ``kept.to(sample.dtype, copy=True)``, or an edit in place would reach its state.
    """
    if kept is None:
        return sample.to(dtype), torch.ones_like(sample, dtype=torch.bool)
    edited = sample != kept.to(sample.dtype)
    return torch.where(edited, sample.to(dtype), kept), edited


def asks_once_a_step(scheduler: Any) -> bool:
    """Whether each step asks the denoiser once, at its own level: not Heun's, KDPM2's, nor a Runge-Kutta beginning's (PNDM)."""
    runge_kutta = hasattr(scheduler, "prk_timesteps") and not scheduler.config.skip_prk_steps
    return getattr(scheduler, "order", 1) == 1 and not runge_kutta
