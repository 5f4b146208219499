"""A diffusers scheduler that follows a solver schedule; it works without diffgraft.

Liu, Ning, Yang, Wang, "A Unified Sampling Framework for Solver Searching of Diffusion Probabilistic Models", arXiv 2312.07243.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np
import torch
from diffgraft.methods.own_scheduler import ODEScheduler, OwnOutput
from diffgraft.methods.solvers import at_least_float32, falling, unrounded
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from diffgraft_usf_s3.decisions import Decision, Solver, SolverSchedule, known_solver, spread
from diffgraft_usf_s3.method import CLEAN, Level, NoiseSchedule, Update, update

PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction")


@dataclass
class Plan:
    """A run's way: per step its level and update, the update that corrects its start, and how much of the past is used."""

    levels: list[Level]
    updates: list[Update]
    correctors: list[Update | None]
    depth: int
    eps: bool
    analytical: bool


class SolverScheduleScheduler(ODEScheduler):
    """Solves the diffusion ODE by a solver that may change from step to step.

    Args:
        num_train_timesteps ... rescale_betas_zero_snr: as in ``DDIMScheduler``.
        prediction_type: "epsilon", "v_prediction", "sample" or "flow_prediction".
        shift ... time_shift_type: as in ``FlowMatchEulerDiscreteScheduler``, whose sigmas a flow model's steps get.
        solver, solver_order: a known solver, for any number of steps, where there is no ``solver_schedule``.
        solver_schedule: what ``SolverSchedule.plain()`` gives; for runs of as many steps as it has.
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
        solver: str = "unipc",
        solver_order: int = 2,
        solver_schedule: Mapping[str, Any] | None = None,
    ) -> None:
        if solver not in get_args(Solver) or prediction_type not in PREDICTIONS or not 1 <= solver_order <= 3:
            raise ValueError(f"solver = {solver!r}, solver_order = {solver_order}, prediction_type = {prediction_type!r}: one is not known")
        self._take_levels()
        if self._euler is not None:
            self.noise = NoiseSchedule(num_train_timesteps)
        else:
            abar = self.alphas_cumprod.double().clamp_min(2.0**-24).numpy()  # a terminal SNR of 0 is raised, as diffusers does
            self.noise = NoiseSchedule(len(abar), 0.5 * np.log(abar))
        self.given = None if solver_schedule is None else self.checked(SolverSchedule.parse(solver_schedule))
        n = 50 if self.given is None else len(self.given.timesteps)
        first, last = self.ends
        self._take_up(
            spread(first, last, n) if self.given is None else self.given.timesteps, last if self.given is None else self.given.end
        )

    # schedule ---------------------------------------------------------------------------------------------------------------------

    @property
    def ends(self) -> tuple[float, float]:
        """(first timestep, where the last step ends) of a schedule of even distances."""
        return self.noise.last, 0.0

    def checked(self, schedule: SolverSchedule) -> SolverSchedule:
        """The schedule; raises ValueError where it leaves the timesteps of the training."""
        low = 0.0 if self.noise.log_alpha is not None else 1e-9
        told = [*schedule.timesteps, *(() if schedule.end is None else (schedule.end,))]
        if outside := [t for t in told if not low <= t <= self.noise.last]:
            why = "; a flow model ends at the clean sample with end = null" if self.noise.flow and outside == [0.0] else ""
            raise ValueError(f"schedule: timesteps {outside} are outside of the model's {low:g} to {self.noise.last:g}{why}")
        if schedule.first == "zero_x0" and (self.noise.flow or told[0] >= self.noise.last):
            why = "is not for flow models" if self.noise.flow else f"steps from {self.noise.last:g} to the first of timesteps, below it"
            raise ValueError(f"schedule: first = 'zero_x0' {why}")
        return schedule

    def set_schedule(self, schedule: SolverSchedule | None) -> None:
        """Use this solver schedule from the next ``set_timesteps`` on; None: the known solver again."""
        self.given = None if schedule is None else self.checked(schedule)

    @property
    def timesteps(self) -> Tensor:
        """What the denoiser is told at each step [n], float32."""
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        if len(value) == len(self._times) and torch.equal(self._timesteps, value):
            self._timesteps = value  # a part of this very schedule stays a view of it
            return
        self._ensure_number(len(value))
        end = self._end
        self._take_up(falling(value.tolist(), "timesteps", 0, self.noise.steps).tolist(), None, value.device)
        self._end = end
        self._sigmas = self._told_sigmas()

    @property
    def sigmas(self) -> Tensor:
        """sigma / alpha (of a flow model: sigma) at the ends of steps [n + 1]; they follow the timesteps, only the last can be set."""
        return self._sigmas

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        last = value[-1:].to(self._sigmas)
        if not torch.equal(last, self._sigmas[-1:]):
            sigma = float(last)
            self._end = Level(1 - sigma, sigma) if self.noise.flow else Level(1 / math.hypot(1, sigma), sigma / math.hypot(1, sigma))
            self._sigmas = self._told_sigmas()
        self._begin_run()

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
            sigmas: own ones, falling: of flow models as in ``FlowMatchEulerDiscreteScheduler``; of others the noise-to-signal ratios, the
                last one where the run ends. A solver schedule takes their place (pipelines always give them).
            mu: flow models only, as in ``FlowMatchEulerDiscreteScheduler``; a solver schedule holds timesteps that are shifted already.
            timesteps: own timesteps, falling.

        Raises:
            ValueError: another number of steps than the solver schedule has, own ones that do not fall or lie outside of the training's,
                or arguments that the model's kind does not take.
        """
        self._ensure_kind(sigmas, mu, timesteps)
        own = timesteps if timesteps is not None else sigmas
        n = len(own) if own is not None else num_inference_steps or 50
        first, last = self.ends
        if self.given is not None:
            self._ensure_number(n if sigmas is None or self.noise.flow else n - 1)
            return self._take_up(self.given.timesteps, self.given.end, device)
        if timesteps is not None:
            return self._take_up(falling(timesteps, "timesteps", 0, self.noise.last).tolist(), last, device)
        if self._euler is not None:
            self._euler.set_timesteps(n, sigmas=sigmas, mu=mu)
            return self._take_up((self._euler.sigmas[:-1].double() * self.noise.steps).tolist(), last, device)
        if sigmas is not None:
            told = falling(sigmas, "sigmas", 0, math.inf).tolist()
            times = [self.noise.t(-math.log(sigma) if sigma else math.inf) for sigma in told]
            if len(times) < 2:
                raise ValueError(f"sigmas = {told}: give two or more, the last one where the run ends")
            return self._take_up(times[:-1], times[-1], device)
        return self._take_up(spread(first, last, n), last, device)

    def _ensure_number(self, n: int) -> None:
        if self.given is not None and n != len(self.given.timesteps):
            K = len(self.given.timesteps)
            raise ValueError(f"the solver schedule is for {K} steps, and this call makes {n}: call it with num_inference_steps={K}")

    def _take_up(self, times: Sequence[float], end: float | None, device: Any = None) -> None:
        """The schedule of these timesteps, float64; a flow model's timestep 0 is the clean sample."""
        self._times = list(times)
        self.num_inference_steps = len(self._times)
        self._timesteps = torch.tensor(self._times, dtype=torch.float64).to(device, torch.float32)
        self._end = CLEAN if end is None or (end == 0 and self.noise.flow) else self.noise.level(end)
        self._sigmas = self._told_sigmas()
        self._begin_run()

    def _told_sigmas(self) -> Tensor:
        levels = [*map(self.noise.level, self._times), self._end]
        return torch.tensor([at.sigma if self.noise.flow else at.sigma / at.alpha for at in levels], dtype=torch.float32)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """Of each step."""
        if self.given is not None:
            return self.given.steps
        return known_solver(self.config.solver, len(self._times), self.config.solver_order)

    # runs -------------------------------------------------------------------------------------------------------------------------

    def _begin_run(self) -> None:
        self._begin_index: int | None = None
        self._pure: bool | None = None  # whether the first state is noise alone; None: nobody asked yet
        self._release()

    def _release(self) -> None:
        """Forget the run."""
        self._index = 0
        self._plan: Plan | None = None
        self._states: list[Tensor] = []
        self._values: dict[str, list[Tensor]] = {"x0": [], "eps": []}
        self._exact: Tensor | None = None

    def _planned(self, begin: int) -> Plan:
        """The run's updates from step ``begin`` on; a step that would need what came before it is of a lower order."""
        levels = [*map(self.noise.level, self._times), self._end]
        before = [self.noise.level(self.noise.last)] if self._is_analytical(begin) else []
        updates: list[Any] = [None] * begin
        correctors: list[Update | None] = [None] * (begin + 1)
        depth = 1
        for k, decided in enumerate(self.decisions[begin:], begin):
            past, target, last = [*before, *levels[begin : k + 1]], levels[k + 1], k == len(self._times) - 1
            step = decided.within(len(past))
            points = () if target.sigma == 0 else step.active(step.start)
            corrected = k + 1 + step.start >= begin and correctors[k + 1 + step.start] is not None
            kind = (
                step.type if points or corrected else "x0"
            )  # of order 1 from where the model was asked both are DDIM; x0 has no 1 / alpha
            updates.append(update(past, target, kind, points, step.start, step.relax))
            fix = None if last else step.correct
            correctors.append(
                None if fix is None else update([*past, target], target, step.type, fix.active(step.start - 1), step.start - 1, fix.relax)
            )
            depth = max(depth, *(-index for each in (updates[-1], correctors[-1]) if each for index, _ in each.weights))
        used = [*updates[begin:], *filter(None, correctors)]
        depth = max(depth, *(-each.start for each in used))
        return Plan(levels, updates, correctors, depth, any(each.kind == "eps" for each in used), bool(before))

    def _is_analytical(self, begin: int) -> bool:
        """Whether the run's first state is pure noise, from which an analytical step goes to the first timestep.

        Image to image makes its first state by ``add_noise`` before the run looks here. ``set_begin_index(0)`` says nothing: some
        text-to-image pipelines call it as well.
        """
        if self.given is None or self.given.first != "zero_x0" or begin > 0:
            return False
        if self._pure is None:
            self._pure = True
        return self._pure

    def _analytical(self) -> tuple[float, float]:
        """(what that step multiplies the noise by, x0 that belongs to eps = x, in units of the noise: 0 only where sigma_T = 1)."""
        noise = self.noise.level(self.noise.last)
        over, x0 = update([noise], self.noise.level(self._times[0]), "x0", ()), (1 - noise.sigma) / noise.alpha
        return over.base + over.weights[0][1] * x0, x0

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The samples are at the denoiser's scale, but for the noise that an analytical step takes to the first timestep."""
        if self._plan is None and self._is_analytical(self._place(timestep)):
            return sample * self._analytical()[0]
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """Correct ``sample`` by what the denoiser says of it where that was decided, and go on to the next one.

        Args:
            model_output: the prediction for ``sample`` at ``timestep`` [batch, ...], guidance done.
            sample: the present state x [batch, ...].
        """
        if self._plan is None:
            self._index = self._place(timestep)
            self._plan = self._planned(self._index)
        k, plan = self._index, self._plan
        dtype = at_least_float32(sample.dtype)
        x, edited = unrounded(sample, self._exact, dtype)
        if plan.analytical and not self._states:
            factor, clean = self._analytical()
            self._states, self._values, x = [x], {"x0": [x * clean], "eps": [x] if plan.eps else []}, x * factor
        at = plan.levels[k]
        x0, eps = estimates(x, model_output.to(dtype), at, self.config.prediction_type, plan.eps)
        self._remember(self._values["x0"], x0)
        if eps is not None:
            self._remember(self._values["eps"], eps)
        if (fix := plan.correctors[k]) is not None:  # its start is one back from where the predictor's was: this state is not there yet
            x = torch.where(edited, x, self._made(fix, fix.start + 1))  # what somebody put there is no solution to be made better
        self._remember(self._states, x)
        out = self._made(plan.updates[k], plan.updates[k].start)
        self._exact, self._index = out, k + 1
        result = OwnOutput(out.to(sample.dtype, copy=True), x0.to(sample.dtype))  # others may edit it in place
        if k == len(plan.updates) - 1:
            self._release()
        return result if return_dict else (result.prev_sample, result.pred_original_sample)

    def _remember(self, past: list[Tensor], value: Tensor) -> None:
        assert self._plan is not None
        past.append(value)
        del past[: -self._plan.depth]

    def _made(self, over: Update, start: int) -> Tensor:
        """What an update gives; ``start``: the index of its state."""
        values = self._values[over.kind]
        out = self._states[start] * over.base
        for index, weight in over.weights:
            out.add_(values[index], alpha=weight)
        return out

    # noising (image to image) -----------------------------------------------------------------------------------------------------

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """alpha x0 + sigma eps at timesteps [batch], which need not be whole numbers."""
        if self._pure is None:
            self._pure = False
        levels = torch.tensor([self.noise.level(float(t)) for t in timesteps.double().cpu().reshape(-1)])
        shape = (-1, *[1] * (original_samples.ndim - 1))
        alpha, sigma = (x.reshape(shape).to(original_samples.device, original_samples.dtype) for x in levels.unbind(1))
        return alpha * original_samples + sigma * noise


def estimates(x: Tensor, output: Tensor, at: Level, kind: str, both: bool) -> tuple[Tensor, Tensor | None]:
    """x0 and (if ``both``) eps that the denoiser's ``output`` implies for ``x``; kind: one of :data:`PREDICTIONS`."""
    alpha, sigma = at
    if kind == "epsilon":
        return (x - sigma * output) / alpha, output
    if kind == "v_prediction":
        return alpha * x - sigma * output, alpha * output + sigma * x if both else None
    if kind == "flow_prediction":
        return x - sigma * output, alpha * output + x if both else None
    return output, (x - alpha * output) / sigma if both else None
