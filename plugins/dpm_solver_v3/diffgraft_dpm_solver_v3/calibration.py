"""How l, s, b are estimated on a pipeline.

A scheduler asks the pipeline itself: once the sample x0 of the prompt is made, it goes on handing out states x_lambda = alpha x0 +
sigma eps with their timesteps in the place of the next state, and takes down what comes back. So the prediction is the pipeline's own
guided one, whatever its formula, and each answer is one step of the run. At each of the N + 1 grid points there are four questions:

    x                                  x0_theta, and with it d, q
    x + delta sigma v                  (sigma J_eps v) v, v Rademacher
    x moved to lambda -+ delta         the derivative of x0_theta along the ODE (the path at constant eps is tangent to it)

The noise and v of a draw are the same at all grid points: l' is a difference of neighbours, and what they share cancels out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import numpy as np
import torch
from diffgraft import Calibrator, Effects, Family, RunCall, Schedule, ScheduleCall, Unsupported
from diffgraft.methods.noise_schedule import Array, clean
from diffgraft.methods.own_scheduler import OwnOutput
from diffgraft.methods.schema import Holds, Values
from diffgraft.methods.solvers import at_least_float32
from diffusers.utils.torch_utils import randn_tensor
from pydantic import Field
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_dpm_solver_v3.knobs import PAPER, DPMSolverV3Config, options, settings_of
from diffgraft_dpm_solver_v3.method import Moments, moments, pooled, statistics
from diffgraft_dpm_solver_v3.schedulers import DPMSolverV3Scheduler

QUESTIONS = 4


class Facts(TypedDict):
    """Of an artefact: the ends of the lambda grid, from most to least noise, and the guidance scale it was measured at."""

    ends: Annotated[list[float], Field(min_length=2, max_length=2)]
    guidance_scale: float | None


def backwards(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with the grid, or None."""
    first, last = facts["ends"]
    if len(tensors["l"]) < 2:
        return "l, s, b have one point, a grid has two ends"
    return None if -math.inf < first < last < math.inf else f"its fact ends = {[first, last]}: lambda rises from the first to the last"


HOLDS = Holds({name: Values(("N + 1", ...)) for name in "lsb"}, Facts, backwards)


class MeasuringScheduler(DPMSolverV3Scheduler):
    """Samples as DPM-Solver++ does, then measures, and gives the sample back at the end; see the module's docstring."""

    _x0: Tensor
    _x: Tensor  # of this grid point
    _at: Tensor  # what the denoiser was asked about
    _answers: list[Tensor]  # x0_theta at this grid point

    def prepare(self, draws: int, delta: float, channel: int | None, generator: Any) -> None:
        """Say how to measure, before ``set_timesteps``.

        Args:
            draws: of noise for each sample.
            delta: step of the finite differences.
            channel: axis of the channels, whose elements are averaged; None: every element by itself.
            generator: the pipeline call's, for the noise.
        """
        self._draws, self._delta, self._channel, self._generator = draws, delta, channel, generator

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: Any = None,
        sigmas: Any = None,
        mu: float | None = None,
        timesteps: Any = None,
    ) -> None:
        """The sampling schedule, then the questions' timesteps."""
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)
        self._sampling = self.num_inference_steps
        first, last = self.grid[0], self.grid[-1]
        self._asked = np.stack(
            [self.grid, self.grid, (self.grid - self._delta).clip(first, last), (self.grid + self._delta).clip(first, last)], axis=1
        )
        own = self._timesteps
        asked = torch.from_numpy(self.schedule.t(np.tile(self._asked.ravel(), self._draws))).to(own.device, own.dtype)
        self._timesteps = torch.cat([own, asked])
        self._sigmas = torch.cat([self._sigmas, self._sigmas[-1].expand(len(asked))])  # some pipelines read one a step
        self._found: list[list[Moments]] = [[] for _ in self.grid]
        self._asking = -1  # number of the question that is being answered; -1: the sample is being made

    def _planned(self, device: torch.device, dtype: torch.dtype, begin: int) -> Any:
        """Of the sampling part."""
        everything = self._timesteps
        self._timesteps = everything[: self._sampling]
        try:
            return super()._planned(device, dtype, begin)
        finally:
            self._timesteps = everything

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, return_dict: bool = True) -> Any:
        """A sampling step, or the answer to a question and the next question."""
        if self._asking < 0:
            if self._place(timestep) >= self._sampling:
                raise Unsupported(
                    "dpm_solver_v3: this pipeline begins behind the part of the schedule that makes a sample (image to image, where "
                    "strength is a share of all timesteps): calibrate the text-to-image pipeline of the same model"
                )
            out = super().step(model_output, timestep, sample, return_dict=True)
            if self._plan is None:  # the sample is made
                self._x0, self._dtype = out.prev_sample.to(at_least_float32(sample.dtype)), sample.dtype
                self._copies = 2 if len(sample) % 2 == 0 and torch.equal(*self._x0.chunk(2)) else 1
                out.prev_sample = self._ask()
        else:
            if not torch.equal(sample.to(self._at.dtype), self._at):
                raise Unsupported(
                    "dpm_solver_v3: this pipeline changes its samples between steps (inpainting?), so what it answers is not about the "
                    "state that it was asked about; calibrate the text-to-image pipeline of the same model"
                )
            self._take(clean(self._at, model_output.to(self._at.dtype), self._level, self.config.prediction_type))
            done = self._asking + 1 == self._draws * self._asked.size
            out = OwnOutput(self._x0.to(self._dtype) if done else self._ask())
        return out if return_dict else (out.prev_sample, out.pred_original_sample)

    def _ask(self) -> Tensor:
        """The next state."""
        self._asking += 1
        point, question = divmod(self._asking % self._asked.size, QUESTIONS)
        if point == question == 0:
            self._eps, self._v = self._noise(), torch.where(self._noise() < 0, -1.0, 1.0)
        here = self.schedule.level(float(self.grid[point]))
        self._level = self.schedule.level(float(self._asked[point, question]))
        if question == 0:
            self._x = here.alpha * self._x0 + here.sigma * self._eps
            self._at = self._x
        elif question == 1:
            self._at = self._x + self._delta * here.sigma * self._v
        else:
            moved = math.exp(-self._level.lam) - math.exp(-here.lam)  # d(x / alpha) = -e^{-lambda} eps d lambda
            eps = (self._x - here.alpha * self._answers[0]) / here.sigma
            self._at = self._level.alpha * (self._x / here.alpha + moved * eps)
        state = self._at.to(self._dtype, copy=True)
        self._at = state.to(self._at.dtype, copy=True)  # what the denoiser really gets
        return state

    def _noise(self) -> Tensor:
        """Like the samples; copies of one sample (DiT steps both guidance halves) get the same."""
        x = self._x0
        rows, copies = x.shape[0], self._copies
        generator = self._generator
        if isinstance(generator, list) and len(generator) != rows // copies:
            generator = generator[0]
        noise = randn_tensor((rows // copies, *x.shape[1:]), generator=generator, device=x.device, dtype=torch.float32)
        return noise.to(x.dtype).repeat(copies, *[1] * (x.ndim - 1))

    def _take(self, x0: Tensor) -> None:
        """The answer; after a point's last one its moments are taken."""
        point, question = divmod(self._asking % self._asked.size, QUESTIONS)
        self._answers = [x0] if question == 0 else [*self._answers, x0]
        if question < QUESTIONS - 1:
            return
        base, pushed, before, after = self._answers
        here = self.schedule.level(float(self.grid[point]))
        m = (here.alpha / (self._delta * here.sigma)) * self._v * (pushed - base)
        r = -(after - before) / float(self._asked[point, 3] - self._asked[point, 2])
        over = [0] if self._channel is None else [axis for axis in range(x0.ndim) if axis != self._channel % x0.ndim]
        self._found[point].append(Moments(*(x[0].cpu() for x in moments(m, -base, self._x / here.alpha, r, over))))

    def measured(self) -> dict[str, Tensor]:
        """Moments on the grid [N + 1, ...], by name."""
        columns = zip(*(pooled(sets) for sets in self._found), strict=True)
        return dict(zip(Moments._fields, (torch.stack(column) for column in columns), strict=True))


class DPMSolverV3Calibrator(Calibrator):
    """Estimates l, s, b; the record of a prompt are the moments of its samples."""

    name = "dpm_solver_v3_calibration"
    paper = PAPER
    Config = DPMSolverV3Config
    scheduler = MeasuringScheduler
    effects = Effects(replaces=frozenset({"scheduler"}))
    config: DPMSolverV3Config

    def make_scheduler(self, old: Any, family: Family) -> Any:
        # x0 must be free of noise, or near the end x would hold that noise as well as its own
        plain = {"solver_order": 2, "corrector": "off", "spacing": "time", "final": "zero"}
        return MeasuringScheduler.from_config(settings_of(old, family), **{**options(self.config), **plain})

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        axis = None if self.config.ems_shape == "full" else call.family.channel_axis
        call.scheduler.prepare(self.config.draws, self.config.delta, axis, call.generator)
        return next(call)  # type: ignore[no-any-return]

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        scheduler = call.pipe.scheduler
        dtype = torch.float64 if self.config.ems_shape == "channel" else torch.float32
        found = {name: value.to(dtype) for name, value in scheduler.measured().items()}
        scale = call.run.guidance_scale(call.family.denoisers[0])
        return {
            **found,
            "lambda": torch.from_numpy(scheduler.grid).clone(),
            "guidance_scale": torch.tensor([float("nan") if scale is None else float(scale)], dtype=torch.float64),
            "samples": torch.tensor([float(len(scheduler._x0) // scheduler._copies * self.config.draws)], dtype=torch.float64),
        }

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """l, s, b [N + 1, ...]; facts: the ends of lambda, K and the guidance scale."""
        lam: Array = records[0]["lambda"].numpy()
        sets = [Moments(*(record[name].double() for name in Moments._fields)) for record in records]
        found = statistics(lam, pooled(sets))
        scale = float(records[0]["guidance_scale"])
        facts = {
            "ends": [float(lam[0]), float(lam[-1])],
            "K": int(sum(float(record["samples"]) for record in records)),
            "guidance_scale": None if math.isnan(scale) else scale,
        }
        dtype = records[0]["m"].dtype
        return {name: value.to(dtype).contiguous() for name, value in zip("lsb", found, strict=True)}, facts
