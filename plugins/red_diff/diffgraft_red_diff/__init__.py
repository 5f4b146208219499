"""RED-diff: a picture from its measurement, with a diffusion model as the regulariser (Mardani, Song, Kautz, Vahdat, arXiv 2305.04391).

The picture mu is optimised by Adam, a step at each noise level of the schedule: towards the measurement, and towards what the denoiser says
of mu with fresh noise on it. The pipeline's own loop asks the denoiser, so guidance, LoRA and prompts go on working; its scheduler's steps
are not taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import (
    DenoiseCall,
    Effects,
    Need,
    Paper,
    Plugin,
    PluginConfig,
    RunCall,
    StepCall,
    StepOutput,
    Target,
)
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.gradients import ensure_graphs
from diffgraft.methods.predictions import clean_estimate, known_kind, levels_next, levels_of, prediction_kind
from diffgraft.methods.problems import Problem, ProblemKnob
from diffgraft.methods.restoring import (
    begins_with_its_own,
    ensure_one_call_a_step,
    first_guess,
    pixels_of,
    problem_of,
    unit_noise,
)
from diffusers.utils.torch_utils import randn_tensor
from pydantic import Field
from torch import Tensor

from diffgraft_red_diff.method import Weighting, misfit, prior_gradient

__all__ = ["RedDiff"]
__version__ = "0.1.0"

BETAS = (0.9, 0.99)
"""Of Adam (official code)."""


class RedDiffConfig(PluginConfig):
    """Knobs of RED-diff."""

    problem: ProblemKnob = Field(
        None, description="y = A(x) + noise: a Problem, or a dict of operator, y and noise; none: off, bit for bit"
    )
    weight: float = Field(0.25, ge=0, le=1e6, description="lambda: of the prior; 0: the measurement alone")
    lr: float = Field(0.1, gt=0, le=10, description="learning rate of Adam (paper's examples: 0.1 to 0.5)")
    data_weight: float = Field(1.0, gt=0, le=1e6, description="v: of the measurement")
    weighting: Weighting = Field(
        "linear",
        description="g(r) of the prior, r = noise / signal: r, its root, its square, log(1 + r), min(r, 1), r^(2/3) or 1",
    )
    spread: float = Field(0.0, ge=0, le=10, description="sigma_x0: deviation of the pictures around mu that are asked about, in both terms")


@dataclass
class Search:
    """Of one run: mu [n, ...] in the layout of ``scheduler.step``, in float32."""

    mu: Tensor | None = None
    asked: Tensor | None = None
    """mu + sigma_x0 n, which this step asks about; mu itself without a spread."""
    adam: Any = None
    start: Tensor | None = None
    """The first noisy sample, in place of the pipeline's."""
    problem: Problem | None = None
    ended: bool = False


class RedDiff(Plugin):
    name = "red_diff"
    paper = Paper(
        title="A Variational Perspective on Solving Inverse Problems with Diffusion Models",
        arxiv="2305.04391",
        implemented="Adam on mu with the score-matching regulariser and all seven weightings, on pixels and through an autoencoder",
        omitted="the parallel variant, which averages several levels a step",
        licence="official code: NVIDIA, non-commercial; written from the formulas",
    )
    families = ("pixel", "sd", "sdxl", "sd3", "flux", "pixart")
    not_on: ClassVar[dict[str, str]] = begins_with_its_own("RED-diff")
    Config = RedDiffConfig
    State = Search
    neutral: ClassVar[dict[str, Any]] = {"problem": None}
    active: ClassVar[dict[str, Any]] = {"weight": 0.25}
    effects = Effects(
        replaces=frozenset({"scheduler"}),
        edits=frozenset({"latents"}),
        needs=frozenset({"own_steps", "gradients", "all_blocks"}),  # through the decoder; each level is asked about new noise
        stochastic=True,
    )
    needs = (Need("problem", "problem"),)
    config: RedDiffConfig

    def check(self, target: Target) -> None:
        if self.config.problem is not None:
            ensure_decodes(target.pipe, target.family)
            known_kind(target.family, target.pipe.scheduler, self.name)

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.problem is None:
            return next(call)
        ensure_one_call_a_step(self.name, call.family, call.pipe.scheduler)
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        result = next(call)
        search: Search = call.shared
        if search.mu is not None and search.problem is not None and search.ended:  # a stopped run gives what it had, which is not mu
            call.record({"residual": search.problem.residual(pixels_of(call, search.mu))})
        return result

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.problem is None:
            return next(call)  # type: ignore[no-any-return]
        search: Search = call.shared
        if search.mu is None:
            self._begin(call, search)
        if search.start is not None:
            call = call.with_latents(search.start.to(call.sample.dtype))
        return next(call)  # type: ignore[no-any-return]

    def _begin(self, call: DenoiseCall, search: Search) -> None:
        """mu = pinv(y) within [-1, 1], and the pipeline's own noise on it.

        The pseudo-inverse of a blur makes noise many times as large as any picture, and Adam's way back is long.
        """
        ensure_graphs(call)
        problem = search.problem = problem_of(call, self.name)
        guess = problem.operator.pinv(problem.y).clamp(-1, 1) if problem.operator.linear else None
        search.mu = first_guess(call, problem, self.name, guess)
        search.adam = torch.optim.Adam([search.mu], self.config.lr, BETAS)
        a, s = levels_of(call)
        search.asked = self._around(call, search.mu)
        search.start = a * search.asked + s * unit_noise(call)

    def _around(self, call: Any, mu: Tensor) -> Tensor:
        """mu + sigma_x0 n."""
        if not self.config.spread:
            return mu
        return mu + self.config.spread * randn_tensor(mu.shape, generator=call.generator, device=mu.device, dtype=torch.float32)

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)  # so that the scheduler knows where it is
        search: Search = call.shared
        if search.mu is None:
            return out
        search.start, mu = None, search.mu
        levels = levels_of(call)
        kind = prediction_kind(call.family, call.scheduler)
        x0 = clean_estimate(call.sample.float(), call.model_output.float(), levels, kind)
        asked = search.asked
        assert asked is not None
        prior = prior_gradient(asked, x0, levels.s / levels.a, self.config.weight, self.config.weighting)
        mu.grad = prior + self._data_gradient(call, asked)
        search.adam.step()  # check: allow host_sync because Adam's counter is on the CPU
        call.acted()
        if call.step.ends_schedule:
            search.ended = True
            return StepOutput(mu.to(out.sample.dtype), mu.to(out.sample.dtype))
        after = levels_next(call)
        search.asked = self._around(call, mu)
        return StepOutput((after.a * search.asked + after.s * call.noise()).to(out.sample.dtype), x0.to(out.sample.dtype))

    def _data_gradient(self, call: StepCall, asked: Tensor) -> Tensor:
        """v d/dx mean((y - A(x))^2) / 2, through the autoencoder where there is one."""
        problem: Problem = call.shared.problem
        with torch.enable_grad():
            x = asked.detach().requires_grad_()
            loss = self.config.data_weight * misfit(problem.operator.A(pixels_of(call, x)), problem.y)
            (gradient,) = torch.autograd.grad(loss, x)
        return gradient
