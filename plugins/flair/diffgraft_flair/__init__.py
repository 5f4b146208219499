"""FLAIR: a picture from its measurement, with a flow model as the regulariser (Erbach, Narnhofer, Dombos, Lenssen, Schiele, Schindler,
arXiv 2506.02680).

The latents mu are moved at each time t twice: by a step towards what the model says of them with noise on, whose weight follows how well
the model knows that t, and by gradient steps on the measurement through the decoder until that is met. The noise is no new one: most of it
is where the model's own path began. The pipeline's own loop asks the denoiser, so guidance, LoRA and prompts go on working; its scheduler's
steps are not taken.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import (
    DenoiseCall,
    Effects,
    Need,
    Plugin,
    RunCall,
    Schedule,
    ScheduleCall,
    StepCall,
    StepOutput,
    Target,
)
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.decoding import ensure_decodes
from diffgraft.methods.gradients import ensure_graphs
from diffgraft.methods.operators import Rows
from diffgraft.methods.predictions import levels_next, levels_of
from diffgraft.methods.problems import Problem
from diffgraft.methods.restoring import begins_with_its_own, first_guess, pixels_of, problem_of, unit_noise
from torch import Tensor

from diffgraft_flair.calibration import HOLDS, Measure, measured
from diffgraft_flair.knobs import PAPER, FlairConfig
from diffgraft_flair.method import adjusted, at, data_steps, prior_step, squared_norm, start_of, weights_of
from diffgraft_flair.schedules import ensure_flow, even, times

__all__ = ["Flair", "measured_on"]
__version__ = "0.1.0"

RATE = 0.1
"""Of the steps on the measurement, for an operator that keeps the size of some picture (official configs)."""
ENOUGH = 1e-4
"""Mean square at which these steps stop (official configs, whose noise is 0.01)."""


@dataclass
class Search:
    """Of one run: mu and the noise n that this step asks about it with [batch, ...], float32, in the layout of ``scheduler.step``."""

    mu: Tensor | None = None
    n: Tensor | None = None
    begin: bool = False
    """Whether the pipeline's own noise is what it would ask about: at the first step."""
    problem: Problem | None = None
    rate: float = 0.0
    weights: Tensor | None = None
    """w(t) [N] at t = 1 ... 0."""
    ended: bool = False


class Flair(Plugin):
    name = "flair"
    paper = PAPER
    families = ("sd3", "flux", "chroma", "auraflow", "cogview4")
    not_on: ClassVar[dict[str, str]] = begins_with_its_own("FLAIR")
    Config = FlairConfig
    State = Search
    neutral: ClassVar[dict[str, Any]] = {"problem": None}
    active: ClassVar[dict[str, Any]] = {"weight": 0.5}
    effects = Effects(
        replaces=frozenset({"scheduler"}),
        edits=frozenset({"latents", "schedule"}),
        needs=frozenset({"own_steps", "gradients", "all_blocks"}),  # through the decoder; each level is asked about other noise
        stochastic=True,
    )
    needs = (Need("problem", "problem"), Need("artefact", "artefact", fits=frozenset(), holds=HOLDS))
    calibration = Measure
    tune: ClassVar[dict[str, Any]] = {"weight": (0.25, 0.5, 1.0), "adjust": (0.0, 0.5, 1.0)}
    config: FlairConfig

    def check(self, target: Target) -> None:
        if self.config.problem is not None:
            ensure_decodes(target.pipe, target.family)
            ensure_flow(self.name, target.family, target.pipe.scheduler, self.config.t_min is not None)

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.problem is None:
            return next(call)
        ensure_flow(self.name, call.family, call.pipe.scheduler, self.config.t_min is not None)
        if self.config.subtract and call.given("artefact") is None:
            call.note("subtract is of calibrated weights, and none are given: nothing is subtracted")
        call.shared.__init__()  # an outer plugin may run the pipeline several times
        result = next(call)
        search: Search = call.shared
        if search.mu is not None and search.problem is not None and search.ended:  # a stopped run gives what it had, which is not mu
            problem, knobs = search.problem, self.config
            residual = problem.residual(pixels_of(call, search.mu))
            call.record({"residual": residual})
            grey = problem.residual(torch.zeros((1, *problem.shape[1:]), device=problem.y.device))
            explained = residual <= torch.maximum(grey, torch.full_like(grey, problem.noise))
            if knobs.weight and knobs.data_weight and knobs.data_steps and not bool(explained.all()):
                call.note(f"what was found explains y worse than a grey picture: give a smaller lr_data than {search.rate:.3g}")
        return result

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        own: Schedule = next(call)
        if self.config.problem is None or self.config.t_min is None:
            return own
        if said := [name for name in ("timesteps", "sigmas") if call.run.arguments.get(name) is not None]:
            call.note(f"the call says {' and '.join(said)} itself: t_min is not used")
            return own
        return even(call.scheduler, own, times(len(own.timesteps), self.config.t_min))

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        if self.config.problem is None:
            return next(call)  # type: ignore[no-any-return]
        search: Search = call.shared
        if search.mu is None:
            self._begin(call, search)
        if search.begin:
            call = call.with_latents(noisy(search, levels_of(call).s).to(call.latents.dtype))
        return next(call)  # type: ignore[no-any-return]

    def _begin(self, call: DenoiseCall, search: Search) -> None:
        """mu = pinv(y), and the pipeline's own noise on it."""
        ensure_graphs(call)
        search.problem = problem_of(call, self.name)
        mu = first_guess(call, search.problem, self.name)
        search.rate = RATE / size_of(search.problem) if self.config.lr_data is None else self.config.lr_data
        artefact = call.given("artefact")
        if artefact is not None:
            search.weights = weights_of(artefact.tensors["loss"], self.config.subtract).to(mu)
        search.mu, search.n, search.begin = mu, unit_noise(call), True

    def step(self, call: StepCall, next: Any) -> StepOutput:
        out: StepOutput = next(call)  # so that the scheduler knows where it is
        search: Search = call.shared
        if search.mu is None:
            return out
        knobs, mu, n, t = self.config, search.mu, search.n, levels_of(call).s
        assert n is not None
        v = call.model_output.float()
        n_hat = start_of(mu, n, v, t)
        w = knobs.weight * (torch.ones_like(t) if search.weights is None else at(search.weights, t))
        mu = prior_step(mu, n, v, knobs.lr * w)
        mu, taken = self._to_the_measurement(call, search, mu, w)
        call.count("data steps", taken)
        call.acted()
        search.mu, search.begin, dtype = mu, False, out.sample.dtype
        if call.step.ends_schedule:
            search.ended = True
            return StepOutput(mu.to(dtype), mu.to(dtype))
        after = levels_next(call).s
        search.n = adjusted(n_hat, call.noise(), knobs.adjust * (1 - after))
        return StepOutput(noisy(search, after).to(dtype), mu.to(dtype))

    def _to_the_measurement(self, call: StepCall, search: Search, mu: Tensor, w: Tensor) -> tuple[Tensor, int]:
        """mu after the hard steps on the measurement, through the autoencoder where there is one, and how many there were."""
        knobs, problem = self.config, search.problem
        assert problem is not None
        if not (knobs.data_weight and knobs.weight):
            return mu, 0

        def misfit(x: Tensor) -> Tensor:
            return (problem.operator.A(pixels_of(call, x)) - problem.y).square().flatten(1).sum(1)

        enough = (problem.noise**2 or ENOUGH) if knobs.enough is None else knobs.enough
        return data_steps(mu, misfit, search.rate * knobs.data_weight * w, knobs.data_steps, enough * problem.y[0].numel())


def noisy(search: Search, t: Tensor) -> Tensor:
    """x_t = (1 - t) mu + t n."""
    assert search.mu is not None
    assert search.n is not None
    return (1 - t) * search.mu + t * search.n


def size_of(problem: Problem) -> float:
    """|| A ||^2, the most that A makes of a picture's square; 1 for an operator that is not linear."""
    operator = problem.operator
    if not operator.linear:
        return 1.0
    if isinstance(operator, Rows):
        return float(operator.c)
    return squared_norm(operator.A, operator.AT, torch.zeros((1, *problem.shape[1:]), device=problem.y.device))


def measured_on(pipe: Any, pictures: Iterable[tuple[Tensor, Mapping[str, Any]]]) -> Artefact:
    """The artefact of real pictures, as the paper measures it; :meth:`Artefact.save` writes it.

    Args:
        pipe: the pipeline that it is for, without plugins.
        pictures: a picture [3, h, w] in [-1, 1] with the arguments of the call that would make it: its prompt, ``num_inference_steps``
            (at how many t its loss is measured), a generator of the noise.

    Raises:
        ConfigError: there are none, of another size than their calls', or their calls have different numbers of steps.
    """
    return measured(Flair(), pipe, pictures)
