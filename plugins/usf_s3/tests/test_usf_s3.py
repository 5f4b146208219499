"""USF: known solvers as decisions against diffusers', data whose score is known, schedules as JSON, the search, in pipelines."""

from __future__ import annotations

import json
import math
import random
from typing import ClassVar

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Paper, Plugin, Unsupported, load_pipeline, unload
from diffgraft.installed.registry import find_family
from diffgraft.methods.findings import Finding
from diffgraft.methods.fitness import TrajectoryFitness
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.search import Plan, look, search, search_call
from diffgraft.testing import contract_cases
from diffgraft_pipelines.tiny import make
from diffgraft_usf_s3 import USFS3, Corrector, SolverSchedule, SolverScheduleScheduler, known_solver, solver_schedule
from diffgraft_usf_s3.method import CLEAN, Level, NoiseSchedule, differences, phi, relaxation, update
from diffgraft_usf_s3.schedulers import estimates
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSinglestepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
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
    """The end of a run of a diffusers solver on the same levels (its "bh1" makes 0 x inf of a clean end)."""
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
    end = 0.0 if name == "unipc bh1" else end
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


@pytest.mark.parametrize("n", [1, 4, 10])
def test_order_one_is_ddim(n):
    ddim = DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    ddim.set_timesteps(n)
    x, at = noise(), NoiseSchedule(1000, 0.5 * ddim.alphas_cumprod.double().log().numpy())
    for t in ddim.timesteps:
        x = ddim.step(of_mixture(x, at.level(float(t))), t, x).prev_sample
    ours = walk(scheduler_of(solver_schedule([float(t) for t in ddim.timesteps], 0.0, "ddim")), noise(), n)
    torch.testing.assert_close(ours, x, rtol=0, atol=1e-6)


def flow_walk(scheduler, x, sigmas):
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        at = Level(1 - float(sigma), float(sigma))
        x = scheduler.step(said(of_mixture(x, at), x, at, "flow_prediction") if at.alpha else x - MEAN_OF_MIXTURE, t, x).prev_sample
    return x


MEAN_OF_MIXTURE = float((SHARES * MEANS).sum())
"""x0 that the denoiser sees in pure noise, where eps is the sample itself."""


@pytest.mark.parametrize(("name", "order", "tolerance"), [("ddim", 1, 4e-6), ("unipc", 2, 1e-6), ("unipc", 3, 1e-6)])
def test_flow_models(name, order, tolerance):
    """Against FlowMatchEuler and diffusers' UniPC on flow sigmas; pure noise is taken for a signal level of 1e-6."""
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(8)
    their = euler
    if name == "unipc":
        their = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, solver_order=order)
        their.set_timesteps(8)
        their.sigmas = euler.sigmas.double().clamp(max=1 - 1e-6)
    x = flow_walk(their, noise(), euler.sigmas)
    ours = SolverScheduleScheduler(prediction_type="flow_prediction", shift=3.0, solver=name, solver_order=order)
    ours.set_timesteps(8)
    torch.testing.assert_close(ours.timesteps, euler.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(flow_walk(ours, noise(), euler.sigmas), x, rtol=0, atol=tolerance)


# the equations --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["eps", "x0"])
@pytest.mark.parametrize(("start", "active"), [(-1, ()), (-1, (-2,)), (-2, (-1, -3)), (-2, (-1, -3, -4)), (-1, (-2, -3, -4))])
def test_a_step_is_the_exact_integral_of_the_polynomial(kind, start, active):
    """Semi-linear form by quadrature, the polynomial by Lagrange: shares no formula with phi and the Taylor differences."""
    past, target = [Level(math.tanh(a), 1 / math.cosh(a)) for a in (0.2, 0.35, 0.6, 0.8)], Level(math.tanh(1.1), 1 / math.cosh(1.1))
    over = update(past, target, kind, [active] * len(active), start)
    m = np.array([0.7, -1.1, 0.4, 2.0])
    nodes = [start, *active]
    lam, s = np.linspace(past[start].lam, target.lam, 20001), past[start]
    polynomial = sum(
        m[i] * np.prod([(lam - past[j].lam) / (past[i].lam - past[j].lam) for j in nodes if j != i], axis=0) * np.ones_like(lam)
        for i in nodes
    )
    weight, sign = (np.exp(target.lam - lam), -target.sigma) if kind == "eps" else (np.exp(lam - target.lam), target.alpha)
    ratio = target.alpha / s.alpha if kind == "eps" else target.sigma / s.sigma
    exact = ratio * 0.9 + sign * np.trapezoid(weight * polynomial, lam)
    assert over.base * 0.9 + sum(w * m[k] for k, w in over.weights) == pytest.approx(exact, abs=1e-8)


@pytest.mark.parametrize("z", [-9.0, -1.5, -0.9, -1e-3, 1e-6, 0.7, 4.0])
def test_phi(z):
    """phi_i(z) = int_0^1 e^{(1 - u) z} u^i / i! du, and the recursion."""
    u = np.linspace(0, 1, 200001)
    for i in range(4):
        assert phi(i, z) == pytest.approx(float(np.trapezoid(np.exp((1 - u) * z) * u**i / math.factorial(i), u)), rel=1e-6)
        if abs(z) > 0.5:
            assert phi(i + 1, z) == pytest.approx((phi(i, z) - 1 / math.factorial(i + 1)) / z, rel=1e-9)


def test_differences_are_exact_for_polynomials():
    nodes, coefficients = [1.1, -0.2, -0.9], [0.7, -1.2, 0.5, 2.0]  # about 0.3
    value = lambda x: sum(c * (x - 0.3) ** k for k, c in enumerate(coefficients))  # noqa: E731
    for i in (1, 2, 3):
        found = sum(a * (value(x) - value(0.3)) for a, x in zip(differences(nodes, 0.3, i), nodes, strict=True))
        assert found == pytest.approx(math.factorial(i) * coefficients[i])
    assert differences([0.5], 0.3, 1) == [pytest.approx(5)]


@pytest.mark.parametrize("kind", ["eps", "x0"])
def test_relaxations_are_one_plus_order_h(kind):
    h, z = 0.8, 0.8 if kind == "eps" else -0.8
    e = math.expm1(z)
    told = {"dpm2": 0.5 * z * e / (e - z), "bh2": 0.5 * z * e / (e - z), "bh1": 0.5 * z * z / (e - z), "exp+": 1 + e / 2, "exp-": 1 - e / 2}
    for name, value in {**told, 0.25: 1.2, None: 1.0}.items():
        assert relaxation(name, h, kind) == pytest.approx(value)
        assert abs(relaxation(name, 1e-4, kind) - 1) < 1e-4


@pytest.mark.parametrize("kind", KINDS[:3])
def test_every_prediction_says_the_same(kind):
    schedule = SolverSchedule.parse({"timesteps": TIMES, "end": 0.0, "steps": MIXED})
    torch.testing.assert_close(walk(scheduler_of(schedule, kind), noise(), 9), walk(scheduler_of(schedule), noise(), 9), rtol=0, atol=1e-9)
    x0, eps = noise(), noise(seed=1)
    at = Level(0.6, 0.4) if kind == "flow_prediction" else Level(0.6, 0.8)
    x = at.alpha * x0 + at.sigma * eps
    for each, told in zip(estimates(x, said(eps, x, at, kind), at, kind, True), (x0, eps), strict=True):
        torch.testing.assert_close(each, told)


MIXED = [
    {"type": "eps", "correct": {"order": 2}},
    {"order": 2, "relax": "bh1", "correct": {"order": 3, "points": [[-1], [-1, -3]]}},
    {"type": "eps", "order": 3, "points": [[-2], [-3, -2]], "relax": 0.07},
    {"type": "x0", "order": 4, "correct": {"order": 5}},
    {"type": "eps", "order": 2, "start": -2, "points": [[-1]], "relax": "dpm2"},
    {"order": 3, "relax": "exp+"},
    {"type": "eps", "order": 2, "relax": "exp-", "correct": {"order": 3}},
    {"order": 4},
    {"order": 2},
]


def written_out(schedule, levels, x, model):
    """The end of a run by a plain implementation that keeps all of the past and solves for the derivatives anew; model(x, k) is eps."""

    def made(part, start, states, values, k, kind):
        s, t = levels[: len(values)][start], levels[k + 1]
        m = [value[kind] for value in values]
        h, z = t.lam - s.lam, (t.lam - s.lam) * (1 if kind == "eps" else -1)
        ratio, outer = (t.alpha / s.alpha, -t.sigma) if kind == "eps" else (t.sigma / s.sigma, t.alpha)
        x = ratio * states[start] + outer * h * (math.expm1(z) / z) * m[start]
        phis = [math.expm1(z) / z]
        for i in range(1, part.order):
            phis.append((phis[-1] - 1 / math.factorial(i)) / z)
        for i, active in enumerate(part.active(start), 1):
            away = np.array([levels[: len(values)][j].lam - s.lam for j in active])
            V = np.stack([away**j / math.factorial(j) for j in range(1, len(active) + 1)])
            a = np.linalg.solve(V, np.eye(len(active))[i - 1])
            slope = sum(w * (m[j] - m[start]) for w, j in zip(a.tolist(), active, strict=True))
            x = x + outer * h ** (i + 1) * phis[i] * slope * (relaxation(part.relax, h, kind) if i == 1 else 1)
        return x

    states, values = [], []
    for k, step in enumerate(schedule.steps):
        eps = model(x, k)
        values.append({"eps": eps, "x0": (x - levels[k].sigma * eps) / levels[k].alpha})
        before = schedule.steps[k - 1] if k else None
        if before is not None and before.correct is not None:
            x = made(before.correct, before.start - 1, [*states, x], values, k - 1, before.type)
        states.append(x)
        x = made(step, step.start, states, values, k, step.type)
    return x


def test_a_mixed_run_against_the_equations_written_out():
    """Every decision at once."""
    schedule = SolverSchedule.parse({"timesteps": TIMES, "end": 0.0, "steps": MIXED})
    scheduler = scheduler_of(schedule)
    levels = [scheduler.noise.level(t) for t in [*TIMES, 0.0]]
    x = written_out(schedule, levels, noise(), lambda x, k: of_mixture(x, levels[k]))
    torch.testing.assert_close(walk(scheduler, noise(), len(TIMES)), x, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("name", "order", "expected"), [
    ("ddim", 1, 1.0), ("dpm++ heun", 2, 2.0), ("dpm++", 2, 2.0), ("dpm", 2, 2.0), ("dpm++", 3, 3.0), ("dpm", 3, 3.0), ("unipc", 2, 2.0),
])  # fmt: skip
def test_order_of_convergence(name, order, expected):
    scheduler = scheduler_of()
    ends = [scheduler.noise.level(t).lam for t in (980.0, 5.0)]

    def end(name, order, n):
        times = [scheduler.noise.t(float(x)) for x in np.linspace(*ends, n + 1)]
        return walk(scheduler_of(solver_schedule(times[:-1], times[-1], name, order)), noise(), n)

    # on the straight lines between training timesteps: errors of a spline's kinks would hide order 3
    reference = end("dpm++", 3, 1200)
    found = [float((end(name, order, n) - reference).square().mean().sqrt()) for n in (20, 40)]
    assert expected - 0.35 < math.log2(found[0] / found[1]), found


# the corrector --------------------------------------------------------------------------------------------------------------------


def test_the_corrector_fires_and_costs_no_call():
    """What the forbidden toy does not: the state at which the next step begins is another one, from the new value of the model."""
    plain = solver_schedule(TIMES, 0.0, "dpm++", 2)
    steps = [step.model_copy(update={"correct": Corrector(order=step.order + 1)}) for step in plain.steps[:-1]]
    corrected = SolverSchedule(timesteps=plain.timesteps, end=0.0, steps=(*steps, plain.steps[-1]))
    calls = []

    def counted(x, at):
        calls.append(at)
        return of_mixture(x, at)

    ends = [walk(scheduler_of(each), noise(), len(TIMES), counted) for each in (plain, corrected)]
    assert len(calls) == 2 * len(TIMES)
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3
    for k in range(len(TIMES) - 1):  # each of them
        one = [step if i == k else step.model_copy(update={"correct": None}) for i, step in enumerate(corrected.steps)]
        found = walk(scheduler_of(corrected.model_copy(update={"steps": tuple(one)})), noise(), len(TIMES))
        assert float((found - ends[0]).abs().max()) > 1e-6, k


def test_what_somebody_put_into_the_latents_stays():
    """The corrector leaves edited elements alone, and the others are as without the edit."""
    schedule = solver_schedule(TIMES, 0.0, "unipc", 2)

    def edit(k, x):
        if k == 3:
            x = x.clone()
            x[:5] = 0.25
        return x

    found = walk(scheduler_of(schedule), noise(), len(TIMES), edit=edit)
    assert bool((scheduler_states(schedule, edit)[4][:5] == 0.25).all())
    torch.testing.assert_close(found[5:], walk(scheduler_of(schedule), noise(), len(TIMES))[5:], rtol=0, atol=1e-12)


def scheduler_states(schedule, edit):
    """The states that the steps begin at."""
    scheduler, states = scheduler_of(schedule), []
    remember = scheduler._remember
    scheduler._remember = lambda past, value: (states.append(value) if past is scheduler._states else None, remember(past, value))[1]
    walk(scheduler, noise(), len(schedule.timesteps), edit=edit)
    return states


def test_the_analytical_first_step_saves_a_call():
    """Where the denoiser takes pure noise for the noise (eps = x), it is the run that asks it there, with a call less."""
    steps = [{"type": "eps"}, {"type": "eps", "order": 2, "correct": {"order": 3}}, {"order": 3}, {"order": 2, "start": -2}]
    asked = SolverSchedule.parse({"timesteps": [999, 700, 420, 150], "end": 0, "steps": steps})
    saved = SolverSchedule.parse({"timesteps": [700, 420, 150], "end": 0, "first": "zero_x0", "steps": steps[1:]})
    assert SolverSchedule.parse(json.loads(json.dumps(saved.plain()))) == saved
    scheduler, first = scheduler_of(saved), Level(*scheduler_of().noise.level(999))

    def model(x, at):
        return x if at == first else of_mixture(x, at)

    scheduler.set_timesteps(3)
    x, calls = noise(), 0
    for k, t in enumerate(scheduler.timesteps):
        seen, calls = scheduler.scale_model_input(x, t), calls + 1
        assert torch.equal(seen, x) == (k > 0)
        x = scheduler.step(model(seen, scheduler.noise.level(saved.timesteps[k])), t, x).prev_sample
    assert calls == 3
    torch.testing.assert_close(x, walk(scheduler_of(asked), noise(), 4, model), rtol=0, atol=1e-9)
    scheduler.set_timesteps(3)
    scheduler.set_begin_index(0)  # which SDXL does too
    scheduler.add_noise(noise(), noise(seed=1), scheduler.timesteps[:1])  # image to image: it begins at the first timestep
    assert torch.equal(scheduler.scale_model_input(noise(), scheduler.timesteps[0]), noise())


# runs -----------------------------------------------------------------------------------------------------------------------------


def test_a_run_that_begins_in_mid_schedule_has_no_history():
    schedule = SolverSchedule.parse({"timesteps": TIMES, "end": 0.0, "steps": MIXED})
    tail = SolverSchedule(timesteps=TIMES[4:], end=0.0, steps=[step.within(k + 1) for k, step in enumerate(schedule.steps[4:])])
    assert [step.order for step in tail.steps] == [1, 2, 2, 4, 2]
    torch.testing.assert_close(walk(scheduler_of(schedule), noise(), 9, begin=4), walk(scheduler_of(tail), noise(), 5), rtol=0, atol=1e-12)


def test_half_precision_states_are_kept_exactly():
    scheduler = scheduler_of(solver_schedule(TIMES, 0.0, "unipc", 2))
    scheduler.set_timesteps(9)
    x = noise().bfloat16()
    for k, t in enumerate(scheduler.timesteps):
        if k == 5:
            assert scheduler._exact.dtype == torch.float32
            assert torch.equal(scheduler._exact.bfloat16(), x)
            assert not torch.equal(scheduler._exact, x.float())
        x = scheduler.step(of_mixture(x.double(), scheduler.noise.level(TIMES[k])).bfloat16(), t, x).prev_sample
        assert x.dtype == torch.bfloat16
    assert scheduler._exact is None, "the run is over"
    assert not scheduler._states


def test_steps_read_no_value():
    """No step waits for a device: nothing in it asks a tensor for a number."""
    from torch.utils._python_dispatch import TorchDispatchMode

    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            asked.append(str(func))
            return func(*args, **(kwargs or {}))

    scheduler = scheduler_of(SolverSchedule.parse({"timesteps": TIMES, "end": 0.0, "steps": MIXED}))
    scheduler.set_timesteps(9)
    x = noise()
    for t in scheduler.timesteps:
        with Watch():
            x = scheduler.step(x * 0.1, t, x).prev_sample
    assert asked
    assert not [name for name in asked if "local_scalar" in name or "nonzero" in name or "is_nonzero" in name]


def test_levels_are_ddims():
    scheduler, ddim = SolverScheduleScheduler(**SD), DDIMScheduler(**SD)
    x, eps, at = noise(3), noise(3, 1), torch.tensor([10, 400, 999])
    torch.testing.assert_close(scheduler.add_noise(x, eps, at), ddim.add_noise(x, eps, at), rtol=1e-5, atol=1e-6)
    assert [scheduler.noise.t(scheduler.noise.level(t).lam) for t in (0.0, 17.25, 999.0)] == pytest.approx([0, 17.25, 999], abs=1e-6)
    assert SolverScheduleScheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction").noise.level(
        999
    ).alpha == pytest.approx(2.0**-12)


def test_own_timesteps_and_sigmas_are_run():
    scheduler = SolverScheduleScheduler(**SD, solver="dpm++")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == [900, 500, 100]
    told = scheduler.sigmas.clone()
    scheduler.set_timesteps(sigmas=told.tolist())
    torch.testing.assert_close(scheduler.timesteps, torch.tensor([900.0, 500.0, 100.0]), rtol=0, atol=1e-2)
    scheduler.timesteps = torch.tensor([800.0, 300.0])
    assert scheduler.num_inference_steps == 2
    scheduler.sigmas = torch.tensor([1.0, 1.0, 0.0])
    assert scheduler.sigmas[-1] == 0
    assert torch.isfinite(walk_on(scheduler, noise())).all(), "a clean end is reached by order 1"
    for bad, why in (
        ({"timesteps": [1, 2]}, "smaller"),
        ({"timesteps": [5], "sigmas": [1.0]}, "one of"),
        ({"num_inference_steps": 3, "mu": 1.0}, "flow"),
    ):
        with pytest.raises(ValueError, match=why):
            scheduler.set_timesteps(**bad)


def walk_on(scheduler, x):
    for k, t in enumerate(scheduler.timesteps):
        x = scheduler.step(of_mixture(x, scheduler.noise.level(scheduler._times[k])), t, x).prev_sample
    return x


def test_it_is_a_scheduler_that_can_be_kept(tmp_path):
    schedule = solver_schedule([900.0, 400.0, 50.5], 0.0, "unipc")
    scheduler = SolverScheduleScheduler(**SD, solver_schedule=schedule.plain())
    scheduler.save_pretrained(tmp_path)
    again = SolverScheduleScheduler.from_pretrained(tmp_path)
    assert again.given == schedule
    assert torch.equal(walk(again, noise(), 3), walk(scheduler, noise(), 3))


# schedules as JSON ----------------------------------------------------------------------------------------------------------------


def test_json_and_back(tmp_path):
    schedule = SolverSchedule.parse({"timesteps": TIMES, "end": 0.0, "steps": MIXED})
    text = json.dumps(schedule.plain())
    path = tmp_path / "schedule.json"
    path.write_text(text)
    assert (
        SolverSchedule.parse(text)
        == SolverSchedule.parse(path)
        == SolverSchedule.parse(str(path))
        == SolverSchedule.parse(schedule)
        == schedule
    )
    assert json.loads(text)["steps"][1]["correct"] == {"order": 3, "points": [[-1], [-1, -3]]}
    for name in ("ddim", "dpm", "dpm++", "dpm++ heun", "unipc", "unipc bh1", "dpm++ 2s"):
        for n in (1, 2, 5):
            for order in (1, 2, 3):
                made = solver_schedule(TIMES[:n], 0.0, name, order)
                assert SolverSchedule.parse(json.loads(json.dumps(made.plain()))) == made


def bad(**change):
    return {"timesteps": [900, 500, 100], "end": 0.0, "steps": [{}, {"order": 2}, {"order": 2}], **change}


@pytest.mark.parametrize(("given", "why"), [
    (bad(timesteps=[900, 500, 500]), "500 follows 500: each must be smaller"),
    (bad(end=100), "100 follows 100"),
    (bad(timesteps=[900, "500", 100]), "timesteps.1 = '500'"),
    (bad(timesteps=[900, True, 100]), "timesteps.1 = True"),
    (bad(timesteps=[900, math.nan, 100]), "timesteps.1 = nan"),
    (bad(timesteps=[]), "timesteps"),
    (bad(timestep=[1]), "timestep is no field; did you mean 'timesteps'"),
    (bad(steps=[{}, {}]), "2 decisions for 3 timesteps"),
    (bad(steps=[{}, {"ordr": 2}, {}]), "steps.1.ordr is no field; did you mean 'order'"),
    (bad(steps=[{"order": 2}, {}, {}]), "steps.0: order 2 needs 2 values of the model, and there are 1"),
    (bad(steps=[{}, {"order": 5}, {}]), "steps.1.order = 5"),
    (bad(steps=[{}, {"order": True}, {}]), "steps.1.order = True"),
    (bad(steps=[{}, {"order": 2, "points": [[-1]]}, {}]), r"steps.1: points = \[-1\] for derivative 1.*none the start's"),
    (bad(steps=[{}, {"order": 2, "points": [[-3]]}, {}]), "steps.1: points"),
    (bad(steps=[{}, {}, {"order": 3, "points": [[-2], [-2]]}]), r"for derivative 2: 2 or more"),
    (bad(steps=[{}, {}, {"order": 3, "points": [[-2]]}]), "points has 1 lists, order 3 has 2"),
    (bad(steps=[{}, {"start": -3}, {}]), "steps.1: it starts at -3, and there are 2 values"),
    (bad(steps=[{}, {"start": 0}, {}]), "steps.1.start = 0"),
    (bad(steps=[{}, {"type": "v"}, {}]), "steps.1.type = 'v'"),
    (bad(steps=[{}, {"order": 2, "relax": "bh3"}, {}]), "steps.1.relax = 'bh3': 'dpm2', 'bh1'.*'exp-', or a finite number c$"),
    (bad(steps=[{}, {"order": 2, "relax": math.nan}, {}]), "steps.1.relax = nan: 'dpm2'"),
    (bad(steps=[{}, {"relax": 0.1}, {}]), "steps.1: relax = 0.1 is a factor of the first derivative, and order 1 has none"),
    (bad(steps=[{"correct": {"order": 3}}, {}, {}]), "steps.0.correct: order 3 needs 3 values of the model, and there are 2"),
    (bad(steps=[{"correct": {"order": 1}}, {}, {}]), "steps.0.correct.order = 1"),
    (bad(steps=[{}, {"correct": {"order": 2, "points": [[-3]]}}, {}]), "leave out -1.*correct nothing"),
    (bad(steps=[{}, {}, {"correct": {"order": 2}}]), "steps.2.correct: nothing is known at the end of the last step"),
    (bad(end=None), "steps.2: the clean sample"),
    ("no such file.json", "no JSON file"),
    ("{", "no JSON file"),
    ([1], r"schedule: \[1\]: give a dict of timesteps, end, first, steps"),
    (bad(steps=[{}, {"correct": True}, {}]), "steps.1.correct = True: give a dict of order, points, relax"),
    (bad(steps=[{}, 2, {}]), "steps.1 = 2: give a dict of order, points, relax, type, start, correct"),
    ({"steps": []}, "timesteps is missing"),
    ({"made_for": {}, "facts": {}}, "give it as artefact="),
])  # fmt: skip
def test_bad_schedules_are_refused(given, why):
    with pytest.raises(ConfigError, match=why):
        SolverSchedule.parse(given)


# in pipelines ---------------------------------------------------------------------------------------------------------------------


def tiny(name="StableDiffusionPipeline", scheduler=DDIMScheduler, **options):
    made = make(name)
    if name == "StableDiffusionPipeline":
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, clip_sample=False, **options)
    made.pipe.set_progress_bar_config(disable=True)
    return made


def call(made, n=3, **more):
    told = {"num_inference_steps": n, "generator": torch.Generator().manual_seed(0), "output_type": "latent", **more}
    return made.pipe(**{**made.kwargs, **told})[0]


SCHEDULE = {
    "timesteps": [900, 500, 100],
    "end": 0.0,
    "steps": [{"correct": {"order": 2}}, {"type": "eps", "order": 2}, {"order": 3, "relax": -0.1}],
}


def test_what_does_not_fit_is_refused_before_anything_runs(monkeypatch, tmp_path):
    made = tiny()
    asked = []
    monkeypatch.setattr(type(made.pipe.unet), "forward", lambda *args, **kwargs: asked.append(1))
    for knobs, why in (
        ({"schedule": bad(timesteps=[900, 100, 500])}, "500 follows 100"),
        ({"schedule": bad(timesteps=[1200, 500, 100])}, r"\[1200.0\] are outside of the model's 0 to 999"),
        ({"schedule": "none.json"}, "none.json"),
        ({"schedule": SCHEDULE, "artefact": "x.json"}, "exclude each other"),
        ({"artefact": tmp_path / "x.json"}, "diffgraft evolve usf_s3"),
        ({"schedule": {**bad(timesteps=[999, 500, 100]), "first": "zero_x0"}}, "zero_x0' steps from 999 to the first of timesteps"),
        ({"schedule": {**bad(), "first": "x"}}, "first = 'x'"),
        ({"schedule": SCHEDULE, "solver": "dpm++"}, "solver = 'dpm[+][+]' is of a known solver.*schedule=None runs the known solver"),
        ({"artefact": tmp_path / "x.json", "order": 3}, "order = 3 is of a known solver.*artefact=None runs"),
        ({"solver": "heun"}, "solver = 'heun'"),
        ({"order": 4}, "order = 4"),
    ):
        with pytest.raises(ConfigError, match=why):
            load_pipeline(made.pipe, plugins=[("usf_s3", knobs)])
        assert not hasattr(made.pipe, "plugins")
    for scheduler in (EulerAncestralDiscreteScheduler, LCMScheduler):
        other = tiny(scheduler=scheduler)
        with pytest.raises(Unsupported):
            load_pipeline(other.pipe, plugins=["usf_s3"])
    load_pipeline(made.pipe, plugins=[USFS3(schedule=SCHEDULE)])
    with pytest.raises(ConfigError, match="for 3 steps, and this call makes 4: call it with num_inference_steps=3"):
        call(made, 4)
    assert not asked
    flow = tiny("FluxPipeline")
    with pytest.raises(ConfigError, match=r"outside.*ends at the clean sample with end = null"):
        load_pipeline(flow.pipe, plugins=[USFS3(schedule=SCHEDULE)])
    with pytest.raises(ConfigError, match="is not for flow models"):
        load_pipeline(flow.pipe, plugins=[USFS3(schedule={**SCHEDULE, "end": 1, "first": "zero_x0"})])


def test_an_analytical_first_step_in_a_pipeline():
    """The denoiser gets the noise scaled to the first timestep, where it would be taken for noise of the last one without."""
    made, ends = tiny(), []
    schedule = {"timesteps": [600, 300], "end": 0, "steps": [{"type": "eps"}, {"type": "eps"}]}
    load_pipeline(made.pipe, plugins=[USFS3(schedule=schedule)])
    for first in ("model", "zero_x0"):
        made.pipe.plugins.configure("usf_s3", schedule={**schedule, "first": first})
        ends.append(call(made, 2))
    assert torch.isfinite(ends[1]).all()
    assert not torch.allclose(ends[0], ends[1], rtol=1e-2)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, EulerDiscreteScheduler])
@pytest.mark.parametrize(("guidance", "pictures"), [(1.0, 1), (4.0, 2)])
def test_a_pipeline_against_a_loop_written_out(scheduler, guidance, pictures):
    """With a loop, guidance and levels of its own. Euler's latents are x / alpha, also the last ones where the end is not clean."""
    made = tiny(scheduler=scheduler)
    pipe, prompts, times = made.pipe, ["a red apple", "a blue car"][:pictures], [999, 640, 250, 60]
    schedule = SolverSchedule.parse({"timesteps": times, "end": 20, "steps": [*MIXED[:3], {"order": 4}]})
    abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)
    levels = [Level(float(abar[t].sqrt()), float((1 - abar[t]).sqrt())) for t in (*times, 20)]
    told, none = pipe.encode_prompt(prompts, "cpu", 2, True, [""] * pictures)
    x = torch.randn(2 * pictures, 4, 8, 8, generator=torch.Generator().manual_seed(0)).double()

    def model(x, k):
        say = lambda words: pipe.unet(x.float(), times[k], encoder_hidden_states=words).sample.double()  # noqa: E731
        return say(told) if guidance == 1 else torch.lerp(say(none), say(told), guidance)

    with torch.no_grad():
        x = written_out(schedule, levels, x, model) / (levels[-1].alpha if scheduler is EulerDiscreteScheduler else 1)
    load_pipeline(pipe, plugins=[USFS3(schedule=schedule.plain())])
    ours = call(made, 4, prompt=prompts, negative_prompt=[""] * pictures, num_images_per_prompt=2, guidance_scale=guidance)
    torch.testing.assert_close(ours.double(), x, rtol=0, atol=1e-5 * float(x.abs().max()))


def first_input(made, first, **more):
    """What the denoiser gets at first, of a run with ``first``."""
    seen = []
    denoiser = made.pipe.unet if hasattr(made.pipe, "unet") else made.pipe.transformer
    hook = denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))), with_kwargs=True
    )
    schedule = {"timesteps": [600, 300], "end": 0, "first": first, "steps": [{"type": "eps"}, {"type": "eps"}]}
    load_pipeline(made.pipe, plugins=[USFS3(schedule=schedule)])
    try:
        call(made, 2, output_type="np", **more)
    finally:
        own = made.pipe.scheduler
        unload(made.pipe)
        hook.remove()
    return seen[0], own


ANALYTICAL = (
    ("StableDiffusionPipeline", {}, True), ("StableDiffusionXLPipeline", {}, True), ("PixArtAlphaPipeline", {}, True),
    ("PixArtSigmaPipeline", {}, True), ("DiTPipeline", {}, True), ("StableDiffusionControlNetPipeline", {}, True),
    ("StableDiffusionInpaintPipeline", {"strength": 1.0}, True), ("StableDiffusionImg2ImgPipeline", {"strength": 1.0}, False),
    ("StableDiffusionXLImg2ImgPipeline", {"strength": 1.0}, False), ("StableDiffusionImg2ImgPipeline", {"strength": 0.5}, False),
)  # fmt: skip


@pytest.mark.parametrize(("name", "more", "pure"), ANALYTICAL)
def test_where_a_run_begins_in_pure_noise_the_analytical_step_is_made(name, more, pure):
    """SDXL and PixArt tell the scheduler that they begin at step 0, as image to image does at full strength."""
    (plain, own), (moved, _) = (first_input(tiny(name), first, **more) for first in ("model", "zero_x0"))
    levels = SolverScheduleScheduler.from_config({**own.config, "solver": "unipc"}).noise
    s, t = levels.level(levels.last), levels.level(600)
    factor = t.alpha / s.alpha - t.sigma * math.expm1(t.lam - s.lam) if pure else 1.0  # order 1 of eps = x
    torch.testing.assert_close(moved, plain * factor, rtol=1e-5, atol=1e-6)
    assert pure == (not torch.equal(moved, plain))


@pytest.mark.parametrize("name", ["denoising_start", "denoising_end"])
def test_a_part_of_a_run_is_refused_beside_a_schedule(name):
    """Its times are the pipeline's own, where another one takes over: those of the schedule would be dropped."""
    made = tiny("StableDiffusionXLPipeline" if name == "denoising_end" else "StableDiffusionXLImg2ImgPipeline")
    load_pipeline(made.pipe, plugins=[USFS3(schedule=SCHEDULE)])
    with pytest.raises(ConfigError, match=f"the call gives {name} = 0.8, and the solver schedule is of a whole run"):
        call(made, 3, **{name: 0.8})
    made.pipe.plugins.configure("usf_s3", schedule=None)
    assert torch.isfinite(call(made, 10, **{name: 0.8})).all()


def test_a_schedule_runs_and_asks_the_denoiser_once_a_step():
    made = tiny()
    plain = call(made)
    load_pipeline(made.pipe, plugins=[USFS3(schedule=SCHEDULE)])
    told = []
    first = call(made, callback_on_step_end=lambda pipe, i, t, kwargs: told.append(float(t)) or {})
    assert told == [900, 500, 100]
    assert not torch.equal(first, plain)
    assert torch.equal(call(made), first)
    made.pipe.plugins.configure("usf_s3", solver="off")
    assert torch.equal(call(made), plain)
    unload(made.pipe)
    assert torch.equal(call(made), plain)


class Watch(Plugin):
    """Counts the denoiser's forwards."""

    name = "watch_forwards"
    paper = Paper("none", "", "counts")
    families = ("*",)
    neutral: ClassVar[dict] = {}

    def denoise(self, call, next):
        return next(call)


def test_the_cost_is_one_forward_a_step():
    """Correctors and orders cost none."""
    made = tiny()
    load_pipeline(made.pipe, plugins=[USFS3(schedule=SCHEDULE), Watch])
    call(made)
    assert made.pipe.plugins.report().forwards == {"both": 3}


def test_the_callers_own_times_are_not_overridden_without_a_word():
    made = tiny(scheduler=UniPCMultistepScheduler)
    load_pipeline(made.pipe, plugins=[USFS3(schedule=SCHEDULE)])
    with pytest.raises(ConfigError, match=r"the call gives timesteps = \[800, 400, 50\], and the solver schedule has its own"):
        call(made, timesteps=[800, 400, 50])
    made.pipe.plugins.configure("usf_s3", schedule=None)
    told = []
    call(made, timesteps=[800, 400, 50], callback_on_step_end=lambda pipe, i, t, kwargs: told.append(float(t)) or {})
    assert told == [800, 400, 50]


def test_a_known_solver_in_a_pipeline_is_diffusers_own():
    """The default, in the pipeline, against UniPC of diffusers on the same levels."""
    made = tiny()
    load_pipeline(made.pipe, plugins=[USFS3()])
    ours = call(made, 5)
    unload(made.pipe)
    made.pipe.scheduler = UniPCMultistepScheduler.from_config(
        made.pipe.scheduler.config, timestep_spacing="linspace", final_sigmas_type="sigma_min", solver_order=2
    )
    theirs = call(made, 5)
    assert float((ours - theirs).abs().max()) < 2e-2 * float(theirs.abs().max()), "they round timesteps to whole numbers"


# the search -----------------------------------------------------------------------------------------------------------------------


def searcher_of(made, n=4, **knobs):
    plugin = USFS3()
    searcher = plugin.search("search", **knobs)
    probe, _, _ = look(made.pipe, plugin, lambda: call(made, n))
    searcher.prepare(probe)
    return searcher


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_known_solvers_are_in_the_first_generation(name):
    searcher = searcher_of(tiny(name))
    made = [searcher.first(random.Random(0), i, 50) for i in range(50)]
    schedules = [SolverSchedule.parse(genome) for genome in made if genome]
    assert all(len(schedule.steps) == 4 for schedule in schedules)
    for solver, order in (("unipc", 2), ("unipc", 3), ("dpm++", 2), ("dpm++ heun", 2), ("dpm++", 3), ("ddim", 1)):
        assert known_solver(solver, 4, order) in [schedule.steps for schedule in schedules], solver
    even = schedules[0]
    assert even.steps == known_solver("unipc", 4, 2)
    if name == "StableDiffusionPipeline":
        assert even.timesteps == (999.0, 749.25, 499.5, 249.75)
        assert even.end == 0
    else:
        assert even.end is None


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_what_is_drawn_can_be_run(name, n):
    """Every mutation and crossover is a legal schedule of as many steps; every field is reached."""
    made = tiny(name)
    searcher, rng = searcher_of(made, n, analytical=name != "FluxPipeline"), random.Random(0)
    scheduler = USFS3().make_scheduler(made.pipe.scheduler, find_family(type(made.pipe)))
    pool = [searcher.first(rng, i, 8) for i in range(8)]
    pool = [each for each in pool if each]
    for _ in range(200):
        child = rng.choice((
            lambda: searcher.mutate(rng, rng.choice(pool), 0), lambda: searcher.cross(rng, *rng.choices(pool, k=2)),
            lambda: searcher.draw(rng, 0),
        ))()  # fmt: skip
        if child is None:
            continue
        scheduler.checked(SolverSchedule.parse(child))
        assert len(child["timesteps"]) == n
        assert json.loads(json.dumps(child)) == child
        pool.append(child)
    assert len(pool) > 100
    steps = [step for genome in pool for step in genome["steps"]]
    if n == 5:
        assert {step["order"] for step in steps} == {1, 2, 3, 4}
        assert {step["type"] for step in steps} == {"eps", "x0"}
        assert any("points" in step for step in steps)
        assert any(isinstance(step.get("relax"), float) for step in steps)
        assert any(isinstance(step.get("relax"), str) for step in steps)
        assert any("correct" in step for step in steps)
        assert len({genome["end"] for genome in pool}) > 2
        assert any("first" in genome for genome in pool) != (name == "FluxPipeline")


def test_an_analytical_step_is_not_searched_for_a_flow_model():
    with pytest.raises(ConfigError, match="analytical = True is not for flow models"):
        searcher_of(tiny("FluxPipeline"), analytical=True)


def test_what_is_found_is_refused_where_the_denoiser_is_taken_to_say_something_else():
    """Another solver with the same noise and prediction is none of that."""
    made = tiny()
    found = search_call(made.pipe, USFS3(), lambda: call(made))
    config = made.pipe.scheduler.config
    made.pipe.scheduler = UniPCMultistepScheduler.from_config(config)
    load_pipeline(made.pipe, plugins=[USFS3(artefact=found)])
    unload(made.pipe)
    for other in ({"prediction_type": "v_prediction"}, {"beta_end": 0.02}):
        made.pipe.scheduler = DDIMScheduler.from_config(config, **other)
        with pytest.raises(ArtefactMismatch, match=f"other settings of the scheduler: {next(iter(other))} = "):
            load_pipeline(made.pipe, plugins=[USFS3(artefact=found)])


def test_a_search_finds_what_runs_and_fits_nothing_else(tmp_path):
    made = tiny()
    before = call(made)
    samples = [Sample(0, "a red apple"), Sample(1, "a blue car")]
    settings = CallSettings(
        steps=3, guidance_scale=made.kwargs.get("guidance_scale"), height=made.kwargs.get("height"), width=made.kwargs.get("width")
    )
    plan = Plan.of(5, mutations=2, crossovers=2, epochs=3)
    found = search(made.pipe, USFS3(), samples, settings, tmp_path / "found.json", TrajectoryFitness(12), plan=plan)
    assert found.facts["fitness"]["loss"] <= found.facts["fitness"]["loss_of_start"]
    assert torch.equal(call(made), before)
    again = Finding.load(tmp_path / "found.json", "usf_s3")
    assert SolverSchedule.parse(again.genome).plain() == found.genome
    load_pipeline(made.pipe, plugins=[USFS3(artefact=tmp_path / "found.json")])
    by_file = call(made)
    with pytest.raises(ArtefactMismatch, match=r"for 3 steps, and this call makes 4.*diffgraft evolve usf_s3"):
        call(made, 4)
    made.pipe.plugins.configure("usf_s3", artefact=None, schedule=found.genome)
    assert torch.equal(call(made), by_file)
    other = tiny()
    with torch.no_grad():
        for parameter in other.pipe.unet.parameters():
            parameter.mul_(1.01)
    with pytest.raises(ArtefactMismatch):
        load_pipeline(other.pipe, plugins=[USFS3(artefact=found)])
    with pytest.raises(ConfigError, match="leave them out"):
        search(tiny().pipe, USFS3(schedule=SCHEDULE), samples, settings, tmp_path / "b.json", TrajectoryFitness(4), plan=plan)
    for knobs in ({"solver": "off"}, {"solver": "dpm++"}, {"order": 3}):
        with pytest.raises(ConfigError, match="is not heeded, every candidate is a schedule"):
            search(tiny().pipe, USFS3(**knobs), samples, settings, tmp_path / "b.json", TrajectoryFitness(4), plan=plan)


def test_a_file_whose_schedule_is_none_is_refused(tmp_path):
    made = tiny()
    found = search_call(made.pipe, USFS3(), lambda: call(made))
    genome = {**found.genome, "timesteps": found.genome["timesteps"][::-1]}
    wrong = Finding(found.made_for, {}, {**found.facts, "genome": genome})
    with pytest.raises(ArtefactMismatch, match=r"its genome cannot be run.*each must be smaller"):
        load_pipeline(made.pipe, plugins=[USFS3(artefact=wrong)])


def test_contract_has_cases():
    assert contract_cases("usf_s3", ["sd"])


@pytest.mark.parametrize("name", ["LTX2Pipeline", "LTX2ImageToVideoPipeline"])
@pytest.mark.parametrize("solver", ["unipc", "dpm++ 2s"])
def test_a_picture_and_its_sound_are_each_solved_as_by_the_scheduler_alone(name, solver):
    def both(built):
        out = built.pipe(**{**built.kwargs, "num_inference_steps": 6, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))
        return out.frames, out.audio

    plain, built = make(name), make(name)
    plain.pipe.scheduler = USFS3(solver=solver).make_scheduler(plain.pipe.scheduler, find_family(type(plain.pipe)))
    load_pipeline(built.pipe, plugins=[USFS3(solver=solver)])
    for ours, expected in zip(both(built), both(plain), strict=True):
        assert torch.equal(ours, expected)
