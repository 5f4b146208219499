"""SDE samplers for flow models as diffusers schedulers, on the linear and on the VP interpolant; they work without diffgraft.

Kim, Yoon, Hwang, Sung, "Inference-Time Scaling for Flow Models via Stochastic Generation and Rollover Budget Forcing", arXiv 2503.19385.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from diffgraft.methods.own_scheduler import OwnOutput, OwnScheduler
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.configuration_utils import register_to_config
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffgraft_rbf_search.method import VP, Level, Linear, Shape, diffusion, move, spaced


class _FlowSDE(OwnScheduler):
    """Euler-Maruyama on an interpolant. Samples are always the flow model's own, x_t = (1 - t) x0 + t eps, and ``sigmas`` their times t."""

    init_noise_sigma = 1.0
    path: Linear | VP

    def _begin(self, path: Linear | VP, *euler: Any) -> None:
        config = self.config
        if config.grid not in ("exp", "uniform", "pipeline"):
            raise ValueError(f"grid = {config.grid!r}: 'exp', 'uniform' or 'pipeline'")
        if config.diffusion not in get_args(Shape):
            raise ValueError(f"diffusion = {config.diffusion!r}: {', '.join(map(repr, get_args(Shape)))}")
        if not config.norm >= 0:
            raise ValueError(f"norm = {config.norm}: at least 0")
        self.path = path
        self._euler = FlowMatchEulerDiscreteScheduler(*euler)
        self.timesteps, self.sigmas = self._euler.timesteps, self._euler.sigmas
        self._levels: tuple[Tensor, list[Level]] | None = None
        self._index: int | None = None
        self._begin_index: int | None = None

    @property
    def shift(self) -> float:
        """The resolution shift in force (of the grid "pipeline")."""
        return self._euler.shift  # type: ignore[no-any-return]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Levels from noise to picture. ``sigmas`` [n] are the uniformly spaced times, 1 ... 1/n where not given.

        The grid "pipeline" has the times of ``FlowMatchEulerDiscreteScheduler`` with its shift; the other two are the paper's, unshifted.
        """
        if self.config.grid == "pipeline":
            self._euler.set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
            times = [self.path.time(t) for t in self._euler.sigmas.tolist()]
        else:
            if timesteps is not None:
                sigmas = [float(t) / self.config.num_train_timesteps for t in timesteps]
            if sigmas is None:
                n = int(num_inference_steps or 0)
                sigmas = [1 - i / n for i in range(n)]
            times = [*(spaced(min(1.0, float(t)), self.config.grid) for t in sigmas), 0.0]
        self.sigmas = torch.tensor([self.path.at(r).t for r in times])
        self.timesteps = (self.sigmas[:-1] * self.config.num_train_timesteps).to(device)
        self.num_inference_steps = len(self.timesteps)
        self._levels = self._index = self._begin_index = None

    @property
    def levels(self) -> list[Level]:
        """The interpolant at the schedule's points [n + 1]; read from ``sigmas``, which may have been edited."""
        if self._levels is None or self._levels[0] is not self.sigmas:
            self._levels = self.sigmas, [self.path.at(self.path.time(t)) for t in self.sigmas.tolist()]
        return self._levels[1]

    def children(self, x: Tensor, v: Tensor, steps: Sequence[tuple[Level, Level]], noise: Tensor | None) -> Tensor:
        """One SDE step of each row, from its level to its next one.

        Args:
            x, v: states x_t and the model's velocities there [rows, ...], float32.
            steps: (level, next level) of each row.
            noise: standard normal, like ``x``; None for the ODE.
        """
        weights = [move(here, there, diffusion(here, self.config.norm, self.config.diffusion)) for here, there in steps]
        shape = (3, len(steps), *[1] * (x.ndim - 1))
        of_x, of_v, of_noise = torch.tensor(weights, dtype=torch.float32).T.reshape(shape).to(x.device, non_blocking=True)
        out = of_x * x + of_v * v
        return out if noise is None else out + of_noise * noise

    def step(
        self, model_output: Tensor, timestep: Any, sample: Tensor, generator: Any = None, return_dict: bool = True
    ) -> OwnOutput | tuple[Tensor, Tensor]:
        """One step.

        Args:
            model_output: the velocity eps - x0 at ``sample`` [batch, ...], guidance done.
            sample: x_t [batch, ...].
            generator: of the noise, or a list with one for each sample; without it torch's global one.
        """
        i = self._index if self._index is not None else self._place(timestep)
        here, there = self.levels[i], self.levels[i + 1]
        x, v = sample.float(), model_output.float()
        noisy = self.config.norm > 0 and there.r > 0
        noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32) if noisy else None
        out = self.children(x, v, [(here, there)] * len(x), noise).to(sample.dtype)
        x0 = (x - here.t * v).to(sample.dtype)
        self._index = i + 1
        return OwnOutput(out, x0) if return_dict else (out, x0)

    def scale_noise(self, sample: Tensor, timestep: Tensor, noise: Tensor) -> Tensor:
        """x_t of pictures [batch, ...] at ``timestep`` [batch] (image to image)."""
        t = timestep.to(sample.device, torch.float32) / self.config.num_train_timesteps
        t = t.reshape(-1, *[1] * (sample.ndim - 1)).to(sample.dtype)
        return (1 - t) * sample + t * noise


class FlowSDEScheduler(_FlowSDE):
    """SDE sampling on the linear interpolant.

    Args:
        grid: "pipeline" (the levels of ``FlowMatchEulerDiscreteScheduler``), "uniform" or "exp".
        norm, diffusion: g_r = norm r^2 ("square") or another form of r (``method.diffusion``); norm = 0 is Euler's method.
        (the others): as in ``FlowMatchEulerDiscreteScheduler``.
    """

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
        grid: str = "pipeline",
        norm: float = 3.0,
        diffusion: str = "square",
    ) -> None:
        self._begin(
            Linear(), num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len, max_image_seq_len, False,
            shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type,
        )  # fmt: skip


class VPFlowScheduler(_FlowSDE):
    """SDE sampling of a flow model on the variance-preserving interpolant; ``beta_min`` and ``beta_max`` are its, the others as in
    :class:`FlowSDEScheduler`.

    It begins at t = 0.99347, where a pipeline's unit noise is taken as x_t (the plugin divides it by c = 1.0066 first, which is exact).
    """

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
        grid: str = "exp",
        norm: float = 3.0,
        diffusion: str = "square",
        beta_min: float = 0.1,
        beta_max: float = 20.0,
    ) -> None:
        if not 0 < beta_min <= beta_max:
            raise ValueError(f"beta_min = {beta_min}, beta_max = {beta_max}: 0 < beta_min <= beta_max")
        self._begin(
            VP(beta_min, beta_max), num_train_timesteps, shift, use_dynamic_shifting, base_shift, max_shift, base_image_seq_len,
            max_image_seq_len, False, shift_terminal, use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas, time_shift_type,
        )  # fmt: skip
