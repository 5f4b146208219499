"""BDIA as diffusers schedulers, one for variance-preserving models and one for flow matching; both work without diffgraft.

Zhang, Lewis, Kleijn, "Exact Diffusion Inversion via Bi-directional Integration Approximation", arXiv 2307.10829.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers import ConfigMixin, DDIMScheduler, FlowMatchEulerDiscreteScheduler, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils import BaseOutput
from torch import Tensor

from diffgraft_bdia.method import Levels, amplification, bdia, clean_and_noise, move


@dataclass
class BDIAOutput(BaseOutput):
    """``prev_sample`` the next state; ``pred_original_sample`` x0 as the denoiser sees it."""

    prev_sample: Tensor
    pred_original_sample: Tensor | None = None


class _BDIA:
    """The walk along the schedule: forward from noise to picture, or inverse, which is the same formula with 1 / gamma.

    A run needs the state before the present one. It is kept in ``precision``, as is the present one, for as long as the pipeline hands
    back the very tensor that it was given: an fp16 pipeline's latents are only rounded copies.
    """

    order = 1
    init_noise_sigma = 1.0
    config: Any
    timesteps: Tensor

    def _begin(self, levels: Levels, timesteps: Tensor) -> None:
        """Take up a schedule: ``levels`` [N + 1] from noise to picture, ``timesteps`` [N] of which the denoiser is told on the way down."""
        if self.config.inverse:
            # on the way up the first state is the picture; its neighbour's time is the nearest that the denoiser knows
            levels = Levels(levels.a.flip(0), levels.s.flip(0))
            timesteps = torch.cat([timesteps[-1:], timesteps.flip(0)[:-1]])
        self.levels = levels
        self.timesteps = timesteps
        self.num_inference_steps = len(timesteps)
        self._index: int | None = None
        self._begin_index: int | None = None
        self._before: Tensor | None = None
        self._exact: Tensor | None = None
        self._returned: Tensor | None = None
        self._start: tuple[Tensor, Tensor] | None = None
        if self.config.inverse and (error := amplification(self.config.gamma, len(timesteps), self._dtype)) > MOST_ERROR:
            raise ValueError(
                f"gamma = {self.config.gamma} cannot be inverted over {len(timesteps)} steps in {self.config.precision}: rounding errors "
                f"grow to about {error:.1g}; take gamma nearer to 1, fewer steps or precision='float64'"
            )

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self.config.precision)  # type: ignore[no-any-return]

    @property
    def begin_index(self) -> int | None:
        """Where in the schedule the run begins (image to image)."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Called by image-to-image pipelines after ``set_timesteps``."""
        self._begin_index = begin_index

    def start_from(self, noise: Tensor, neighbour: Tensor) -> None:
        """Both first states are known (they came out of an inversion): the first step gives the second, whatever the denoiser says."""
        self._start = noise.to(self._dtype), neighbour.to(self._dtype)

    def pair(self) -> dict[str, Tensor]:
        """After an inverse walk: the noise and the state before it, which is the second one of the walk back."""
        assert self._exact is not None
        assert self._before is not None
        return {"noise": self._exact, "neighbour": self._before}

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The samples are at the denoiser's scale."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> BDIAOutput | tuple[Tensor, Tensor]:
        """One move along the schedule.

        Args:
            model_output: the prediction for ``sample`` at ``timestep`` [batch, ...], guidance done.
            sample: the present state z_i [batch, ...].
        """
        if self._index is None:
            self._index = self._begin_index or 0
        i = self._index
        z = self._exact if sample is self._returned and self._exact is not None else sample.to(self._dtype)
        at = self.levels[i]
        asked = self.levels[i + 1] if self.config.inverse and i == 0 else at
        x0, eps = clean_and_noise(z, model_output.to(z.dtype), at, asked, self._kind)
        out = move(x0, eps, self.levels[i + 1])
        if self._before is not None:
            gamma = self.config.gamma
            out = bdia(self._before, move(x0, eps, self.levels[i - 1]), out, 1 / gamma if self.config.inverse else gamma)
        elif self._start is not None:
            z, out = self._start
        self._before, self._exact, self._returned = z, out, out.to(sample.dtype)
        self._index = i + 1
        return BDIAOutput(self._returned, x0.to(sample.dtype)) if return_dict else (self._returned, x0.to(sample.dtype))

    def __len__(self) -> int:
        return self.config.num_train_timesteps  # type: ignore[no-any-return]


MOST_ERROR = 1e-2
"""Rounding error of a latent, relative to 1, above which an inversion is refused."""


class BDIAScheduler(_BDIA, SchedulerMixin, ConfigMixin):
    """BDIA-DDIM (eq. 17) for variance-preserving models that predict epsilon, v or the sample.

    Args:
        gamma: weight of the backward move, (0, 1]; 0 is DDIM.
        inverse: walk from the picture to the noise.
        precision: "float32" or "float64", in which the states are kept.
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
    ) -> None:
        check(gamma, inverse, precision)
        for name, value in (("clip_sample", clip_sample), ("thresholding", thresholding)):
            if value:
                raise ValueError(f"{name} = True: a clipped move cannot be undone; give {name}=False")
        self._ddim = DDIMScheduler(
            num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas, False, set_alpha_to_one, steps_offset,
            prediction_type, timestep_spacing=timestep_spacing, rescale_betas_zero_snr=rescale_betas_zero_snr,
        )  # fmt: skip
        self.alphas_cumprod = self._ddim.alphas_cumprod
        self._kind = prediction_type
        self.timesteps = self._ddim.timesteps

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:
        """The timesteps of ``DDIMScheduler``, and its last level behind them; on an inverse walk in the other order."""
        self._ddim.set_timesteps(num_inference_steps, device)
        timesteps = self._ddim.timesteps
        abar = torch.cat([self.alphas_cumprod.double()[timesteps.cpu()], self._ddim.final_alpha_cumprod.double().view(1)])
        self._begin(Levels(abar.sqrt(), (1 - abar).sqrt()), timesteps)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """As in ``DDIMScheduler``."""
        return self._ddim.add_noise(original_samples, noise, timesteps)  # type: ignore[no-any-return]


class FlowBDIAScheduler(_BDIA, SchedulerMixin, ConfigMixin):
    """BDIA with flow-matching Euler as its one-step move; ``gamma``, ``inverse`` and ``precision`` as in :class:`BDIAScheduler`."""

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
    ) -> None:
        check(gamma, inverse, precision)
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
        s = self._euler.sigmas.double().cpu()
        self._begin(Levels(1 - s, s), self._euler.timesteps)
        self.sigmas = self._euler.sigmas.flip(0) if self.config.inverse else self._euler.sigmas

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """As in ``FlowMatchEulerDiscreteScheduler``."""
        return self._euler.scale_noise(sample, timestep, noise)  # type: ignore[no-any-return]


def check(gamma: float, inverse: bool, precision: str) -> None:
    """Raises ValueError for settings without meaning."""
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma = {gamma}: 0 to 1")
    if inverse and gamma == 0:
        raise ValueError("gamma = 0 is DDIM, whose steps cannot be undone exactly; give gamma nearer to 1")
    if precision not in ("float32", "float64"):
        raise ValueError(f"precision = {precision!r}: 'float32' or 'float64'")
