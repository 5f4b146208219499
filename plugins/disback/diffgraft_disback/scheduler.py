"""A scheduler of one step: from pure noise to the clean sample that the denoiser's one answer implies."""

from __future__ import annotations

from typing import Any

import torch
from diffgraft import ConfigError, Unsupported
from diffgraft.methods.predictions import SignalNoise, clean_estimate
from diffgraft.methods.solvers import at_least_float32
from diffusers import DDIMScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_ddim import DDIMSchedulerOutput
from torch import Tensor

KEPT = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type", "rescale_betas_zero_snr")
"""Of a model's own scheduler."""
NAMED = ("beta_start", "beta_end", "beta_schedule")
"""Without these it is none of noise levels abar_t."""


class OneStepScheduler(DDIMScheduler):  # type: ignore[misc]
    """x_0 = (x - s eps) / a at one training timestep t, with a^2 = abar_t and s^2 = 1 - abar_t; of v and x_0 predictions likewise.

    Args:
        timestep: t, of 0 to num_train_timesteps - 1. Everything else is as in ``DDIMScheduler``.

    Raises:
        Unsupported: there are fewer training timesteps (a plugin that begins later makes a shorter scheduler).
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.00085,
        beta_end: float = 0.012,
        beta_schedule: str = "scaled_linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        timestep: int = 399,
    ) -> None:
        if timestep >= num_train_timesteps:
            raise Unsupported(
                f"disback: its one step begins at timestep = {timestep}, and the run is cut to the first {num_train_timesteps} training "
                "timesteps: say a timestep below, or take off what begins later"
            )
        kept = {"trained_betas": trained_betas, "prediction_type": prediction_type, "rescale_betas_zero_snr": rescale_betas_zero_snr}
        DDIMScheduler.__init__.__wrapped__(self, num_train_timesteps, beta_start, beta_end, beta_schedule, **kept)
        abar = self.alphas_cumprod.double()[timestep]
        self._levels = SignalNoise(abar.sqrt(), (1 - abar).sqrt())

    def set_timesteps(self, num_inference_steps: int = 1, device: Any = None) -> None:
        """One step.

        Raises:
            ConfigError: more than one.
        """
        if num_inference_steps != 1:
            raise ConfigError(f"num_inference_steps = {num_inference_steps}: a one-step model takes one")
        self.num_inference_steps = 1
        self.timesteps = torch.tensor([self.config.timestep], device=device)

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True, **unused: Any) -> Any:
        """Both the previous sample and the clean one are x_0, computed in float32 (float64 of double samples)."""
        wide = at_least_float32(sample.dtype)
        levels = SignalNoise(*(each.to(sample.device, wide) for each in self._levels))
        x0 = clean_estimate(sample.to(wide), model_output.to(wide), levels, self.config.prediction_type).to(sample.dtype)
        return DDIMSchedulerOutput(prev_sample=x0, pred_original_sample=x0) if return_dict else (x0, x0)


def one_step(old: Any, kind: str, timestep: int) -> OneStepScheduler:
    """The scheduler for a model whose own is ``old``.

    Args:
        kind: what the model predicts.

    Raises:
        Unsupported: ``old`` is none of noise levels abar_t.
        ConfigError: the model was not trained at this timestep, or saw nothing of x_0 there.
    """
    name, steps = type(old).__name__, old.config.get("num_train_timesteps", 0)
    if any(each not in old.config for each in NAMED) or old.config.get("use_flow_sigmas"):
        raise Unsupported(f"disback: {name} has no alphas_cumprod, so the noise level of a timestep is not known; take DDIM, Euler or LCM")
    if timestep >= steps:
        raise ConfigError(f"plugin 'disback': timestep = {timestep}: this model was trained at 0 to {steps - 1}")
    made = OneStepScheduler(**{key: old.config[key] for key in KEPT if key in old.config}, timestep=timestep)
    if kind == "epsilon" and float(made.alphas_cumprod[timestep]) < 1e-6:
        raise ConfigError(
            f"plugin 'disback': timestep = {timestep}: there is nothing but noise there (abar = 0), and the noise that this model "
            "predicts says nothing of the picture; take an earlier one"
        )
    return made
