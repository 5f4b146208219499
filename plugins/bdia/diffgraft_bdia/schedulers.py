"""BDIA as diffusers schedulers, one for variance-preserving models and one for flow matching; both work without diffgraft.

Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation", arXiv 2307.10829.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffgraft.methods.own_scheduler import OwnOutput, OwnScheduler
from diffgraft.methods.solvers import falling, unrounded
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffgraft_bdia.method import Levels, amplification, bdia, clean_and_noise, move


class _BDIA(OwnScheduler):
    """The walk along the schedule: forward from noise to picture, or inverse, which is the same formula with 1 / gamma.

    A run needs the state before the present one. It is kept in ``precision``, as is the present one: an fp16 pipeline's latents are only
    rounded copies. Where somebody has edited the latents in between, a new walk begins: the state before belongs to another one.
    """

    init_noise_sigma = 1.0
    timesteps: Tensor
    sigmas: Tensor

    def _begin(self, timesteps: Tensor, sigmas: Tensor) -> None:
        """Take up a schedule from noise to picture: ``timesteps`` [N] that the denoiser is told, ``sigmas`` [N + 1] of all points."""
        self._steps = len(timesteps)
        if self.config.inverse:
            # on the way up the first state is the picture; its neighbour's time is the nearest that the denoiser knows
            steps = max(1, int(self.config.strength * self._steps))
            self._ensure_invertible(steps)
            sigmas = sigmas.flip(0)[: steps + 1]
            timesteps = torch.cat([timesteps[-1:], timesteps.flip(0)[:-1]])[:steps]
        self.sigmas, self.timesteps = sigmas, timesteps
        self.num_inference_steps = len(timesteps)
        self._levels: Levels | None = None
        self._index = 0
        self._begin_index: int | None = None
        self._before: Tensor | None = None
        self._exact: Tensor | None = None
        self._start: tuple[Tensor, Tensor] | None = None

    def _ensure_invertible(self, steps: int) -> None:
        """Raises ValueError when rounding errors would outgrow what an inverse walk finds."""
        error = amplification(self.config.gamma, steps, self._dtype)
        if error > MOST_ERROR:
            raise ValueError(
                f"gamma = {self.config.gamma} cannot be inverted over {steps} steps in {self.config.precision}: rounding errors grow to "
                f"about {error:.1g}; take gamma nearer to 1, fewer steps, a smaller strength (a part of the steps) or precision='float64'"
            )

    def _levels_of(self, sigmas: Tensor) -> Levels:
        """Signal and noise at the schedule's points."""
        raise NotImplementedError

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.precision)  # type: ignore[no-any-return]

    def start_from(self, noise: Tensor, neighbour: Tensor) -> None:
        """Both first states [batch or 1, ...] are known (they came out of an inversion): the first step gives the second, whatever the
        denoiser says."""
        self._start = noise.to(self._dtype), neighbour.to(self._dtype)

    def pair(self) -> dict[str, Tensor]:
        """After an inverse walk: the noise and the state before it, which is the second one of the walk back; where and among how many
        steps it stopped."""
        assert self._exact is not None
        assert self._before is not None
        place = {"sigma": self.sigmas[self._index].clone(), "steps": torch.tensor(self._steps)}
        return {"noise": self._exact, "neighbour": self._before, **place}

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The samples are at the denoiser's scale."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> OwnOutput | tuple[Tensor, Tensor]:
        """One move along the schedule.

        Args:
            model_output: the prediction for ``sample`` at ``timestep`` [batch, ...], guidance done.
            sample: the present state z_i [batch, ...].
        """
        if self._levels is None:
            self._levels, self._index = self._levels_of(self.sigmas.double().cpu()), self._place(timestep)
        i, levels = self._index, self._levels
        z, edited = unrounded(sample, self._exact, self._dtype)
        at = levels[i]
        asked = levels[i + 1] if self.config.inverse and i == 0 else at
        x0, eps = clean_and_noise(z, model_output.to(z.dtype), at, asked, self._kind)
        out = move(x0, eps, levels[i + 1])
        if self._before is not None:
            gamma = self.config.gamma
            tied = bdia(self._before, move(x0, eps, levels[i - 1]), out, 1 / gamma if self.config.inverse else gamma)
            out = torch.where(edited, out, tied)
        elif self._start is not None:
            z, out = (each.expand_as(z) for each in self._start)
        self._before, self._exact, self._index = z, out, i + 1
        returned = out.to(sample.dtype, copy=True)  # others may edit it in place
        return OwnOutput(returned, x0.to(sample.dtype)) if return_dict else (returned, x0.to(sample.dtype))


MOST_ERROR = 1e-2
"""Rounding error of a latent, relative to 1, above which an inversion is refused."""


class BDIAScheduler(_BDIA):
    """BDIA-DDIM (eq. 17) for variance-preserving models that predict epsilon, v or the sample.

    Args:
        gamma: weight of the backward move, (0, 1]; 0 is DDIM.
        inverse: walk from the picture to the noise.
        precision: "float32" or "float64", in which the states are kept.
        strength: how far up an inverse walk goes, as a share of the steps, cut to whole steps, at least one.
        (the others): as in ``DDIMScheduler``; ``clip_sample`` and ``thresholding`` cannot be inverted and are refused.
    """

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        clip_sample: bool = False,
        set_alpha_to_one: bool = True,
        steps_offset: int = 0,
        prediction_type: str = "epsilon",
        thresholding: bool = False,
        timestep_spacing: str = "leading",
        rescale_betas_zero_snr: bool = False,
        gamma: float = 1.0,
        inverse: bool = False,
        precision: str = "float32",
        strength: float = 1.0,
    ) -> None:
        check(gamma, inverse, precision, strength)
        for name, value in (("clip_sample", clip_sample), ("thresholding", thresholding)):
            if value:
                raise ValueError(f"{name} = True: a clipped move cannot be undone; give {name}=False")
        ddim = DDIMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, False, set_alpha_to_one, steps_offset,
            prediction_type, timestep_spacing=timestep_spacing, rescale_betas_zero_snr=rescale_betas_zero_snr,
        )  # fmt: skip
        self._ddim = ddim
        self.alphas_cumprod = ddim.alphas_cumprod
        self.final_alpha_cumprod = ddim.final_alpha_cumprod
        self._kind = prediction_type
        self.timesteps, self.sigmas = ddim.timesteps, self._sigmas_at(ddim.timesteps)

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
    ) -> None:
        """The timesteps of ``DDIMScheduler``, and its last level behind them; on an inverse walk in the other order.

        Args:
            timesteps: own ones, falling, instead of a number; they need not be whole.
            sigmas: own noise-to-signal ratios, falling, the last one where the run ends (as in ``EulerDiscreteScheduler``).

        Raises:
            ValueError: not one of the three, or own ones that do not fall or lie outside of the training's.
        """
        if (num_inference_steps is not None) + (timesteps is not None) + (sigmas is not None) != 1:
            raise ValueError("give one of num_inference_steps, timesteps and sigmas")
        if timesteps is not None:
            t = falling(timesteps, "timesteps", 0, self.config.num_train_timesteps - 1)
            points = self._sigmas_at(t)
        elif sigmas is not None:
            points = falling(sigmas, "sigmas", 0, math.inf)
            if len(points) < 2:
                raise ValueError(f"sigmas = {list(sigmas)}: give two or more, the last one where the run ends")
            table = self._ratios()
            t = torch.from_numpy(np.interp(points[:-1].log().numpy(), table.log().numpy(), np.arange(len(table))))
        else:
            self._ddim.set_timesteps(num_inference_steps)
            t = self._ddim.timesteps
            points = self._sigmas_at(t)
        self._begin(t.to(device, t.dtype if not t.is_floating_point() else torch.float32), points.float())

    def _ratios(self) -> Tensor:
        """sigma = s / a at the training's timesteps [T], float64."""
        return (1 / self.alphas_cumprod.double().clamp(min=2.0**-24) - 1).sqrt()

    def _sigmas_at(self, timesteps: Tensor) -> Tensor:
        """sigma at timesteps [N] and at the end, float32."""
        table = self._ratios().numpy()
        sigmas = torch.from_numpy(np.interp(timesteps.cpu().double().numpy(), np.arange(len(table)), table))
        end = (1 / self.final_alpha_cumprod.double() - 1).sqrt().view(1)
        return torch.cat([sigmas, end]).float()

    def _levels_of(self, sigmas: Tensor) -> Levels:
        a = (1 + sigmas.square()).rsqrt()
        return Levels(a, sigmas * a)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As in ``DDIMScheduler``, also between two training timesteps."""
        if not timesteps.is_floating_point():
            return self._ddim.add_noise(original_samples, noise, timesteps)  # type: ignore[no-any-return]
        at = self._levels_of(self._sigmas_at(timesteps.reshape(-1))[:-1].double())
        a, s = (x.reshape(-1, *[1] * (noise.ndim - 1)).to(noise.device, noise.dtype) for x in (at.a, at.s))
        return a * original_samples + s * noise


class FlowBDIAScheduler(_BDIA):
    """BDIA with flow-matching Euler as its one-step move; the last four as in :class:`BDIAScheduler`."""

    _kind = "flow"

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        use_karras_sigmas: bool = False,
        use_exponential_sigmas: bool = False,
        use_beta_sigmas: bool = False,
        time_shift_type: str = "exponential",
        gamma: float = 1.0,
        inverse: bool = False,
        precision: str = "float32",
        strength: float = 1.0,
    ) -> None:
        check(gamma, inverse, precision, strength)
        self._euler = FlowMatchEulerDiscreteScheduler(
            num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, False,
            shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type,
        )  # fmt: skip
        self.timesteps, self.sigmas = self._euler.timesteps, self._euler.sigmas

    @property
    def shift(self) -> float:
        """The resolution shift in force."""
        return self._euler.shift  # type: ignore[no-any-return]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """The schedule of ``FlowMatchEulerDiscreteScheduler``; on an inverse walk in the other order."""
        self._euler.set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._begin(self._euler.timesteps, self._euler.sigmas)

    def _levels_of(self, sigmas: Tensor) -> Levels:
        return Levels(1 - sigmas, sigmas)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """As in ``FlowMatchEulerDiscreteScheduler``."""
        return self._euler.scale_noise(sample, timestep, noise)  # type: ignore[no-any-return]


def check(gamma: float, inverse: bool, precision: str, strength: float) -> None:
    """Raises ValueError for settings without meaning."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma}: 0 to 1")
    if inverse and gamma == 0:
        raise ValueError("gamma = 0 is DDIM, whose steps cannot be undone exactly; give gamma nearer to 1")
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision = {precision!r}: 'float32' or 'float64'")
    if not 0 < strength <= 1:
        raise ValueError(f"strength = {strength}: above 0, at most 1")
