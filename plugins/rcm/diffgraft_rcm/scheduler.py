"""rCM's sampler as a diffusers scheduler; it works without diffgraft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffgraft.methods.own_scheduler import OwnOutput, OwnScheduler
from diffgraft.methods.solvers import unrounded
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgraft_rcm.method import SIGMA_MAX, clean, renoised, start, times_of


class RCMScheduler(OwnScheduler):
    """Jumps to the clean sample and noises it again, to the next time; for flow models that were distilled for it.

    A run begins with :meth:`first` of unit noise: pipelines hand their unit noise to the denoiser as it is, which is 1.25 % too much (the
    plugin sees to it).

    Args:
        num_train_timesteps: what the denoiser is told is t times this.
        times: "quality" or "first" (published, up to 4 steps), "spread" (any number), or RF times that fall.
        sigma_max: noise to signal at the first time, of the tables.
    """

    init_noise_sigma = 1.0
    begun_noised: bool
    """Whether the run's latents were noised by ``scale_noise``, so that they are on the path already."""

    @register_to_config
    def __init__(self, num_train_timesteps: int = 1000, times: str | Sequence[float] = "quality", sigma_max: float = SIGMA_MAX) -> None:
        steps = 4 if isinstance(times, str) else len(times)
        self.set_timesteps(steps)

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: Any = None, sigmas: Any = None, mu: float | None = None, timesteps: Any = None
    ) -> None:
        """Take the first times of the table and 0.

        Args:
            sigmas, timesteps: only how many they are counts: pipelines pass their own, and a distilled model has its times.
            mu: a resolution's shift, which these times do not have.

        Raises:
            ValueError: the table has fewer, or its times do not fall.
        """
        given = next((each for each in (sigmas, timesteps) if each is not None), ())
        steps = len(given) or int(num_inference_steps or 0)
        times = (*times_of(self.config.times, steps, self.config.sigma_max), 0.0)
        self.sigmas = torch.tensor(times)
        self._exact: tuple[Tensor, tuple[float, ...]] = self.sigmas, times
        self.timesteps = (self.sigmas[:-1].double() * self.config.num_train_timesteps).float().to(device)
        self.num_inference_steps = steps
        self._index: int | None = None
        self._begin_index: int | None = None
        self._kept: Tensor | None = None
        self.begun_noised = False

    @property
    def levels(self) -> tuple[float, ...]:
        """RF times of the run's points, 0 the last; of ``sigmas``, where somebody has put others in."""
        if self._exact[0] is not self.sigmas:
            self._exact = self.sigmas, tuple(self.sigmas.tolist())
        return self._exact[1]

    def first(self, noise: Tensor) -> Tensor:
        """The first latents of unit noise [batch, ...]."""
        return start(noise, self.levels[0])

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The samples are at the denoiser's scale."""
        return sample

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> OwnOutput | tuple[Tensor, Tensor]:
        """One jump, and fresh noise unless it was the last. States are kept in float64.

        Args:
            model_output: the velocity n - x0 at ``sample`` [batch, ...].
            generator: of the noise, or a list with one for each sample; without it torch's global one.
        """
        i = self._index if self._index is not None else self._place(timestep)
        t, after = self.levels[i], self.levels[i + 1]
        x, _ = unrounded(sample, self._kept, torch.float64)
        out = x0 = clean(x, model_output.double(), t)
        if after > 0:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
            out = renoised(x0, noise.double(), after)
        self._kept, self._index = out, i + 1
        returned = out.to(sample.dtype, copy=True)  # others may edit it in place
        estimate = x0.to(sample.dtype)
        return OwnOutput(returned, estimate) if return_dict else (returned, estimate)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """x_t of clean latents [batch, ...] at ``timestep`` [batch] (image to image)."""
        self.begun_noised = True  # or inpainting, in a run that has begun
        t = timestep.to(sample.device, torch.float32) / self.config.num_train_timesteps
        t = t.reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        return renoised(sample, noise, t)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The same under the name that video to video asks for."""
        return self.scale_noise(original_samples, timesteps, noise)
