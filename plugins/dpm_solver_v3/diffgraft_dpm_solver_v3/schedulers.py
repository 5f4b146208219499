"""DPM-Solver-v3 as a diffusers scheduler; it works without diffgraft.

Zheng, Lu, Chen, Zhu, "DPM-Solver-v3: Improved Diffusion ODE Solver with Empirical Model Statistics", arXiv 2310.13268.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffgraft.methods.noise_schedule import Array, Level, NoiseSchedule, clean, spaced
from diffgraft.methods.own_scheduler import ODEScheduler, OwnOutput
from diffgraft.methods.solvers import at_least_float32, falling, unrounded
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffgraft_dpm_solver_v3.method import (
    Transition,
    advance,
    derivatives,
    seen_from_end,
    seen_from_start,
    snapped,
    transition,
)

CHOICES = {
    "prediction_type": ("epsilon", "v_prediction", "sample", "flow_prediction"),
    "predictor": ("full", "pseudo"),
    "corrector": ("auto", "pseudo", "full", "off"),
    "half": (None, "t<=0.5", "t>0.5"),
    "spacing": ("time", "quadratic", "logsnr", "edm"),
    "final": ("sigma_min", "zero"),
}
AUTO_CORRECTOR = 10
"""Steps from which on `corrector = "auto"` leaves the corrector off (Table 13)."""


@dataclass
class Plan:
    """A run's way: per step end its level and 1 - l, per step its transition."""

    levels: list[Level]
    rest: list[Tensor]
    over: list[Transition]
    times: list[float]


class DPMSolverV3Scheduler(ODEScheduler):
    """DPM-Solver-v3, multistep, order 1 to 3, with corrector.

    Statistics are given by :meth:`set_statistics`; without, l = 1 and s = b = 0, which is DPM-Solver++ (Appendix A.2).

    Args:
        num_train_timesteps ... rescale_betas_zero_snr: as in ``DDIMScheduler``.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        shift ... time_shift_type: as in ``FlowMatchEulerDiscreteScheduler``, whose sigmas a flow model's steps get.
        solver_order: n + 1, 1 to 3.
        predictor: "full" derivatives or "pseudo"-order ones.
        corrector: "pseudo" (of one order more), "full" (of the same order), "off", or "auto": "pseudo" below 10 steps, else "off".
        half: correct only samples with "t<=0.5" (paper) or "t>0.5" (official code); None: all.
        lower_order_final: lower orders at the last steps.
        spacing: of the steps: "time", "quadratic", "logsnr" or "edm". Ends of steps are moved to the next grid point.
        intervals: N, of the lambda grid; statistics with another N are interpolated.
        final: the end: "sigma_min" (paper: the least noise that the model was trained on) or "zero" (own: x0 of the last polynomial).
    """

    init_noise_sigma = 1.0

    @register_to_config
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        rescale_betas_zero_snr: bool = False,
        shift: float = 1.0,
        use_dynamic_shifting: bool = False,
        base_shift: float | None = 0.5,
        max_shift: float | None = 1.15,
        base_image_seq_len: int | None = 256,
        max_image_seq_len: int | None = 4096,
        shift_terminal: float | None = None,
        time_shift_type: str = "exponential",
        solver_order: int = 2,
        predictor: str = "full",
        corrector: str = "auto",
        half: str | None = None,
        lower_order_final: bool = True,
        spacing: str = "time",
        intervals: int = 250,
        final: str = "sigma_min",
    ) -> None:
        if not 1 <= solver_order <= 3:
            raise ValueError(f"solver_order = {solver_order}: 1, 2 or 3")
        if intervals < 1:
            raise ValueError(f"intervals = {intervals}: at least 1")
        for key, allowed in CHOICES.items():
            if (value := self.config[key]) not in allowed:
                raise ValueError(f"{key} = {value!r}: one of {', '.join(map(repr, allowed))}")
        self._take_levels()
        flow = self._euler is not None
        self.schedule = NoiseSchedule(num_train_timesteps) if flow else NoiseSchedule.of_alphas(self.alphas_cumprod)
        self.grid: Array = self.schedule.grid(intervals)
        flat = torch.ones(2, 1, dtype=torch.float64)
        self._statistics = flat, flat * 0, flat * 0
        self._take_up(snapped(spaced(self.schedule, min(intervals, 50), spacing), self.grid), None)

    # statistics -------------------------------------------------------------------------------------------------------------------

    def set_statistics(self, l: Tensor, s: Tensor, b: Tensor, ends: tuple[float, float] | None = None) -> None:  # noqa: E741
        """Use these empirical model statistics from the next run on.

        Args:
            l, s, b: [N + 1, ...] on an even grid of lambda from most to least noise; [...] is the shape of one sample, or broadcasts to it.
            ends: (lambda_T, lambda_0) of that grid, if known.

        Raises:
            ValueError: shapes that do not go together, values that are not finite, or a grid of another noise schedule.
        """
        if l.shape != s.shape or l.shape != b.shape or l.ndim < 2 or len(l) < 2:
            raise ValueError(f"l, s, b must have one shape [N + 1, ...] with N >= 1; given: {[tuple(x.shape) for x in (l, s, b)]}")
        if not all(bool(x.isfinite().all()) for x in (l, s, b)):
            raise ValueError("l, s, b hold values that are not finite")
        if ends is not None and not np.allclose(ends, self.schedule.ends, rtol=0, atol=1e-2):
            first, last = self.schedule.ends
            raise ValueError(
                f"the statistics are of a noise schedule with lambda from {ends[0]:.3f} to {ends[1]:.3f}, this one goes from {first:.3f} "
                f"to {last:.3f}"
            )
        self._statistics = l, s, b

    def _on_grid(self) -> tuple[Tensor, ...]:
        """l, s, b [N + 1, ...] on this scheduler's grid, linear in between."""
        n = len(self._statistics[0]) - 1
        if n == self.config.intervals:
            return self._statistics
        place = torch.linspace(0, n, self.config.intervals + 1, dtype=torch.float64)
        low = place.floor().clamp(max=n - 1).long()
        weight = (place - low).to(self._statistics[0].dtype).reshape(-1, *[1] * (self._statistics[0].ndim - 1))
        return tuple(torch.lerp(x[low], x[low + 1], weight.to(x.device)) for x in self._statistics)

    # schedule ---------------------------------------------------------------------------------------------------------------------

    @property
    def timesteps(self) -> Tensor:
        """What the denoiser is told at each step [n], float32, on the grid."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        end = self._sigmas[-1]
        index = snapped(self.schedule.lam(value.double().cpu().numpy()), self.grid)
        self._take_up([*index, 0], value.device)
        if torch.equal(self._timesteps, value):  # a part of this very schedule stays a view of it
            self._timesteps = value
        self._sigmas[-1] = end

    @property
    def sigmas(self) -> Tensor:
        """sigma / alpha (of a flow model: sigma) at the ends of steps [n + 1]; they follow the timesteps, only the last can be set."""
        return self._sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        self._sigmas = torch.cat([self._sigmas[:-1], value[-1:].to(self._sigmas)])
        self._begin_run()

    @property
    def shift(self) -> float:
        """The resolution shift in force (flow models)."""
        return 1.0 if self._euler is None else self._euler.shift  # type: ignore[no-any-return]

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """Make the schedule.

        Args:
            num_inference_steps: n; one denoiser call a step.
            sigmas: own ones, falling. Of flow models as in ``FlowMatchEulerDiscreteScheduler``; of others the noise-to-signal ratios,
                the last one where the run ends, as in ``EulerDiscreteScheduler``.
            mu: flow models only, as in ``FlowMatchEulerDiscreteScheduler`` (with ``spacing = "time"``).
            timesteps: own timesteps, falling.

        Raises:
            ValueError: more steps than the grid has intervals, own ones that do not fall or lie outside of the training's, or arguments
                that the model's kind does not take.
        """
        T = self.config.num_train_timesteps
        flow = self._euler is not None
        self._ensure_kind(sigmas, mu, timesteps)
        if timesteps is not None:
            own = falling(timesteps, "timesteps", 0, T if flow else T - 1).numpy()
            lam = self.schedule.lam(np.append(own, 0.0))
        elif sigmas is not None and not flow:
            own = falling(sigmas, "sigmas", 0, math.inf).numpy()
            lam = -np.log(own.clip(min=math.exp(-self.grid[-1])))
        elif self._euler is not None and self.config.spacing == "time":
            self._euler.set_timesteps(num_inference_steps, sigmas=sigmas, mu=mu)
            lam = self.schedule.lam(self._euler.sigmas.double().numpy() * self.schedule.steps)
        else:
            n = len(sigmas) if num_inference_steps is None else num_inference_steps
            lam = spaced(self.schedule, n, self.config.spacing)
        if len(lam) < 2:
            raise ValueError(f"sigmas = {list(sigmas)}: give two or more, the last one where the run ends")
        self._take_up(snapped(lam, self.grid), device)

    def _take_up(self, index: list[int], device: Any) -> None:
        """The schedule whose steps end at these points of the grid [n + 1]."""
        self.num_inference_steps = len(index) - 1
        levels = [self.schedule.level(float(self.grid[i])) for i in index]
        self._timesteps = torch.from_numpy(self.schedule.t(self.grid[index[:-1]])).to(device, torch.float32)
        self._sigmas = torch.tensor([at.sigma if self._euler is not None else at.sigma / at.alpha for at in levels])
        self._begin_run()

    def _begin_run(self) -> None:
        self._begin_index: int | None = None
        self._release()

    def _release(self) -> None:
        """Forget the run."""
        self._index: int | None = None
        self._first = 0
        self._plan: Plan | None = None
        self._g: list[Tensor] = []  # of the steps before, newest first, with the base of the newest
        self._y: Tensor | None = None
        self._last_order = 0
        self._exact: Tensor | None = None

    def _planned(self, device: torch.device, dtype: torch.dtype, begin: int) -> Plan:
        """The run's transitions. Statistics in float64 are small and stay on the CPU until the transitions are known."""
        lam = self.schedule.lam(self._timesteps.double().cpu().numpy())
        end = max(float(self.sigmas[-1]), 1e-12)
        last = np.log1p(-end) - np.log(end) if self._euler is not None else -np.log(end)
        index = snapped(np.append(lam, last), self.grid)
        l, s, b = (x if x.dtype == torch.float64 else x.to(device) for x in self._on_grid())  # noqa: E741
        over: list[Any] = [None] * begin
        for i, j in zip(index[begin:], index[begin + 1 :], strict=False):
            part = slice(i, j + 1)
            over.append(transition(self.grid[part], l[part], s[part], b[part], self.config.solver_order + 1).to(device, dtype))
        first = 1.0 if self._euler is None else 0.0
        return Plan(
            levels=[self.schedule.level(float(self.grid[i])) for i in index],
            rest=[(1 - l[i]).to(device, dtype) for i in index],
            over=over,
            times=[float(t + first) / self.schedule.steps for t in self.schedule.t(self.grid[index])],
        )

    # steps ------------------------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The samples are at the denoiser's scale."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """Correct ``sample`` by what the denoiser says of it, and go on to the next one.

        Args:
            model_output: the prediction for ``sample`` at ``timestep`` [batch, ...], guidance done.
            sample: the present state x [batch, ...].
        """
        if self._plan is None:
            self._first = self._index = self._place(timestep)
            self._plan = self._planned(sample.device, at_least_float32(sample.dtype), self._first)
        assert self._index is not None
        begin = self._first
        k, plan = self._index, self._plan
        x, edited = unrounded(sample, self._exact, at_least_float32(sample.dtype))
        x0 = clean(x, model_output.to(x.dtype), plan.levels[k], self.config.prediction_type)
        y = x / plan.levels[k].alpha
        f = plan.rest[k] * y - x0
        if self._g:
            y = torch.where(edited, y, self._corrected(y, f, k))  # what somebody put there is no solution to be made better
            self._g = [seen_from_end(g, plan.over[k - 1]) for g in self._g]
        steps = len(plan.over)
        self._g = [f, *self._g][: self.config.solver_order]
        order = min(self.config.solver_order, k - begin + 1)
        if self.config.lower_order_final:
            order = min(order, steps - k)
        taylor = derivatives(self._g[:order], [plan.levels[k - i].lam for i in range(order)], self.config.predictor == "pseudo")
        after = advance(y, taylor, plan.over[k])
        if k == steps - 1 and self.config.final == "zero":
            g = sum((each * (plan.over[k].h ** i / FACTORIAL[i]) for i, each in enumerate(taylor)), torch.zeros_like(f))
            out = plan.rest[k + 1] * after - seen_from_end(g, plan.over[k])
        else:
            out = plan.levels[k + 1].alpha * after
        self._y, self._last_order, self._index = y, order, k + 1
        self._exact = out
        result = OwnOutput(out.to(sample.dtype, copy=True), x0.to(sample.dtype))  # others may edit it in place
        if k == steps - 1:
            self._release()
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _corrected(self, y: Tensor, f: Tensor, k: int) -> Tensor:
        """y of the present step again, now that its f is known (f itself is kept, and eps with it follows the corrected sample)."""
        assert self._plan is not None
        assert self._y is not None
        plan, kind = self._plan, self.config.corrector
        if kind == "auto":
            kind = "pseudo" if len(plan.over) - self._first < AUTO_CORRECTOR else "off"
        late = plan.times[k] <= 0.5
        order = self._last_order + (kind == "pseudo")
        if kind == "off" or order < 2 or (self.config.half is not None and late != (self.config.half == "t<=0.5")):
            return y
        over = plan.over[k - 1]
        points = [self._g[0], seen_from_start(f, over), *self._g[1 : order - 1]]
        lam = [plan.levels[i].lam for i in (k - 1, k, *range(k - 2, k - order, -1))]
        return advance(self._y, derivatives(points, lam, kind == "pseudo"), over)

    # noising (image to image) -----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at timesteps [batch], which need not be whole numbers."""
        lam = self.schedule.lam(timesteps.double().cpu().numpy().reshape(-1))
        levels = torch.tensor([self.schedule.level(float(each))[:2] for each in lam])
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (x.reshape(shape).to(original_samples.device, original_samples.dtype) for x in levels.unbind(1))
        return alpha * original_samples + sigma * noise


FACTORIAL: Sequence[int] = (1, 1, 2, 6)
