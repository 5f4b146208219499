"""USF: known solvers as decisions against diffusers', data whose score is known, schedules as JSON, the search, in pipelines."""

from __future__ import annotations

import json
import math
import random

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import TrajectoryFitness
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.search import Plan, search, search_call
from diffgraft.testing import contract_cases
from diffgraft_pipelines.tiny import make
from diffgraft_usf_s3 import Corrector, Decision, SolverSchedule, SolverScheduleScheduler, USFS3, known_solver, solver_schedule
from diffgraft_usf_s3.method import CLEAN, Level, NoiseSchedule, differences, phi, relaxation, update
from diffgraft_usf_s3.schedulers import estimates
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
    UniPCMultistepScheduler,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
MEANS = torch.tensor([-1.5, 0.3, 1.2], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
TIMES = [999.0, 870.0, 731.0, 600.0, 421.0, 300.0, 200.0, 90.0, 33.0]


def of_mixture(x, at):
    """eps of the exact denoiser of a Gaussian mixture."""
    variance = (at.alpha * SPREADS) ** 2 + at.sigma**2
    away = x[..., None] - at.alpha * MEANS
    share = (SHARES.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
    return at.sigma * (share * away / variance).sum(-1)


def said(eps, x, at, kind):
    """``eps`` in the words of a denoiser of another kind."""
    x0 = (x - at.sigma * eps) / at.alpha
    return {"epsilon": eps, "v_prediction": at.alpha * eps - at.sigma * x0, "sample": x0, "flow_prediction": eps - x0}[kind]


def noise(n=64, seed=0):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scheduler_of(schedule=None, kind="epsilon", **options):
    made = SolverScheduleScheduler(**SD, prediction_type=kind, **options)
    made.set_schedule(schedule)
    return made


def walk(scheduler, x, n, model=of_mixture, begin=0, edit=None):
    """The end of a run from ``x``."""
    scheduler.set_timesteps(n)
    if begin:
        scheduler.set_begin_index(begin)
    for k, t in enumerate(scheduler.timesteps[begin:], begin):
        at = scheduler.noise.level(scheduler._times[k])
        output = said(model(x.double(), at), x.double(), at, scheduler.config.prediction_type)
        x = scheduler.step(output.to(x.dtype), t, x).prev_sample
        if edit is not None:
            x = edit(k, x)
    return x


def theirs(cls, x, times, end, **options):
    """The end of a run of a diffusers solver on the same levels."""
    scheduler = cls(**SD, **options)
    scheduler.set_timesteps(len(times))
    levels = NoiseSchedule(1000, 0.5 * scheduler.alphas_cumprod.double().log().numpy())
    told = [levels.level(t) for t in times] + [CLEAN if end is None else levels.level(end)]
    scheduler.sigmas = torch.tensor([at.sigma / at.alpha for at in told], dtype=torch.float64)
    scheduler.timesteps = torch.tensor(times)
    for at, t in zip(told, scheduler.timesteps, strict=False):
        x = scheduler.step(of_mixture(x, at), t, x).prev_sample
    return x


PP = {"algorithm_type": "dpmsolver++", "lower_order_final": True}


# known solvers --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", [0.0, None])
@pytest.mark.parametrize(("name", "order", "cls", "options"), [
    ("dpm++ heun", 2, DPMSolverMultistepScheduler, {**PP, "solver_type": "heun", "solver_order": 2}),
    ("dpm++", 2, DPMSolverMultistepScheduler, {**PP, "solver_type": "midpoint", "solver_order": 2}),
    ("unipc", 1, UniPCMultistepScheduler, {"solver_order": 1, "solver_type": "bh2"}),
    ("unipc", 2, UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh2"}),
    ("unipc", 3, UniPCMultistepScheduler, {"solver_order": 3, "solver_type": "bh2"}),
    ("unipc bh1", 2, UniPCMultistepScheduler, {"solver_order": 2, "solver_type": "bh1"}),
])  # fmt: skip
def test_known_solvers_are_diffusers(name, order, cls, options, end):
    ours = walk(scheduler_of(solver_schedule(TIMES, end, name, order)), noise(), len(TIMES))
    torch.testing.assert_close(ours, theirs(cls, noise(), TIMES, end, **options), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("name", "cls", "options"), [
    ("dpm", DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_order": 2}),
    ("dpm++ 2s", DPMSolverSinglestepScheduler, {**PP, "solver_order": 2, "final_sigmas_type": "sigma_min"}),
])  # fmt: skip
def test_known_solvers_that_have_no_clean_end(name, cls, options):
    """With start points the singlestep solver's second step begins where its first began."""
    ours = walk(scheduler_of(solver_schedule(TIMES, 0.0, name, 2)), noise(), len(TIMES))
    torch.testing.assert_close(ours, theirs(cls, noise(), TIMES, 0.0, **options), rtol=0, atol=1e-6)
