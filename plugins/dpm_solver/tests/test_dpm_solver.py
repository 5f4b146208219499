"""DPM-Solver: orders on data whose score is known, adaptive steps against a plain loop, diffusers' solvers, and in pipelines."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, Unsupported, load_pipeline, unload
from diffgraft.installed.planner import Part, plan
from diffgraft.installed.registry import find_family
from diffgraft.methods.noise_schedule import DeviceSchedule, Level, NoiseSchedule
from diffgraft.testing import contract_cases
from diffgraft_dpm_solver import DPMSolver, DPMSolverScheduler
from diffgraft_dpm_solver import method as M
from diffgraft_dpm_solver.adaptive import Seen, Walk
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)
from torch.utils._python_dispatch import TorchDispatchMode

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")
MEANS = torch.tensor([-1.5, 0.3, 1.2], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def of_mixture(x, at):
    """eps of the exact denoiser of a Gaussian mixture; ``at`` of all samples, or of each [batch, 1]."""
    alpha, sigma = (torch.as_tensor(each, dtype=torch.float64)[..., None] for each in (at.alpha, at.sigma))
    variance = (alpha * SPREADS) ** 2 + sigma**2
    away = x.double()[..., None] - alpha * MEANS
    share = (SHARES.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
    return sigma[..., 0] * (share * away / variance).sum(-1)


def said(eps, x, at, kind):
    """``eps`` in the words of a denoiser of another kind."""
    x0 = (x - at.sigma * eps) / at.alpha
    return {"epsilon": eps, "v_prediction": at.alpha * eps - at.sigma * x0, "sample": x0, "flow_prediction": eps - x0}[kind]


def level_of(scheduler, t):
    """Of one timestep, or of one for each sample."""
    lam = scheduler.schedule.lam(np.asarray(t, dtype=np.float64))
    if np.ndim(lam) == 0:
        return scheduler.schedule.level(float(lam))
    levels = [scheduler.schedule.level(float(each)) for each in lam]
    return M.Point(*(torch.tensor(column, dtype=torch.float64)[:, None] for column in zip(*levels, strict=True)))


def walk(scheduler, x, calls, model=of_mixture, begin=0, put=None, **options):
    """The end of a run from ``x``; ``put(k, x)`` edits the samples before call k."""
    if calls is not None:
        scheduler.set_timesteps(calls, **options)
    if begin:
        scheduler.set_begin_index(begin)
    for k, t in enumerate(scheduler.timesteps[begin:]):
        x = x if put is None else put(k, x)
        at = asked(scheduler, k + begin)
        seen = x.double() * (at.alpha if scheduler.config.exploding else 1)
        output = said(model(seen, at), seen, at, scheduler.config.prediction_type)
        x = scheduler.step(output.to(x.dtype), t, x).prev_sample
    return x


def asked(scheduler, k):
    """Where a denoiser is asked at call k: exactly, without the rounding of times to float32."""
    if scheduler._walk is None:
        return scheduler._point(scheduler._lam[k])
    return M.Point(*(each[:, None] for each in scheduler._walk.now))


def noise(n=64, width=4, dtype=torch.float64, seed=0):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def solver(kind="epsilon", **options):
    return DPMSolverScheduler(**({} if kind == "flow_prediction" else SD), prediction_type=kind, **options)


@pytest.fixture(scope="module")
def exact():
    """The end of the ODE by kind of noise schedule."""
    return {kind: walk(solver(kind), noise(), 3600) for kind in ("epsilon", "flow_prediction")}


def rms(x):
    return float(x.square().mean().sqrt())


# orders ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_slope_of_the_error_is_the_order(exact, kind, form, order):
    calls = (300, 600)
    errors = [rms(walk(solver(kind, solver_order=order, form=form, mode="fixed"), noise(), n) - exact[kind]) for n in calls]
    slope = math.log(errors[0] / errors[1]) / math.log(2)
    assert order - 0.2 < slope < order + 0.3, errors


@pytest.mark.parametrize(("order", "mode"), [(1, "fast"), (2, "fast"), (3, "fast"), (3, "fixed"), (2, "adaptive"), (3, "adaptive")])
def test_what_is_held_is_exact(order, mode):
    """Constant eps in the noise form, constant x0 in the data form: no step size matters."""
    x0, eps = noise(seed=1), noise(seed=2)
    for kind in KINDS:
        for form in ("data", "noise"):
            scheduler = solver(kind, solver_order=order, mode=mode, form=form)
            first, last = (scheduler.schedule.level(lam) for lam in scheduler.schedule.ends)
            held = (lambda x, at, e=eps: e) if form == "noise" else (lambda x, at, z=x0: (x - at.alpha * z) / at.sigma)
            end = walk(scheduler, first.alpha * x0 + first.sigma * eps, 12, held)
            torch.testing.assert_close(end, last.alpha * x0 + last.sigma * eps, rtol=0, atol=1e-9)


def test_noise_that_is_held_is_not_exact_in_the_data_form():
    x0, eps = noise(seed=1), noise(seed=2)
    scheduler = solver(solver_order=1, form="data")
    first, last = (scheduler.schedule.level(lam) for lam in scheduler.schedule.ends)
    end = walk(scheduler, first.alpha * x0 + first.sigma * eps, 12, lambda x, at: eps * at.alpha)
    assert rms(end - last.alpha * x0 - last.sigma * eps) > 1e-2


@pytest.mark.parametrize("kind", KINDS[:3])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("to_one", [False, True])
def test_order_one_is_ddim(kind, form, to_one):
    ddim = DDIMScheduler(**SD, prediction_type=kind, clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
    ddim.set_timesteps(12)
    mine = solver(kind, solver_order=1, form=form, denoise_to_zero=to_one)
    mine.set_timesteps(timesteps=ddim.timesteps)
    x = noise()
    for t in ddim.timesteps:
        at = level_of(mine, t)
        x = ddim.step(said(of_mixture(x, at), x, at, kind), t, x).prev_sample
    torch.testing.assert_close(walk(mine, noise(), None), x, rtol=0, atol=1e-6)


def test_order_one_is_flow_matching_euler():
    euler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    euler.set_timesteps(10)
    x = noise()
    for t in euler.timesteps:
        sigma = float(t) / 1000
        at = Level(max(1 - sigma, 1e-12), sigma, 0.0)
        x = euler.step(said(of_mixture(x, at), x, at, "flow_prediction"), t, x).prev_sample
    mine = solver("flow_prediction", solver_order=1, spacing="time", denoise_to_zero=True, shift=3.0)
    mine.set_timesteps(10)
    out = noise()
    for t in mine.timesteps:
        sigma = float(t) / 1000
        at = Level(max(1 - sigma, 1e-12), sigma, 0.0)
        out = mine.step(said(of_mixture(out, at), out, at, "flow_prediction"), t, out).prev_sample
    torch.testing.assert_close(mine.timesteps, euler.timesteps, rtol=0, atol=1e-3)
    torch.testing.assert_close(out, x, rtol=0, atol=2e-6)


def by_hand(x, lam_s, lam_t, order, form, level, model):
    """One step as the card writes it, plain numbers."""
    r1, r2 = (1 / 3, 2 / 3) if order == 3 else (1 / 2, None)
    h = lam_t - lam_s
    (a_s, s_s, _), (a_t, s_t, _) = level(lam_s), level(lam_t)
    (a_1, s_1, _) = level(lam_s + r1 * h)

    def m(x, lam):
        at = level(lam)
        eps = model(x, at)
        return eps if form == "noise" else (x - at.sigma * eps) / at.alpha

    m_s = m(x, lam_s)
    if form == "noise":
        if order == 1:
            return a_t / a_s * x - s_t * math.expm1(h) * m_s
        u = a_1 / a_s * x - s_1 * math.expm1(r1 * h) * m_s
        m_1 = m(u, lam_s + r1 * h)
        if order == 2:
            return a_t / a_s * x - s_t * math.expm1(h) * m_s - s_t * math.expm1(h) / (2 * r1) * (m_1 - m_s)
        a_2, s_2, _ = level(lam_s + r2 * h)
        u = a_2 / a_s * x - s_2 * math.expm1(r2 * h) * m_s - r2 / r1 * s_2 * (math.expm1(r2 * h) / (r2 * h) - 1) * (m_1 - m_s)
        m_2 = m(u, lam_s + r2 * h)
        return a_t / a_s * x - s_t * math.expm1(h) * m_s - s_t / r2 * (math.expm1(h) / h - 1) * (m_2 - m_s)
    if order == 1:
        return s_t / s_s * x - a_t * math.expm1(-h) * m_s
    u = s_1 / s_s * x - a_1 * math.expm1(-r1 * h) * m_s
    m_1 = m(u, lam_s + r1 * h)
    if order == 2:
        return s_t / s_s * x - a_t * math.expm1(-h) * m_s - a_t * math.expm1(-h) / (2 * r1) * (m_1 - m_s)
    a_2, s_2, _ = level(lam_s + r2 * h)
    u = s_2 / s_s * x - a_2 * math.expm1(-r2 * h) * m_s + r2 / r1 * a_2 * (math.expm1(-r2 * h) / (r2 * h) + 1) * (m_1 - m_s)
    m_2 = m(u, lam_s + r2 * h)
    return s_t / s_s * x - a_t * math.expm1(-h) * m_s + a_t / r2 * (math.expm1(-h) / h + 1) * (m_2 - m_s)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("calls", [5, 6, 7, 12])
def test_fast_against_the_formulas_by_hand(kind, form, calls):
    mine = solver(kind, form=form)
    K = calls // 3 + 1
    orders = [3] * (K - 2) + [2, 1] if calls % 3 == 0 else [3] * (K - 1) + [calls % 3]
    lam = np.linspace(*mine.schedule.ends, K + 1)
    x = noise()
    for s, t, order in zip(lam, lam[1:], orders, strict=False):
        x = by_hand(x, s, t, order, form, mine.schedule.level, of_mixture)
    torch.testing.assert_close(walk(mine, noise(), calls), x, rtol=0, atol=1e-9)


def test_orders_use_all_calls():
    for n in range(1, 40):
        for order in (1, 2, 3):
            orders = M.fast(n, order)
            assert sum(orders) == n
            assert len(orders) == (n // 3 + 1 if order == 3 else -(-n // order))
            assert orders == sorted(orders, reverse=True)
    assert M.fast(10, 3) == [3, 3, 3, 1]
    assert M.fast(12, 3) == [3, 3, 3, 2, 1]
    assert M.fast(3, 3) == [2, 1]
    assert M.fixed(12, 3) == [3] * 4
    with pytest.raises(ValueError, match=r"13 calls are no whole number.*12 or 15"):
        M.fixed(13, 3)


OFFICIAL = {  # LuChengTHU/dpm-solver 52bc3fb, `DPM_Solver.sample` run unchanged on noise() and the mixture, SD's betas, float64: row 0
    ("data", "fast", "logsnr", False, 3, 10): [-2.02920164, 0.07791793, -1.49926445],
    ("noise", "fast", "logsnr", False, 3, 9): [-2.07168962, 0.2218266, -1.56518935],
    ("data", "fast", "time", True, 2, 8): [-1.83250824, 0.04620427, -1.47637839],
    ("noise", "fixed", "quadratic", False, 3, 12): [-2.0563156, 0.05647611, -1.51953514],
    ("data", "adaptive", "logsnr", False, 3, 200): [-2.04409349, 0.05188525, -1.51013892],
    ("noise", "adaptive", "logsnr", True, 2, 200): [-2.04883289, 0.05640181, -1.51637664],
}
"""(form, mode, spacing, denoise_to_zero, order, calls): the first numbers of the end."""


@pytest.mark.parametrize("case", OFFICIAL)
def test_values_of_the_official_code(case):
    form, mode, spacing, zero, order, calls = case
    mine = solver(solver_order=order, form=form, mode=mode, spacing=spacing, denoise_to_zero=zero)  # together, as theirs
    end = walk(mine, noise(), calls)[0, :3]
    torch.testing.assert_close(end, torch.tensor(OFFICIAL[case], dtype=torch.float64), rtol=0, atol=5e-8)


# adaptive -------------------------------------------------------------------------------------------------------------------------


def plain_adaptive(x, mine, order, form, atol, rtol, theta=0.9, h=0.05):
    """One sample [1, ...], a loop that decides on the host: (end, calls, rejected)."""
    lam, end = mine.schedule.ends
    before, calls, rejected = x, 0, 0
    while lam < end - 1e-9:
        h = min(h, end - lam)
        high = by_hand(x, lam, lam + h, order, form, mine.schedule.level, of_mixture)
        if order == 2:
            low = by_hand(x, lam, lam + h, 1, form, mine.schedule.level, of_mixture)
        else:  # second order by the point at 1/3
            low = second_at_a_third(x, lam, lam + h, form, mine.schedule.level)
        delta = torch.clamp(rtol * torch.maximum(low.abs(), before.abs()), min=atol)
        E = float(((high - low) / delta).square().mean().sqrt())
        calls += order
        if E <= 1:
            x, before, lam = high, low, lam + h
        else:
            rejected += 1
        h = theta * h * E ** (-1 / order)
    return x, calls, rejected


def second_at_a_third(x, s, t, form, level):
    h, r = t - s, 1 / 3
    (a_s, s_s, _), (a_t, s_t, _), (a_1, s_1, _) = level(s), level(t), level(s + r * h)

    def m(x, lam):
        eps = of_mixture(x, level(lam))
        return eps if form == "noise" else (x - level(lam).sigma * eps) / level(lam).alpha

    m_s = m(x, s)
    if form == "noise":
        m_1 = m(a_1 / a_s * x - s_1 * math.expm1(r * h) * m_s, s + r * h)
        return a_t / a_s * x - s_t * math.expm1(h) * (m_s + (m_1 - m_s) / (2 * r))
    m_1 = m(s_1 / s_s * x - a_1 * math.expm1(-r * h) * m_s, s + r * h)
    return s_t / s_s * x - a_t * math.expm1(-h) * (m_s + (m_1 - m_s) / (2 * r))


@pytest.mark.parametrize("kind", ["epsilon", "flow_prediction"])
@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize("order", [2, 3])
def test_each_sample_walks_as_a_plain_loop_alone(kind, form, order):
    mine = solver(kind, solver_order=order, form=form, mode="adaptive", together=False)
    x = noise(6)
    end, counts = walk(mine, x, 300), mine.counts
    assert len(set(counts["calls"].tolist())) > 1, "samples of one pace prove nothing"
    for i in range(len(x)):
        alone, calls, rejected = plain_adaptive(x[i : i + 1], mine, order, form, 0.0078, 0.05)
        torch.testing.assert_close(end[i : i + 1], alone, rtol=0, atol=1e-6)
        assert (counts["calls"][i], counts["rejected"][i]) == (calls, rejected)
        assert counts["calls"][i] == order * (counts["accepted"][i] + counts["rejected"][i])
    assert not counts["forced"].any()
    assert counts["rejected"].any()


def test_together_all_take_the_same_steps():
    """So a sample's steps depend on its neighbours: the plugin's own samples do not."""
    x, ends = noise(6), []
    for rows in (x, x[:1]):
        mine = solver(mode="adaptive", together=True)
        ends.append(walk(mine, rows, 300)[0])
        assert len(set(mine.counts["calls"].tolist())) == 1
        assert mine.times() is None
    assert not torch.allclose(*ends, rtol=0, atol=1e-4)
    apart = [walk(solver(mode="adaptive", together=False), rows, 300)[0] for rows in (x, x[:1])]
    torch.testing.assert_close(*apart, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_smaller_tolerances_come_nearer(exact, form):
    errors, calls = [], []
    for rtol in (1e-1, 1e-2, 1e-3, 1e-4):
        mine = solver(mode="adaptive", form=form, rtol=rtol, atol=rtol / 10, together=False)
        errors.append(rms(walk(mine, noise(16), 700) - exact["epsilon"][:16]))
        calls.append(float(mine.counts["calls"].double().mean()))
        assert not mine.counts["forced"].any()
    assert errors == sorted(errors, reverse=True)
    assert calls == sorted(calls)
    assert errors[-1] < 1e-4


def test_what_is_zero_in_both_orders_is_no_error():
    """Without an absolute tolerance 0 / 0 was no number, no step was accepted, and the picture was none."""
    nothing = torch.zeros(2, 3)
    assert torch.equal(M.error(nothing, nothing, nothing, 0.0, 0.05), torch.zeros(2))
    half = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(M.error(half * 1.1, half, half, 0.0, 0.05), torch.tensor([math.sqrt(2.0)]))


def test_a_sample_at_the_end_is_frozen():
    mine = solver(mode="adaptive", together=False)
    mine.set_timesteps(120)
    x, seen = noise(6), []
    for t in mine.timesteps:
        x = mine.step(of_mixture(x, asked(mine, 0)), t, x).prev_sample
        if mine._walk is not None:
            seen.append((x.clone(), mine._walk.done.clone(), mine.times().clone()))
    _, _, first = mine.schedule, None, min(i for i, (_, done, _) in enumerate(seen) if done.any())
    x_then, done, times = seen[first]
    assert not done.all()
    assert torch.equal(x[done], x_then[done])
    assert bool((times[done].abs() < 1e-6).all())


@pytest.mark.parametrize("calls", [3, 4, 5, 11, 20])
def test_a_small_budget_ends_where_it_should_and_is_told(exact, calls):
    mine = solver(mode="adaptive", together=False)
    end = walk(mine, noise(), calls)
    counts = mine.counts
    assert counts["forced"].bool().all()
    assert int(counts["calls"].max()) <= calls
    assert rms(end - exact["epsilon"]) < {3: 2.0, 4: 2.0, 5: 2.0, 11: 0.5, 20: 0.2}[calls]
    at = mine.schedule.level(mine.schedule.ends[1])
    assert 0.5 < rms(end) / math.sqrt(float((SHARES * (MEANS**2 + SPREADS**2)).sum()) * at.alpha**2 + at.sigma**2) < 2


def test_denoise_to_zero_is_one_more_call():
    plain, zero = (solver(mode="adaptive", denoise_to_zero=each, together=False) for each in (False, True))
    ends = [walk(each, noise(6), 200) for each in (plain, zero)]
    assert torch.equal(zero.counts["calls"], plain.counts["calls"] + 1)
    at = plain.schedule.level(plain.schedule.ends[1])
    torch.testing.assert_close(ends[1], (ends[0] - at.sigma * of_mixture(ends[0], at)) / at.alpha, rtol=0, atol=1e-7)


@pytest.mark.parametrize("form", ["data", "noise"])
def test_denoise_to_zero_of_fixed_steps(form):
    plain, zero = (solver(form=form, denoise_to_zero=each) for each in (False, True))
    end = walk(plain, noise(), 9)
    at = plain.schedule.level(plain.schedule.ends[1])
    torch.testing.assert_close(walk(zero, noise(), 10), (end - at.sigma * of_mixture(end, at)) / at.alpha, rtol=0, atol=1e-6)


class NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        assert not any(part in name for part in ("_local_scalar_dense", "nonzero", "is_nonzero", "equal.default", "unique")), name
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("mode", "exploding"), [("fast", False), ("fixed", True), ("adaptive", False), ("adaptive", True)])
def test_no_step_waits_for_the_device(mode, exploding, monkeypatch):
    monkeypatch.setattr(Seen, "send", lambda self, flag: None)  # on a device it copies without waiting, which is tested below
    mine = solver(mode=mode, exploding=exploding, together=False)
    mine.set_timesteps(30)
    x = noise() / (mine.schedule.level(float(mine._lam[0])).alpha if exploding else 1)
    with NoWaiting():
        for t in mine.timesteps:
            x = mine.step(mine.scale_model_input(x, t), t, x).prev_sample
            mine.times()


def test_a_flag_that_is_under_way_is_not_waited_for(monkeypatch):
    class Event:
        there = False

        def record(self):
            pass

        def query(self):
            return Event.there

    class Flag:
        device = torch.device("cuda")

        def __init__(self, value):
            self.value = value

        def to(self, device, non_blocking):
            assert non_blocking
            return torch.tensor(self.value)

    monkeypatch.setattr(torch, "get_device_module", lambda device: type("module", (), {"Event": Event}))
    seen = Seen()
    seen.send(Flag(True))
    assert not seen.arrived()
    assert not seen.value
    seen.send(Flag(False))  # one at a time
    Event.there = True
    assert seen.arrived()
    assert seen.value


def test_levels_on_a_device_are_those_of_the_host():
    for schedule in (solver().schedule, NoiseSchedule(1000)):
        lam = np.linspace(*schedule.ends, 77)
        other = DeviceSchedule.of(schedule, torch.device("cpu"))
        np.testing.assert_allclose(other.t(torch.from_numpy(lam)).numpy(), schedule.t(lam), rtol=0, atol=1e-8)
        alpha, sigma = other.at(torch.from_numpy(schedule.t(lam)))
        np.testing.assert_allclose(np.stack([alpha, sigma], 1), [schedule.level(each)[:2] for each in lam], rtol=0, atol=1e-6)
        mine = torch.stack(other.levels(torch.from_numpy(lam)), 1).numpy()
        np.testing.assert_allclose(mine, [schedule.level(each)[:2] for each in lam], rtol=1e-12)


# schedules, edits, units ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["fast", "adaptive"])
def test_kinds_of_prediction_say_the_same(mode):
    ends = [walk(solver(kind, mode=mode), noise(), 30) for kind in KINDS[:3]]
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-8)


def test_a_step_that_is_cut_at_its_beginning_is_one_of_lower_order():
    mine = solver()
    mine.set_timesteps(9)
    lam = [*mine._lam, mine._end]
    x = noise()
    for begin, order, end in ((1, 2, 3), (2, 1, 3)):
        expected = by_hand(x, lam[begin], lam[end], order, "data", mine.schedule.level, of_mixture)
        mine.set_timesteps(9)
        mine.set_begin_index(begin)
        state = x
        for k, t in enumerate(mine.timesteps[begin:end]):
            state = mine.step(of_mixture(state, asked(mine, begin + k)), t, state).prev_sample
        torch.testing.assert_close(state, expected, rtol=0, atol=1e-10)


def test_a_part_of_the_schedule_keeps_its_steps():
    mine = solver()
    mine.set_timesteps(12)
    whole, sigmas, lam = mine.timesteps, mine.sigmas, mine._lam
    mine.timesteps = whole[3:8]
    mine.sigmas = sigmas[3:9]
    assert mine._begins == [True, False, False, True, False]
    assert mine._end == lam[8]
    assert len(mine._planned(0)) == 5
    mine.timesteps = torch.tensor([900.0, 500.0, 300.0, 100.0])  # somebody's own
    mine.sigmas = torch.zeros(5)
    assert mine._begins == [True, False, False, True] or mine._begins == [True, False, True, True]
    assert mine.sigmas[-1] == 0


@pytest.mark.parametrize("mode", ["fast", "adaptive"])
@pytest.mark.parametrize("form", ["data", "noise"])
def test_what_somebody_puts_into_a_step_goes_on_from_there(mode, form):
    """With what the form holds constant, the end is that of the edited sample, whichever call it was put before."""
    x0, eps, more = noise(seed=1), noise(seed=2), 0.3 * noise(seed=3)
    for put_at in range(6):
        mine = solver(form=form, mode=mode, h_init=1.0, together=False)
        first, last = (mine.schedule.level(lam) for lam in mine.schedule.ends)
        held = (lambda x, at: eps) if form == "noise" else (lambda x, at: (x - at.alpha * x0) / at.sigma)
        place = {}

        def put(k, x, at=put_at, place=place, mine=mine):
            if k != at:
                return x
            walk_ = mine._walk
            place["S"] = M.scales(walk_.now if walk_ else mine._point(mine._lam[k]), form)[0]
            return x + more

        end = walk(mine, first.alpha * x0 + first.sigma * eps, 12, held, put=put)
        S = place["S"][:, None] if isinstance(place["S"], torch.Tensor) else place["S"]
        there = last.alpha * x0 + last.sigma * eps + M.scales(last, form)[0] / S * more
        torch.testing.assert_close(end, there, rtol=0, atol=2e-5)


@pytest.mark.parametrize("mode", ["fast", "adaptive"])
def test_states_in_eulers_unit(mode):
    plain, other = solver(mode=mode), solver(mode=mode, exploding=True)
    end = walk(plain, noise(), 30)
    other.set_timesteps(30)
    x = noise() * other.init_noise_sigma
    at = other.schedule.level(other.schedule.ends[1])
    torch.testing.assert_close(walk(other, x, 30) * at.alpha, end, rtol=0, atol=1e-7)
    sample = other.add_noise(noise(seed=5), noise(seed=6), torch.full((64,), 500.0))
    seen = other.schedule.level(float(other.schedule.lam(np.array(500.0))))
    torch.testing.assert_close(sample, noise(seed=5) + seen.sigma / seen.alpha * noise(seed=6))


def test_half_precision_states_are_kept_exactly():
    mine = solver()
    x = noise(dtype=torch.bfloat16)
    mine.set_timesteps(6)
    for k, t in enumerate(mine.timesteps):
        x = mine.step(of_mixture(x, level_of(mine, t)).to(x.dtype), t, x).prev_sample
        assert x.dtype == torch.bfloat16
        if k < 5:
            assert mine._kept.dtype == torch.float32
    assert mine._kept is None, "the run is over"


@pytest.mark.parametrize(("options", "part"), [
    ({"solver_order": 4}, "solver_order = 4"), ({"solver_order": 1, "mode": "adaptive"}, "compares two orders"), ({"form": "x0"}, "form"),
    ({"mode": "singlestep"}, "mode.*fast"), ({"spacing": "edm"}, "spacing"), ({"prediction_type": "score"}, "prediction_type"),
    ({"prediction_type": "flow_prediction", "exploding": True}, "exploding"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        DPMSolverScheduler(**options)


def test_schedules_without_meaning_are_refused():
    with pytest.raises(ValueError, match=r"no trial of order 3.*4 or more"):
        solver(mode="adaptive", denoise_to_zero=True).set_timesteps(3)
    with pytest.raises(ValueError, match="mu is for flow"):
        solver().set_timesteps(5, mu=1.0)
    with pytest.raises(ValueError, match="smaller than the one before"):
        solver().set_timesteps(timesteps=[5, 9])
    with pytest.raises(ValueError, match="two or more"):
        solver().set_timesteps(sigmas=[5.0])
    solver(mode="fixed", denoise_to_zero=True)  # its schedule before the first run is a whole number of steps too


# in pipelines ---------------------------------------------------------------------------------------------------------------------


def tiny(family="StableDiffusionPipeline", **knobs):
    built = make(family)
    pipe = load_pipeline(built.pipe, plugins=[DPMSolver(**knobs)]) if knobs is not None else built.pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe, built


def run(pipe, built, seeds=(0,), **changes):
    arguments = {**built.kwargs, "output_type": "latent", "num_inference_steps": 12, **changes}
    if "prompt" in arguments and len(seeds) > 1:
        arguments["prompt"] = [f"{i} apples" for i in seeds]
        arguments |= {"negative_prompt": ["bad"] * len(seeds)} if "negative_prompt" in arguments else {}
    elif "prompt" in arguments:
        arguments["prompt"] = f"{seeds[0]} apples"
        arguments |= {"negative_prompt": "bad"} if "negative_prompt" in arguments else {}
    generator = [torch.Generator().manual_seed(i) for i in seeds]
    return pipe(**arguments, generator=generator if len(seeds) > 1 else generator[0])[0]


@pytest.mark.parametrize("calls", [5, 9, 10])
def test_forwards_are_as_many_as_asked_for(calls):
    pipe, built = tiny(order=3)
    run(pipe, built, num_inference_steps=calls)
    assert sum(pipe.plugins.report().forwards.values()) == calls


@pytest.mark.parametrize("family", ["StableDiffusionPipeline", "FluxPipeline"])
def test_an_adaptive_run_counts_what_it_took_and_skips_the_rest(family):
    pipe, built = tiny(family, mode="adaptive")
    run(pipe, built, (0, 1), num_inference_steps=90)
    report = pipe.plugins.report()
    mine = report.plugins["dpm_solver"]
    most = int(mine.records["calls"].max())
    assert torch.equal(mine.records["calls"], 3 * (mine.records["accepted"] + mine.records["rejected"]))
    assert most < 90
    assert set(report.forwards.values()) == {most}
    assert set(report.denoiser_calls.values()) == {90}
    assert not [note for note in mine.notes if "even steps" in note]


def test_a_budget_that_was_too_small_is_told():
    pipe, built = tiny(mode="adaptive", rtol=1e-4, atol=1e-5)
    run(pipe, built, num_inference_steps=9)
    assert any("1 of 1 samples came to the end of their 9 calls" in note for note in pipe.plugins.report().plugins["dpm_solver"].notes)


def test_alone_or_in_a_batch_a_sample_is_the_same():
    pipe, built = tiny(mode="adaptive")
    both = run(pipe, built, (0, 1), num_inference_steps=60)
    calls = pipe.plugins.report().plugins["dpm_solver"].records["calls"]
    for i in (0, 1):
        alone = run(pipe, built, (i,), num_inference_steps=60)
        assert pipe.plugins.report().plugins["dpm_solver"].records["calls"][0] == calls[i]
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-2)  # an untrained network: latents of size 50


def test_in_float64_a_batch_changes_nothing():
    """What is left in float32 is rounding, which the choice of step sizes makes larger (README)."""
    built = make("StableDiffusionPipeline")
    pipe = load_pipeline(built.pipe.to(torch.float64), plugins=[DPMSolver(mode="adaptive")])
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def ask(rows):
        prompts = [("a dog", "a cat")[i] for i in rows]
        given = {**built.kwargs, "prompt": prompts, "negative_prompt": ["bad"] * len(rows), "latents": latents[rows]}
        out = pipe(**given | {"height": 64, "width": 64, "num_inference_steps": 90, "output_type": "latent"})[0]
        return out, pipe.plugins.report().plugins["dpm_solver"].records

    both, told = ask([0, 1])
    for i in (0, 1):
        alone, records = ask([i])
        assert all(records[name][0] == told[name][i] for name in ("calls", "accepted", "rejected"))
        torch.testing.assert_close(alone[0], both[i], rtol=0, atol=1e-9 * float(both.abs().max()))


@pytest.mark.parametrize("form", ["data", "noise"])
@pytest.mark.parametrize(("kind", "calls"), [("epsilon", 10), ("v_prediction", 11), ("sample", 12)])
def test_a_run_is_a_plain_loop_around_the_denoiser(kind, calls, form):
    """A whole run of the pipeline, guided, two prompts of two pictures each, against a loop in float64 with a schedule of its own."""
    built = make("StableDiffusionPipeline")
    pipe, prompts, guidance = built.pipe, ["a dog", "a cat"], 5.0
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, prediction_type=kind, clip_sample=False)
    latents = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    no = ["bad"] * 2
    words, others = pipe.encode_prompt(prompts, "cpu", 2, True, no)
    log_alpha = 0.5 * pipe.scheduler.alphas_cumprod.double().log().numpy()
    t_all = np.arange(len(log_alpha), dtype=np.float64)

    def level(lam):
        alpha = 1 / math.sqrt(1 + math.exp(-2 * lam))
        return alpha, 1 / math.sqrt(1 + math.exp(2 * lam)), lam

    def model(x, at):
        t = float(np.interp(-math.log(at[0]), -log_alpha, t_all))
        with torch.no_grad():
            raw = pipe.unet(torch.cat([x.float()] * 2), torch.tensor(t), torch.cat([others, words])).sample.double()
        plain, cond = raw.chunk(2)
        raw = plain + guidance * (cond - plain)
        alpha, sigma = at[:2]
        return {"epsilon": raw, "v_prediction": alpha * raw + sigma * x, "sample": (x - alpha * raw) / sigma}[kind]

    ends = [la - 0.5 * math.log(-math.expm1(2 * la)) for la in (log_alpha[-1], log_alpha[0])]
    orders = {10: [3, 3, 3, 1], 11: [3, 3, 3, 2], 12: [3, 3, 3, 2, 1]}[calls]
    lam, x = np.linspace(*ends, len(orders) + 1), latents.double()
    for s, t, order in zip(lam, lam[1:], orders, strict=False):
        x = by_hand(x, float(s), float(t), order, form, lambda at: Level(*level(at)), model)
    load_pipeline(pipe, plugins=[DPMSolver(form=form)])
    given = {"prompt": prompts, "negative_prompt": no, "num_images_per_prompt": 2, "guidance_scale": guidance, "latents": latents}
    mine = pipe(**given, height=64, width=64, num_inference_steps=calls, output_type="latent")[0]
    torch.testing.assert_close(mine.double(), x, rtol=0, atol=3e-5 * float(x.abs().max()))


def test_the_pipeline_is_told_the_times_that_were_chosen():
    pipe, built = tiny(mode="adaptive")
    told, seen = [], []
    forward = pipe.unet.forward

    def watch(*args, **kwargs):
        told.append(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).flatten()[0].item())
        return forward(*args, **kwargs)

    pipe.unet.forward = watch
    run(pipe, built, num_inference_steps=60, callback_on_step_end=lambda p, i, t, k: seen.append(float(t)) or {})
    del pipe.unet.forward
    assert len(told) < 60
    np.testing.assert_allclose(told, seen[: len(told)], rtol=1e-5)
    assert seen[len(told) :] == [pytest.approx(0, abs=1e-4)] * (60 - len(told))
    assert any(a < b for a, b in pairwise(told)) == (int(pipe.plugins.report().plugins["dpm_solver"].records["rejected"][0]) > 0)


def test_eulers_scheduler_gives_the_picture_that_ddim_gives():
    outs = []
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        for knobs in ({"order": 3}, {"mode": "adaptive"}):
            pipe, built = tiny(**knobs)
            pipe.scheduler = cls.from_config(pipe.scheduler.config, **({"clip_sample": False} if cls is DDIMScheduler else {}))
            outs.append(run(pipe, built, num_inference_steps=24, guidance_scale=1.0))
    torch.testing.assert_close(outs[0], outs[2], rtol=1e-3, atol=1e-2)
    torch.testing.assert_close(outs[1], outs[3], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("calls", [0, -3])
def test_less_than_one_call_is_refused(calls):
    """It ran one call and said nothing."""
    pipe, built = tiny()
    with pytest.raises(ConfigError, match=f"num_inference_steps = {calls}: give 1 or more"):
        run(pipe, built, num_inference_steps=calls)
    with pytest.raises(ValueError, match="give 1 or more"):
        DPMSolverScheduler(prediction_type="flow_prediction", spacing="time").set_timesteps(calls)


def test_what_does_not_go_is_refused_before_the_denoiser_runs():
    with pytest.raises(ConfigError, match="compares two orders"):
        DPMSolver(order=1, mode="adaptive")
    with pytest.raises(ConfigError, match="no step would ever"):
        DPMSolver(mode="adaptive", rtol=0, atol=0)
    with pytest.raises(ConfigError, match="order"):
        DPMSolver(order=4)
    pipe, built = tiny(mode="fixed", order=3)
    with pytest.raises(ConfigError, match="10 calls are no whole number of steps of order 3"):
        run(pipe, built, num_inference_steps=10)
    for cls in (DDPMScheduler, LCMScheduler):
        pipe, built = tiny(order=2)
        pipe.scheduler = cls.from_config(pipe.scheduler.config)
        with pytest.raises(Unsupported, match=cls.__name__):
            run(pipe, built)
    assert not pipe.plugins.report() or sum(pipe.plugins.report().forwards.values()) == 0


@pytest.mark.parametrize("mode", ["fast", "adaptive"])
def test_a_flow_model_takes_its_own_sigmas(mode):
    pipe, built = tiny("FluxPipeline", spacing="time", mode=mode)
    assert torch.isfinite(run(pipe, built, num_inference_steps=7)).all()
    mine = DPMSolverScheduler(prediction_type="flow_prediction", spacing="time", use_dynamic_shifting=True, denoise_to_zero=True)
    euler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    for each in (mine, euler):
        each.set_timesteps(sigmas=[1.0, 0.7, 0.4, 0.1], mu=0.8)
    torch.testing.assert_close(mine.timesteps[1:], euler.timesteps[1:], rtol=0, atol=1e-3)
    assert mine.timesteps[0] == pytest.approx(999)  # lambda is infinite at 1000


def test_own_sigmas_of_a_flow_model_want_the_spacing_that_takes_them():
    pipe, built = tiny("FluxPipeline")
    with pytest.raises(ConfigError, match="give 'time'"):
        run(pipe, built, sigmas=[1.0, 0.5, 0.2], num_inference_steps=3)


def test_adaptive_is_refused_where_one_time_is_not_enough():
    built = make("WanPipeline@2.2")
    with pytest.raises(Unsupported, match="one of two denoisers"):
        load_pipeline(built.pipe, plugins=[DPMSolver(mode="adaptive")])


def test_a_cache_beside_adaptive_steps_is_refused_and_beside_fixed_ones_not():
    cache = Part("cache", Effects(skips=frozenset({"blocks"})))
    with pytest.raises(Conflict, match="every block"):
        plan([Part.of(DPMSolver(mode="adaptive")), cache]).ensure()
    plan([Part.of(DPMSolver(order=3)), cache]).ensure()


def test_neutral_is_the_plain_pipeline():
    plain, built = tiny(order=0)
    with_it = run(plain, built)
    unload(plain)
    assert torch.equal(run(plain, built), with_it)


def test_contract_has_cases():
    assert contract_cases("dpm_solver", ["sd"])


def test_walk_of_one_call_is_first_order():
    mine = solver()
    schedule = DeviceSchedule.of(mine.schedule, torch.device("cpu"))
    first, last = mine.schedule.ends
    x = noise(3)
    way = Walk(x, first, last, schedule, "data", 3, 1, False, False, 0.05, 0.0078, 0.05, 0.9)
    eps = of_mixture(x, mine.schedule.level(first))
    x0 = (x - mine.schedule.level(first).sigma * eps) / mine.schedule.level(first).alpha
    torch.testing.assert_close(way.take(x0, x0), by_hand(x, first, last, 1, "data", mine.schedule.level, of_mixture))
    assert way.done.all()


@pytest.mark.parametrize("knobs", [{"rtol": 0.2}, {"mode": "fixed", "theta": 0.5}, {"h_init": 0.1}, {"atol": 0.0}])
def test_tolerances_are_refused_where_nothing_has_them(knobs):
    with pytest.raises(ConfigError, match=r"with mode = '(fast|fixed)': only mode='adaptive' has tolerances"):
        DPMSolver(**knobs)
    DPMSolver(**{**knobs, "mode": "adaptive"})
    DPMSolver(rtol=0.05)  # what it is anyway


@pytest.mark.parametrize("name", ["LTX2Pipeline", "LTX2ImageToVideoPipeline"])
def test_a_picture_and_its_sound_are_each_solved_as_by_the_scheduler_alone(name):
    def both(built):
        out = built.pipe(**{**built.kwargs, "num_inference_steps": 6, "output_type": "latent"}, generator=torch.Generator().manual_seed(0))
        return out.frames, out.audio

    plain, built = make(name), make(name)
    plain.pipe.scheduler = DPMSolver(order=3).make_scheduler(plain.pipe.scheduler, find_family(type(plain.pipe)))
    with pytest.raises(Unsupported, match="a sound at the picture's times"):
        load_pipeline(built.pipe, plugins=[DPMSolver(mode="adaptive")])
    load_pipeline(built.pipe, plugins=[DPMSolver(order=3)])
    for ours, expected in zip(both(built), both(plain), strict=True):
        assert torch.equal(ours, expected)
