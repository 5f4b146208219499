"""DPM-Solver-v3: on data whose score is known, against diffusers' DPM-Solver++, its statistics against their closed form, in pipelines."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate, calibrate_call
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.noise_schedule import Level, NoiseSchedule, clean, spaced
from diffgraft.testing import contract_cases
from diffgraft_dpm_solver_v3 import DPMSolverV3, DPMSolverV3Scheduler, published_statistics
from diffgraft_dpm_solver_v3.calibration import MeasuringScheduler
from diffgraft_dpm_solver_v3.method import (
    advance,
    cumulative,
    derivative_weights,
    derivatives,
    moments,
    pooled,
    seen_from_end,
    seen_from_start,
    snapped,
    statistics,
    transition,
)
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    DPMSolverSDEScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    LCMScheduler,
)

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
MEAN, SPREAD = 0.7, 0.5
MEANS = torch.tensor([-1.5, 0.3, 1.2], dtype=torch.float64)
SPREADS = torch.tensor([0.3, 0.2, 0.4], dtype=torch.float64)
SHARES = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
KINDS = ("epsilon", "v_prediction", "sample", "flow_prediction")


def of_gaussian(x, at):
    """eps of the exact denoiser of N(MEAN, SPREAD^2)."""
    return at.sigma * (x - at.alpha * MEAN) / (at.alpha**2 * SPREAD**2 + at.sigma**2)


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


def level_of(scheduler, t):
    return scheduler.schedule.level(float(scheduler.schedule.lam(np.array([float(t)]))[0]))


def walk(scheduler, x, steps, model=of_mixture, begin=0):
    """The end of a run from ``x``."""
    scheduler.set_timesteps(steps)
    if begin:
        scheduler.set_begin_index(begin)
    for t in scheduler.timesteps[begin:]:
        at = level_of(scheduler, t)
        output = said(model(x.double(), at), x.double(), at, scheduler.config.prediction_type)
        x = scheduler.step(output.to(x.dtype), t, x).prev_sample
    return x


def noise(n=200, dtype=torch.float64, seed=0):
    return torch.randn(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def gaussian_statistics(scheduler):
    """l, s, b [N + 1, 1] of Gaussian data: f = -MEAN l is constant, so s = 0 and b = f'."""
    levels = [scheduler.schedule.level(float(x)) for x in scheduler.grid]
    l = torch.tensor([a.sigma**2 / (a.alpha**2 * SPREAD**2 + a.sigma**2) for a in levels], dtype=torch.float64)[:, None]  # noqa: E741
    if scheduler.config.prediction_type == "flow_prediction":  # d log alpha = sigma, d log sigma = -alpha
        slope = [-(2 * a.alpha + 2 * a.sigma) for a in levels]
    else:
        slope = [-2.0 for _ in levels]  # d log (alpha^2 / sigma^2) = 2
    b = -MEAN * l * (1 - l) * torch.tensor(slope, dtype=torch.float64)[:, None]
    return l, torch.zeros_like(l), b


def end_of_gaussian(scheduler, x):
    """Where the exact ODE takes ``x`` from one end of lambda to the other: quantiles are kept."""
    first, last = (scheduler.schedule.level(lam) for lam in scheduler.schedule.ends)
    spread = [math.sqrt(a.alpha**2 * SPREAD**2 + a.sigma**2) for a in (first, last)]
    return last.alpha * MEAN + (x - first.alpha * MEAN) * spread[1] / spread[0]


# closed forms ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("intervals", "tolerance"), [(250, 2e-4), (1200, 9e-6)])
@pytest.mark.parametrize("steps", [1, 3, 10, 20])
def test_order_one_is_exact_on_gaussian_data(intervals, tolerance, steps):
    """Card: up to quadrature, for any number of steps, where DPM-Solver++ is off by 0.1 at 10 steps."""
    scheduler = DPMSolverV3Scheduler(**SD, solver_order=1, intervals=intervals)
    scheduler.set_statistics(*gaussian_statistics(scheduler))
    exact = end_of_gaussian(scheduler, noise())
    assert float((walk(scheduler, noise(), steps, of_gaussian) - exact).abs().max()) < tolerance
    plain = DPMSolverV3Scheduler(**SD, solver_order=1, intervals=intervals)
    assert float((walk(plain, noise(), steps, of_gaussian) - exact).abs().max()) > 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spacing", ["time", "quadratic", "logsnr", "edm"])
def test_gaussian_data_for_every_prediction_and_spacing(kind, spacing):
    scheduler = DPMSolverV3Scheduler(**SD, prediction_type=kind, spacing=spacing, solver_order=1, intervals=2000, shift=3.0)
    scheduler.set_statistics(*gaussian_statistics(scheduler))
    exact = end_of_gaussian(scheduler, noise())
    torch.testing.assert_close(walk(scheduler, noise(), 7, of_gaussian), exact, rtol=0, atol=2e-4)


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("corrector", ["pseudo", "full"])
def test_higher_orders_and_correctors_keep_what_is_exact(order, corrector):
    scheduler = DPMSolverV3Scheduler(**SD, solver_order=order, corrector=corrector, intervals=2000)
    scheduler.set_statistics(*gaussian_statistics(scheduler))
    torch.testing.assert_close(walk(scheduler, noise(), 8, of_gaussian), end_of_gaussian(scheduler, noise()), rtol=0, atol=1e-5)


@pytest.mark.parametrize(("intervals", "tolerance"), [(1200, 1e-4), (10000, 2e-6)])
def test_degenerate_order_two_is_dpm_solver_plus_plus(intervals, tolerance):
    """l = 1, s = b = 0 without a corrector, against diffusers' own solver on the same timesteps (card: up to quadrature)."""
    ours = DPMSolverV3Scheduler(**SD, corrector="off", intervals=intervals, final="sigma_min")
    z = walk(ours, noise(), 10)
    at = [ours.schedule.level(float(x)) for x in ours.schedule.lam(ours.timesteps.double().numpy())] + [
        ours.schedule.level(ours.schedule.ends[1])
    ]
    theirs = DPMSolverMultistepScheduler(**SD, algorithm_type="dpmsolver++", solver_type="heun", final_sigmas_type="sigma_min")
    theirs.set_timesteps(10)
    theirs.sigmas = torch.tensor([level.sigma / level.alpha for level in at], dtype=torch.float64)
    x = noise()
    for i, t in enumerate(theirs.timesteps):
        x = theirs.step(of_mixture(x, at[i]), t, x).prev_sample
    assert float((x - z).abs().max()) < tolerance


def errors(steps, **options):
    """RMS to a fine run on the mixture."""
    fine = DPMSolverV3Scheduler(**SD, solver_order=3, corrector="off", intervals=6000, spacing="logsnr")
    reference = walk(fine, noise(), 1000)
    made = [DPMSolverV3Scheduler(**SD, intervals=6000, spacing="logsnr", **options) for _ in steps]
    return [float((walk(each, noise(), n) - reference).square().mean().sqrt()) for each, n in zip(made, steps, strict=True)]


@pytest.mark.parametrize(("order", "corrector", "expected"), [
    (1, "off", 1.0), (2, "off", 2.0), (3, "off", 3.0), (2, "full", 2.5), (3, "full", 4.0), (2, "pseudo", 2.3),
])  # fmt: skip
def test_order_of_convergence(order, corrector, expected):
    found = errors((20, 40), solver_order=order, corrector=corrector)
    assert math.log2(found[0] / found[1]) > expected - 0.35, found


def test_statistics_of_the_mixture_lower_the_error_of_few_steps():
    """The point of it all: l, s, b measured on the mixture itself, order 2, 5 steps, against l = 1."""
    scheduler = DPMSolverV3Scheduler(**SD, intervals=250, spacing="logsnr", corrector="off")
    scheduler.set_statistics(*measured(scheduler, of_mixture, 2000))
    reference = walk(DPMSolverV3Scheduler(**SD, solver_order=3, corrector="off", intervals=6000, spacing="logsnr"), noise(), 1000)

    def error(each):
        return float((walk(each, noise(), 5) - reference).square().mean().sqrt())

    assert error(scheduler) < 0.8 * error(DPMSolverV3Scheduler(**SD, intervals=250, spacing="logsnr", corrector="off"))


# parts ----------------------------------------------------------------------------------------------------------------------------


def test_derivatives_of_a_polynomial():
    nodes = [0.3, 1.1, -0.2, -0.9]
    coefficients = [0.7, -1.2, 0.5, 2.0]  # sum c_k (x - 0.3)^k
    values = [torch.tensor([sum(c * (x - 0.3) ** k for k, c in enumerate(coefficients))], dtype=torch.float64) for x in nodes]
    found = derivatives(values, nodes, pseudo=False)
    for k, each in enumerate(found):
        assert float(each) == pytest.approx(math.factorial(k) * coefficients[k])


def test_pseudo_order_is_the_recurrence_of_the_card():
    nodes = np.array([0.3, 1.1, -0.2, -0.9])
    values = np.array([0.4, -1.0, 2.0, 0.6])
    D, found = values, []
    for k in range(1, 4):
        D = np.array([(D[i + 1] - D[i]) / (nodes[i + k] - nodes[i]) for i in range(len(D) - 1)])
        found.append(math.factorial(k) * D[0])
    weights = derivative_weights(list(nodes), pseudo=True)
    np.testing.assert_allclose(weights @ values, found)
    assert (weights[0, 2:] == 0).all(), "the first derivative uses two points only"
    np.testing.assert_allclose(weights[-1], derivative_weights(list(nodes), pseudo=False)[-1], err_msg="the highest one is the same")


def test_a_transition_against_integrals_by_hand():
    """l, s, b constant: every integral has a closed form."""
    l, s, b, h = 0.7, -0.4, 0.3, 1.5  # noqa: E741
    lam = np.linspace(-0.2, -0.2 + h, 4001)
    flat = torch.ones(len(lam), 1, dtype=torch.float64)
    over = transition(lam, l * flat, s * flat, b * flat, 3)
    k = l + s
    assert float(over.A) == pytest.approx(math.exp(-l * h))
    assert float(over.D) == pytest.approx(math.exp(s * h))
    assert float(over.B) == pytest.approx(b * (1 - math.exp(-s * h)) / s, rel=1e-6)
    assert float(over.E[0]) == pytest.approx((math.exp(k * h) - 1) / k, rel=1e-6)
    assert float(over.E[1]) == pytest.approx((math.exp(k * h) * (k * h - 1) + 1) / k**2, rel=1e-6)
    assert float(over.EB) == pytest.approx(b / s * ((math.exp(k * h) - 1) / k - (math.exp(l * h) - 1) / l), rel=1e-6)
    f = torch.tensor([0.9], dtype=torch.float64)
    torch.testing.assert_close(seen_from_end(seen_from_start(f, over), over), f)
    exact = over.A * (2.0 - over.EB - over.E[0] * f)
    torch.testing.assert_close(advance(2.0 * torch.ones(1, dtype=torch.float64), [f], over), exact)


def test_cumulative_is_the_trapezoid_rule():
    values = torch.rand(7, 3, dtype=torch.float64)
    torch.testing.assert_close(cumulative(values, 0.2)[-1], torch.trapezoid(values, dx=0.2, dim=0))


@pytest.mark.parametrize("kind", KINDS)
def test_x0_comes_back_from_every_prediction(kind):
    at = Level(0.4, 0.6, 0.0) if kind == "flow_prediction" else Level(0.8, 0.6, 0.0)
    x0, eps = torch.randn(2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = at.alpha * x0 + at.sigma * eps
    torch.testing.assert_close(clean(x, said(eps, x, at, kind), at, kind), x0)


@pytest.mark.parametrize("flow", [False, True])
def test_time_and_lambda_go_both_ways(flow):
    schedule = NoiseSchedule(1000) if flow else NoiseSchedule.of_alphas(DDIMScheduler(**SD).alphas_cumprod)
    t = np.array([999.0, 731.25, 200.5, 30.0, 1.0 if flow else 0.0])
    np.testing.assert_allclose(schedule.t(schedule.lam(t)), t, atol=1e-6)
    for lam in schedule.lam(t):
        at = schedule.level(float(lam))
        assert math.log(at.alpha / at.sigma) == pytest.approx(float(lam))
        assert (at.alpha + at.sigma if flow else at.alpha**2 + at.sigma**2) == pytest.approx(1)
    assert schedule.ends == pytest.approx(tuple(schedule.grid(10)[[0, -1]]))


def test_levels_are_ddims():
    scheduler, ddim = DPMSolverV3Scheduler(**SD), DDIMScheduler(**SD)
    for t in (0, 17, 500, 999):
        assert level_of(scheduler, t).alpha ** 2 == pytest.approx(float(ddim.alphas_cumprod[t]), rel=1e-6)
    x, eps = noise(3), noise(3, seed=1)
    at = torch.tensor([10, 400, 999])
    torch.testing.assert_close(scheduler.add_noise(x, eps, at), ddim.add_noise(x, eps, at), rtol=1e-5, atol=1e-6)


def test_a_terminal_snr_of_nought_is_cut():
    scheduler = DPMSolverV3Scheduler(**SD, rescale_betas_zero_snr=True, prediction_type="v_prediction", intervals=2000, solver_order=1)
    assert scheduler.schedule.ends[0] == pytest.approx(math.log(2.0**-12), rel=1e-3)
    scheduler.set_statistics(*gaussian_statistics(scheduler))
    torch.testing.assert_close(walk(scheduler, noise(), 6, of_gaussian), end_of_gaussian(scheduler, noise()), rtol=0, atol=2e-4)


def test_steps_end_on_the_grid():
    scheduler = DPMSolverV3Scheduler(**SD, intervals=50)
    scheduler.set_timesteps(7)
    place = (scheduler.schedule.lam(scheduler.timesteps.double().numpy()) - scheduler.grid[0]) / (scheduler.grid[1] - scheduler.grid[0])
    np.testing.assert_allclose(place, place.round(), atol=1e-3)
    assert scheduler.timesteps.dtype == torch.float32
    assert not torch.equal(scheduler.timesteps, scheduler.timesteps.round()), "timesteps are not whole numbers"
    free = spaced(scheduler.schedule, 7, "time")
    assert np.abs(scheduler.schedule.lam(scheduler.timesteps.double().numpy()) - free[:-1]).max() <= 0.51 * np.diff(scheduler.grid)[0]
    torch.testing.assert_close(scheduler.sigmas.log().neg()[-1].double(), torch.tensor(scheduler.schedule.ends[1]).double())


def test_steps_that_would_fall_together_are_moved_apart():
    grid = np.linspace(0, 10, 11)
    assert snapped(np.array([0.0, 0.1, 0.2, 5.0, 9.9, 10.0]), grid) == [0, 1, 2, 5, 9, 10]
    assert snapped(np.array([0.0, 9.8, 9.9, 10.0]), grid) == [0, 8, 9, 10]
    assert snapped(np.linspace(0, 10, 11) ** 2 / 10, grid) == list(range(11))
    with pytest.raises(ValueError, match="11 steps do not fit into 10 intervals"):
        snapped(np.linspace(0, 10, 12), grid)


def orders(monkeypatch, steps, begin=0, **options):
    """(orders of the predictor, orders of the corrector) in a run, read off the number of derivatives."""
    import diffgraft_dpm_solver_v3.schedulers as module

    seen = []
    monkeypatch.setattr(module, "advance", lambda y, taylor, over: (seen.append((len(taylor), over)), advance(y, taylor, over))[1])
    scheduler = DPMSolverV3Scheduler(**SD, **options)
    walk(scheduler, noise(4), steps, begin=begin)
    steps_made = list({id(over): over for _, over in seen}.values())
    places = [next(i for i, each in enumerate(steps_made) if each is over) for _, over in seen]
    predictor, corrector, made = [], {}, set()
    for (order, _), place in zip(seen, places, strict=True):
        if place in made:
            corrector[place + 1] = order  # over the same step again: its end is corrected
        else:
            predictor.append(order)
            made.add(place)
    return predictor, corrector


@pytest.mark.parametrize(("options", "predictor", "corrector"), [
    ({"solver_order": 1, "corrector": "off"}, [1, 1, 1, 1, 1, 1], {}),
    ({"solver_order": 3, "corrector": "off"}, [1, 2, 3, 3, 2, 1], {}),
    ({"solver_order": 3, "corrector": "off", "lower_order_final": False}, [1, 2, 3, 3, 3, 3], {}),
    ({"solver_order": 2, "corrector": "pseudo"}, [1, 2, 2, 2, 2, 1], {1: 2, 2: 3, 3: 3, 4: 3, 5: 3}),
    ({"solver_order": 2, "corrector": "full"}, [1, 2, 2, 2, 2, 1], {2: 2, 3: 2, 4: 2, 5: 2}),
    ({"solver_order": 2, "corrector": "auto"}, [1, 2, 2, 2, 2, 1], {1: 2, 2: 3, 3: 3, 4: 3, 5: 3}),
    ({"solver_order": 2, "corrector": "pseudo", "half": "t<=0.5"}, [1, 2, 2, 2, 2, 1], {4: 3, 5: 3}),
    ({"solver_order": 2, "corrector": "pseudo", "half": "t>0.5"}, [1, 2, 2, 2, 2, 1], {1: 2, 2: 3, 3: 3}),
    ({"solver_order": 3, "corrector": "pseudo", "predictor": "pseudo"}, [1, 2, 3, 3, 2, 1], {1: 2, 2: 3, 3: 4, 4: 4, 5: 3}),
])  # fmt: skip
def test_orders_of_predictor_and_corrector(monkeypatch, options, predictor, corrector):
    """With 6 steps, uniform in time: t = 1, 0.83, 0.67, 0.5005, 0.33, 0.17 (down to 0.001)."""
    assert orders(monkeypatch, 6, **options, intervals=1000) == (predictor, corrector)


def test_auto_corrects_short_runs_only(monkeypatch):
    assert orders(monkeypatch, 10, corrector="auto")[1] == {}
    assert len(orders(monkeypatch, 9, corrector="auto")[1]) == 8
    assert len(orders(monkeypatch, 12, begin=6, corrector="auto")[1]) == 5, "image to image: as many as really run"


def test_a_run_that_begins_in_mid_schedule_has_no_history(monkeypatch):
    assert orders(monkeypatch, 8, begin=3, solver_order=3, corrector="off")[0] == [1, 2, 3, 2, 1]
    scheduler = DPMSolverV3Scheduler(**SD, solver_order=1, intervals=2000)
    scheduler.set_statistics(*gaussian_statistics(scheduler))
    scheduler.set_timesteps(8)
    at, end = level_of(scheduler, scheduler.timesteps[3]), scheduler.schedule.level(scheduler.schedule.ends[1])
    spread = [math.sqrt(a.alpha**2 * SPREAD**2 + a.sigma**2) for a in (at, end)]
    exact = end.alpha * MEAN + (noise() - at.alpha * MEAN) * spread[1] / spread[0]
    torch.testing.assert_close(walk(scheduler, noise(), 8, of_gaussian, begin=3), exact, rtol=0, atol=1e-5)


def test_predictor_and_half_matter():
    found = {
        (predictor, half): walk(DPMSolverV3Scheduler(**SD, solver_order=3, predictor=predictor, corrector="pseudo", half=half), noise(), 6)
        for predictor in ("full", "pseudo")
        for half in (None, "t<=0.5", "t>0.5")
    }
    values = list(found.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(values) for b in values[i + 1 :])


def test_final_zero_takes_the_last_noise_off():
    """On the Gaussian the polynomial is exact, so the end is x0 of the exact end."""
    options = {**SD, "solver_order": 1, "intervals": 2000}
    ends = []
    for final in ("sigma_min", "zero"):
        scheduler = DPMSolverV3Scheduler(**options, final=final)
        scheduler.set_statistics(*gaussian_statistics(scheduler))
        ends.append(walk(scheduler, noise(), 5, of_gaussian))
    at = scheduler.schedule.level(scheduler.schedule.ends[1])
    torch.testing.assert_close(ends[1], (ends[0] - at.sigma * of_gaussian(ends[0], at)) / at.alpha, rtol=0, atol=1e-5)


def test_half_precision_states_are_kept_exactly():
    scheduler = DPMSolverV3Scheduler(**SD)
    scheduler.set_timesteps(6)
    x = noise(dtype=torch.bfloat16)
    for i, t in enumerate(scheduler.timesteps):
        if i == 5:
            kept = scheduler._exact
            assert kept.dtype == torch.float32
            assert torch.equal(kept.to(torch.bfloat16), x)
            assert not torch.equal(kept, x.float())
        x = scheduler.step(of_mixture(x.double(), level_of(scheduler, t)).to(x.dtype), t, x).prev_sample
        assert x.dtype == torch.bfloat16
    assert scheduler._exact is None, "the run is over"


@pytest.mark.parametrize(("options", "part"), [
    ({"solver_order": 4}, "solver_order = 4"), ({"solver_order": 0}, "solver_order = 0"), ({"intervals": 0}, "intervals = 0"),
    ({"corrector": "yes"}, "corrector = 'yes'.*pseudo"), ({"half": "t<0.5"}, "half"), ({"spacing": "karras"}, "spacing.*edm"),
    ({"prediction_type": "score"}, "prediction_type"), ({"predictor": "x"}, "predictor"), ({"final": "x"}, "final"),
])  # fmt: skip
def test_settings_without_meaning_are_refused(options, part):
    with pytest.raises(ValueError, match=part):
        DPMSolverV3Scheduler(**options)


def test_statistics_that_do_not_go_together_are_refused():
    scheduler = DPMSolverV3Scheduler(**SD)
    l = torch.ones(11, 4, 1, 1)  # noqa: E741
    for bad, part in (
        ((l, l[:5], l), "one shape"),
        ((l[:1], l[:1], l[:1]), "N >= 1"),
        ((l, l, l * torch.nan), "not finite"),
    ):
        with pytest.raises(ValueError, match=part):
            scheduler.set_statistics(*bad)
    with pytest.raises(ValueError, match="of a noise schedule with lambda from -6"):
        scheduler.set_statistics(l, l, l, ends=(-6.0, 6.0))
    with pytest.raises(ValueError, match="for flow models"):
        scheduler.set_timesteps(5, mu=1.0)
    with pytest.raises(ValueError, match="one of timesteps and sigmas"):
        scheduler.set_timesteps(timesteps=[900, 100], sigmas=[10.0, 1.0])


def test_statistics_of_another_grid_are_interpolated():
    coarse, fine = (DPMSolverV3Scheduler(**SD, solver_order=1, intervals=n) for n in (40, 400))
    fine.set_statistics(*gaussian_statistics(coarse))
    own = gaussian_statistics(fine)
    for a, b in zip(fine._on_grid(), own, strict=True):
        assert float((a - b).abs().max()) < 5e-3
    assert float((walk(fine, noise(), 5, of_gaussian) - end_of_gaussian(fine, noise())).abs().max()) < 5e-3


def test_an_edited_schedule_is_followed():
    """What another plugin writes into ``timesteps`` and ``sigmas``: moved to the grid; a part of the schedule stays the part."""
    scheduler = DPMSolverV3Scheduler(**SD)
    scheduler.set_timesteps(8)
    part, whole = scheduler.timesteps[:3], scheduler.timesteps
    scheduler.timesteps, scheduler.sigmas = part, scheduler.sigmas[:4]
    assert scheduler.timesteps.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    x = noise()
    for t in scheduler.timesteps:
        plan = scheduler._plan
        x = scheduler.step(of_mixture(x, level_of(scheduler, t)), t, x).prev_sample
    assert plan.levels[-1].lam == pytest.approx(float(scheduler.schedule.lam(whole[3:4].double().numpy())[0]), abs=1e-4)
    scheduler.set_timesteps(3)
    scheduler.timesteps = torch.tensor([990.0, 500.0, 100.0])
    lam = scheduler.schedule.lam(scheduler.timesteps.double().numpy())
    assert np.abs((lam - scheduler.grid[0]) / np.diff(scheduler.grid)[0] % 1 - 0.5).min() > 0.49


def test_a_scheduler_survives_saving(tmp_path):
    scheduler = DPMSolverV3Scheduler.from_config(DDIMScheduler(**SD).config, solver_order=3, spacing="logsnr")
    scheduler.save_pretrained(tmp_path)
    loaded = DPMSolverV3Scheduler.from_pretrained(tmp_path)
    assert loaded.config.solver_order == 3
    assert torch.equal(walk(loaded, noise(), 5), walk(scheduler, noise(), 5))


# estimation -----------------------------------------------------------------------------------------------------------------------


def measured(scheduler, model, n, seed=5):
    """l, s, b that the measuring scheduler finds on data of which the exact denoiser is ``model``; the data are drawn, not sampled."""
    generator = torch.Generator().manual_seed(seed)
    if model is of_mixture:
        which = torch.multinomial(SHARES, n, replacement=True, generator=generator)[:, None]
        mean, spread = MEANS[which], SPREADS[which]
    else:
        mean, spread = MEAN, SPREAD
    data = mean + spread * torch.randn(n, 1, generator=generator, dtype=torch.float64)
    options = {"solver_order": 1, "corrector": "off", "spacing": "logsnr", "final": "zero"}
    measuring = MeasuringScheduler.from_config(scheduler.config, **options)
    measuring.prepare(1, 0.01, None, generator)
    measuring.set_timesteps(2)
    asked = np.concatenate([measuring.schedule.lam(measuring.timesteps[:2].double().numpy()), measuring._asked.ravel()])
    x, kind = noise(n), scheduler.config.prediction_type
    for i, (t, lam) in enumerate(zip(measuring.timesteps, asked, strict=True)):
        at = measuring.schedule.level(float(lam))
        eps = (x - at.alpha * data) / at.sigma if i < 2 else model(x, at)  # so that what is "sampled" is the data
        x = measuring.step(said(eps, x, at, kind), t, x).prev_sample
    torch.testing.assert_close(x, data, rtol=0, atol=1e-6)
    return statistics(measuring.grid, type(measuring._found[0][0])(**measuring.measured()))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction"])
def test_estimates_tend_to_the_closed_form_on_gaussian_data(kind):
    scheduler = DPMSolverV3Scheduler(**SD, prediction_type=kind, intervals=60)
    exact = gaussian_statistics(scheduler)
    found = measured(scheduler, of_gaussian, 8)
    torch.testing.assert_close(found[0], exact[0], rtol=0, atol=1e-5)  # the Jacobian is the same everywhere
    assert (found[1] == 0).all(), "Var(f) = 0"
    torch.testing.assert_close(found[2][2:-2], exact[2][2:-2], rtol=0, atol=1e-2)  # l' is a difference over the grid


def of_vectors(covariance):
    """eps of the exact denoiser of N(MEAN, covariance) in d dimensions, where Rademacher noise sees the off-diagonal Jacobian."""
    eye = torch.eye(len(covariance), dtype=torch.float64)

    def model(x, at):
        inverse = torch.linalg.inv(at.alpha**2 * covariance + at.sigma**2 * eye)
        return at.sigma * (x - at.alpha * MEAN) @ inverse

    return model


def test_estimates_become_better_with_more_samples():
    mix = torch.tensor([[0.5, 0.3, 0.0], [0.3, 0.6, -0.2], [0.0, -0.2, 0.4]], dtype=torch.float64)
    schedule = NoiseSchedule.of_alphas(DDIMScheduler(**SD).alphas_cumprod)
    at, model = schedule.level(0.2), of_vectors(mix)
    exact = torch.diagonal(at.sigma**2 * torch.linalg.inv(at.alpha**2 * mix + at.sigma**2 * torch.eye(3, dtype=torch.float64)))
    generator = torch.Generator().manual_seed(0)

    def error(n):
        x = at.alpha * MEAN + torch.randn(n, 3, generator=generator, dtype=torch.float64)
        v = torch.where(torch.randn(n, 3, generator=generator) < 0, -1.0, 1.0).double()
        x0, pushed = ((z - at.sigma * model(z, at)) / at.alpha for z in (x, x + 0.01 * at.sigma * v))
        m = at.alpha / (0.01 * at.sigma) * v * (pushed - x0)
        return float((1 - moments(m, x, x, x, [0]).m[0] - exact).square().mean().sqrt())

    few, many = (np.mean([error(n) for _ in range(20)]) for n in (16, 1024))
    assert many < few / 5  # 8 in the mean
    assert many < 0.02


def test_a_difference_is_the_jacobian_vector_product():
    """Of the mixture's denoiser, where it is not linear, against forward-mode automatic differentiation."""
    at = Level(0.8, 0.6, math.log(0.8 / 0.6))
    x, v = noise(50), torch.where(noise(50, seed=3) < 0, -1.0, 1.0).double()

    def x0(z):
        return (z - at.sigma * of_mixture(z, at)) / at.alpha

    _, exact = torch.func.jvp(x0, (x,), (v,))
    found = (x0(x + 1e-3 * at.sigma * v) - x0(x)) / (1e-3 * at.sigma)
    torch.testing.assert_close(found, exact, rtol=0, atol=2e-2)
    both = (x0(x + 1e-3 * v) - x0(x - 1e-3 * v)) / 2e-3
    torch.testing.assert_close(both, exact, rtol=0, atol=1e-4)


def test_statistics_are_the_regression_of_their_definition():
    """Against f and f' formed sample by sample."""
    generator = torch.Generator().manual_seed(0)
    lam = np.linspace(-1, 1, 9)
    d, q, r = torch.randn(3, 9, 40, 1, generator=generator, dtype=torch.float64)
    m = torch.linspace(0.1, 0.8, 9, dtype=torch.float64)[:, None, None] ** 2
    r = r + 0.7 * d
    sets = [moments(m[i].expand(40, 1), d[i], q[i], r[i], [0]) for i in range(9)]
    stacked = type(sets[0])(*(torch.stack([each[k][0] for each in sets]) for k in range(9)))
    l, s, b = statistics(lam, stacked)  # noqa: E741
    slope = -torch.gradient(m[:, 0], spacing=0.25, dim=0)[0]  # l'
    for i in range(9):
        eps, x_alpha = (d[i] + q[i]), q[i]  # e^{-lambda} eps and x / alpha
        f = eps - (1 - m[i]) * x_alpha
        derivative = (1 - m[i] - 1) * eps + r[i] - slope[i] * x_alpha
        cov = ((f - f.mean()) * (derivative - derivative.mean())).mean()
        wanted = cov / (f - f.mean()).square().mean()
        assert float(s[i]) == pytest.approx(float(wanted))
        assert float(b[i]) == pytest.approx(float(derivative.mean() - wanted * f.mean()))
        assert float(l[i]) == pytest.approx(1 - float(m[i]))


def test_moments_of_parts_are_those_of_the_whole():
    x = torch.randn(4, 12, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = moments(*x, [0])
    parts = pooled([moments(*x[:, i : i + 4], [0]) for i in (0, 4, 8)])
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b)


# in pipelines ---------------------------------------------------------------------------------------------------------------------

PIPELINES = ("StableDiffusionPipeline", "DiTPipeline", "PixArtAlphaPipeline", "StableDiffusion3Pipeline", "FluxPipeline")
N = 8


def call(made, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 5, **changes}
    return torch.as_tensor(made.pipe(**kwargs, generator=torch.Generator().manual_seed(3))[0])


@pytest.fixture(scope="module")
def artefact():
    """Of the tiny Stable Diffusion."""
    made = make("StableDiffusionPipeline")
    return calibrate_call(made.pipe, DPMSolverV3(intervals=N), lambda: call(made))


def mean_of(artefact):
    return float(artefact.tensors["l"].mean())


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_is_measured_and_sampled(name):
    made = make(name)
    before = call(made)
    found = calibrate_call(made.pipe, DPMSolverV3(intervals=N, draws=2), lambda: call(made))
    assert torch.equal(call(made), before), "the pipeline is as it was"
    assert found.facts["K"] == 2
    assert {len(found.tensors[key]) for key in "lsb"} == {N + 1}
    assert all(bool(found.tensors[key].isfinite().all()) for key in "lsb")
    if name in ("StableDiffusion3Pipeline", "FluxPipeline"):  # x0 = x - sigma v: near pure noise a net whose answer is bounded has l = 1
        torch.testing.assert_close(found.tensors["l"][0], torch.ones_like(found.tensors["l"][0]), rtol=0, atol=0.05)
    outputs = []
    for given in (None, found):
        load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=N, artefact=given)])
        outputs.append(call(made))
        report = made.pipe.plugins.report()
        assert report.steps == 5, "one denoiser call a step"
        unload(made.pipe)
    assert bool(outputs[1].isfinite().all())
    assert not torch.equal(*outputs)


def test_the_measurement_is_about_the_guided_prediction():
    made = make("StableDiffusionPipeline")
    plugin = DPMSolverV3(intervals=N)
    found = [calibrate_call(made.pipe, plugin, lambda scale=scale: call(made, guidance_scale=scale)) for scale in (1.0, 7.5, 7.5)]
    assert [each.facts["guidance_scale"] for each in found] == [1.0, 7.5, 7.5]
    assert torch.equal(found[1].tensors["s"], found[2].tensors["s"]), "the same seed, the same statistics"
    assert not torch.allclose(found[0].tensors["l"], found[1].tensors["l"], atol=1e-4)


def test_what_the_calibrator_measures_is_what_the_denoiser_says(artefact):
    """Asked again by hand: the moments of one grid point from the pipeline's own U-Net."""
    made = make("StableDiffusionPipeline")
    from diffgraft_dpm_solver_v3.calibration import DPMSolverV3Calibrator

    calibrator = DPMSolverV3Calibrator(intervals=N)
    load_pipeline(made.pipe, [calibrator])
    kept = []
    unet, original = made.pipe.unet, made.pipe.unet.forward
    unet.forward = lambda sample, t, **kwargs: (kept.append((sample.clone(), t, kwargs)), original(sample, t, **kwargs))[1]
    call(made, guidance_scale=2.0)
    records = made.pipe.plugins.report().plugins[calibrator.name].records
    unload(made.pipe)
    del unet.forward
    assert len(kept) == 5 + 4 * (N + 1)
    point = 3
    (base, pushed, before, after) = kept[5 + 4 * point : 9 + 4 * point]
    scheduler = DPMSolverV3Scheduler.from_config(make("StableDiffusionPipeline").pipe.scheduler.config, intervals=N)
    answers = []
    for sample, t, kwargs in (base, pushed, before, after):
        with torch.no_grad():
            u, c = original(sample, t, **kwargs)[0].chunk(2)
        at = level_of(scheduler, t)
        x = sample.chunk(2)[0]
        answers.append((x, clean(x, u + 2.0 * (c - u), at, scheduler.config.prediction_type), at))
    (x, x0, at), (xv, x0v, _), (_, xa, first), (_, xb, last) = answers
    assert at.lam == pytest.approx(float(scheduler.grid[point]), abs=1e-4)
    v = (xv - x) / (0.01 * at.sigma)
    torch.testing.assert_close(v.abs(), torch.ones_like(v), rtol=0, atol=1e-3)
    axes = [0, 2, 3]
    by_hand = {"m": at.alpha * v * (x0v - x0) / (0.01 * at.sigma), "d": -x0, "q": x / at.alpha, "r": -(xb - xa) / (last.lam - first.lam)}
    for key, values in by_hand.items():
        torch.testing.assert_close(records[key][point].flatten(), values.double().mean(axes), rtol=1e-2, atol=1e-2)


def test_full_statistics_bind_to_the_size(artefact):
    made = make("StableDiffusionPipeline")
    full = calibrate_call(made.pipe, DPMSolverV3(intervals=N, ems_shape="full"), lambda: call(made))
    assert full.tensors["l"].shape == (N + 1, 4, 8, 8)
    assert full.tensors["l"].dtype == torch.float32
    assert artefact.tensors["l"].shape == (N + 1, 4, 1, 1)
    means = full.tensors["l"].mean((2, 3), keepdim=True).double()
    torch.testing.assert_close(means, artefact.tensors["l"], rtol=0, atol=1e-5)  # the same seeds: the same samples and noise
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=N, artefact=full)])
    call(made)
    with pytest.raises(ArtefactMismatch, match=r"shape \(4, 8, 8\), this run's samples \(4, 8, 16\).*ems_shape=channel"):
        call(made, height=64, width=128)
    assert bool(call(made).isfinite().all()), "usable afterwards"
    made.pipe.plugins.configure("dpm_solver_v3", artefact=artefact)
    assert call(made, height=64, width=128).shape == (1, 4, 8, 16)


def test_an_artefact_fits_any_number_of_steps_and_scheduler_and_says_when_guidance_differs(artefact):
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=N, artefact=artefact)])
    call(made, num_inference_steps=7)
    assert not made.pipe.plugins.report().plugins["dpm_solver_v3"].notes
    made.pipe.scheduler = DPMSolverMultistepScheduler.from_config(made.pipe.scheduler.config)
    call(made, guidance_scale=3.0)
    (note,) = made.pipe.plugins.report().plugins["dpm_solver_v3"].notes
    assert "guidance scale 3, but l, s, b were measured at 7.5" in note
    made.pipe.plugins.configure("dpm_solver_v3", artefact=None)
    call(made)
    (note,) = made.pipe.plugins.report().plugins["dpm_solver_v3"].notes
    assert "DPM-Solver++" in note
    assert "diffgraft calibrate dpm_solver_v3" in note


def test_plain_diffusers_use(artefact):
    grafted, plain = make("StableDiffusionPipeline"), make("StableDiffusionPipeline")
    load_pipeline(grafted.pipe, plugins=[DPMSolverV3(intervals=N, artefact=artefact)])
    plain.pipe.scheduler = DPMSolverV3Scheduler.from_config(plain.pipe.scheduler.config, intervals=N)
    plain.pipe.scheduler.set_statistics(*(artefact.tensors[key] for key in "lsb"))
    assert torch.equal(call(grafted), call(plain))


def test_denoisers_get_timesteps_that_are_not_whole():
    for name in PIPELINES:
        made = make(name)
        load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=30)])
        seen = []
        denoiser = getattr(made.pipe, "unet", None) or made.pipe.transformer

        def note(module, args, kwargs, seen=seen):
            seen.append(kwargs.get("timestep", args[1] if len(args) > 1 else None))

        handle = denoiser.register_forward_pre_hook(note, with_kwargs=True)
        call(made)
        handle.remove()
        t = torch.stack([torch.as_tensor(each).float().flatten()[0] for each in seen[:5]])
        assert bool((t != t.round()).any()), (name, t)


def test_image_to_image_begins_in_mid_schedule(artefact):
    made = make("StableDiffusionImg2ImgPipeline")
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=30)])
    strong, weak = (call(made, num_inference_steps=10, strength=s) for s in (0.9, 0.3))
    assert made.pipe.plugins.report().steps == 3
    untouched = call(made, num_inference_steps=10, strength=0.1)
    assert float((weak - untouched).square().mean()) < float((strong - untouched).square().mean())


def test_a_calibration_that_was_interrupted_goes_on(tmp_path):
    made = make("StableDiffusionPipeline")
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    settings = CallSettings(steps=3, extra=extra)
    samples = [Sample(i, prompt) for i, prompt in enumerate(("a red apple", "two dogs"))]
    plugin = DPMSolverV3(intervals=4)
    whole = calibrate(made.pipe, plugin, samples, settings, tmp_path / "whole.safetensors")

    def stop(what, done, of):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(made.pipe, plugin, samples, settings, tmp_path / "parts.safetensors", on_progress=stop)
    again = calibrate(made.pipe, plugin, samples, settings, tmp_path / "parts.safetensors")
    assert whole.facts["K"] == again.facts["K"] == 2
    for key in "lsb":
        assert torch.equal(whole.tensors[key], again.tensors[key])
    read = Artefact.load(tmp_path / "whole.safetensors", "dpm_solver_v3")
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=4, artefact=str(tmp_path / "whole.safetensors"))])
    assert bool(call(made, num_inference_steps=4).isfinite().all())
    assert read.facts["ends"] == pytest.approx(list(DPMSolverV3Scheduler.from_config(made.pipe.scheduler.config).schedule.ends))


def test_artefacts_that_do_not_fit_are_refused(artefact):
    made = make("StableDiffusionPipeline")
    before = call(made)
    broken = {
        "'l' is missing": Artefact(artefact.made_for, {k: v for k, v in artefact.tensors.items() if k != "l"}, artefact.facts),
        "'s' has shape": Artefact(artefact.made_for, {**artefact.tensors, "s": artefact.tensors["s"][:-1]}, artefact.facts),
        "lambda rises": Artefact(artefact.made_for, artefact.tensors, {**artefact.facts, "ends": [9.0, -9.0]}),
    }
    for part, each in broken.items():
        with pytest.raises(ArtefactMismatch, match=f"{part}.*diffgraft calibrate dpm_solver_v3"):
            load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=N, artefact=each)])
    elsewhere = Artefact(artefact.made_for, artefact.tensors, {**artefact.facts, "ends": [-9.0, 9.0]})
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=N, artefact=elsewhere)])
    with pytest.raises(ArtefactMismatch, match=r"of a noise schedule.*diffgraft calibrate dpm_solver_v3"):
        call(made)  # a run's scheduler is known only now
    unload(made.pipe)
    with pytest.raises(ArtefactMismatch, match="StableDiffusionXLPipeline"):
        load_pipeline(make("StableDiffusionXLPipeline").pipe, plugins=[DPMSolverV3(artefact=artefact)])
    with pytest.raises(ConfigError, match=r"no such file; make one with `diffgraft calibrate dpm_solver_v3"):
        load_pipeline(made.pipe, plugins=[DPMSolverV3(artefact="none.safetensors")])
    load_pipeline(made.pipe, plugins=[DPMSolverV3(intervals=4)])
    with pytest.raises(ConfigError, match=r"intervals = 4: 5 steps do not fit into 4 intervals"):
        call(made)
    unload(made.pipe)
    assert torch.equal(call(made), before)


@pytest.mark.parametrize(("knobs", "part"), [
    ({"order": 4}, "order = 4"), ({"order": -1}, "order = -1"), ({"half": "t<0.5"}, "half"), ({"corrector": True}, "corrector"),
    ({"intervals": 0}, "intervals = 0"), ({"delta": 0}, "delta = 0"), ({"draws": 0}, "draws = 0"), ({"ems_shape": "pixel"}, "ems_shape"),
    ({"artefact": 3}, "artefact"), ({"oder": 2}, "oder.*order"),
])  # fmt: skip
def test_bad_knobs_are_refused(knobs, part):
    with pytest.raises(ConfigError, match=part):
        DPMSolverV3(**knobs)


def test_schedulers_that_it_is_not_valid_for_are_refused_and_the_pipeline_works_on():
    made = make("StableDiffusionPipeline")
    own, before = made.pipe.scheduler, call(made)
    load_pipeline(made.pipe, plugins=[DPMSolverV3])
    for scheduler, part in (
        (LCMScheduler.from_config(own.config), "distilled model"),
        (EulerAncestralDiscreteScheduler.from_config(own.config), "samples the diffusion SDE"),
        (DPMSolverMultistepScheduler.from_config(own.config, algorithm_type="sde-dpmsolver++"), "samples the diffusion SDE"),
        (DDIMScheduler.from_config(own.config, clip_sample=True), "clip_sample"),
        (DDIMScheduler.from_config(own.config, thresholding=True), "thresholding"),
    ):
        made.pipe.scheduler = scheduler
        with pytest.raises(Unsupported, match=part):
            call(made)
        with pytest.raises(Unsupported, match=part):
            DPMSolverV3().make_scheduler(scheduler, registry.find_family(type(made.pipe).__mro__[1]))
    unload(made.pipe)
    made.pipe.scheduler = own
    assert torch.equal(call(made), before)
    flow = make("StableDiffusion3Pipeline")
    load_pipeline(flow.pipe, plugins=[DPMSolverV3])
    flow.pipe.scheduler = FlowMatchEulerDiscreteScheduler.from_config(flow.pipe.scheduler.config, stochastic_sampling=True)
    with pytest.raises(Unsupported, match="samples the diffusion SDE"):
        call(flow)
    assert DPMSolverSDEScheduler.__name__.endswith("SDEScheduler")  # refused by its name; needs torchsde to be built


OWN = {
    "timesteps": ([951.0, 700.5, 300, 20], [[], [5, 5], [1, 400], [2000, 5], [float("nan")]]),
    "sigmas": ([12.0, 4.0, 1.0, 0.2, 0.0], [[], [1.0], [1.0, 1.0], [0.1, 3.0], [float("inf"), 1.0]]),
}


@pytest.mark.parametrize("name", OWN)
def test_a_schedule_of_the_users_is_run_or_refused_by_us(name):
    made, own = make("StableDiffusionPipeline"), OWN[name][0]
    load_pipeline(made.pipe, plugins=[DPMSolverV3])
    told = []
    call(made, **{name: own}, callback_on_step_end=lambda pipe, i, t, kwargs: told.append(float(t)) or {})
    ratio = made.pipe.plugins.run_scheduler()
    wanted = own if name == "timesteps" else ratio.schedule.t(-np.log(np.array(own[:-1])))
    assert told == pytest.approx(list(wanted), abs=8), "moved to the grid"
    for bad in OWN[name][1]:
        with pytest.raises(ConfigError, match=f"dpm_solver_v3.*{name} = "):
            call(made, **{name: bad})
    assert call(made).isfinite().all()


def test_a_flow_model_takes_its_users_schedule():
    made = make("StableDiffusion3Pipeline")
    load_pipeline(made.pipe, plugins=[DPMSolverV3])
    call(made, sigmas=[0.9, 0.5, 0.1])
    assert made.pipe.plugins.report().steps == 3
    scheduler = DPMSolverV3Scheduler(prediction_type="flow_prediction")
    scheduler.set_timesteps(timesteps=[900, 500, 100])
    assert scheduler.timesteps.tolist() == pytest.approx([900, 500, 100], abs=8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("corrector", ["off", "pseudo", "full"])
def test_what_a_callback_does_to_the_latents_stays(dtype, corrector):
    """In place or as a new tensor; the corrector does not take it back."""

    made = make("StableDiffusionPipeline")
    made.pipe.to(dtype)
    load_pipeline(made.pipe, plugins=[DPMSolverV3(corrector=corrector)])

    def end(change):
        return call(made, callback_on_step_end=change).float()

    def in_place(pipe, i, t, kwargs):
        if i == 2:
            kwargs["latents"].mul_(0.5)
        return {}

    def new(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"] * 0.5} if i == 2 else {}

    def cloned(pipe, i, t, kwargs):
        return {"latents": kwargs["latents"].clone()}

    plain = end(lambda *_: {})
    assert torch.equal(end(cloned), plain), "a clone that nobody edited is no edit"
    assert torch.equal(end(in_place), end(new))
    assert float((end(new) - plain).abs().mean()) > 0.1


def test_a_state_that_was_put_there_is_where_the_next_step_begins():
    scheduler = DPMSolverV3Scheduler(**SD, corrector="pseudo", solver_order=1)
    for edit in (False, True):
        scheduler.set_timesteps(6)
        x = noise(20)
        for i, t in enumerate(scheduler.timesteps):
            if edit and i == 3:
                x.fill_(0.25)
            before = x.clone()
            x = scheduler.step(torch.zeros_like(x), t, x).prev_sample
            if i == 3:
                levels = scheduler._plan.levels
                wanted = before * levels[4].alpha / levels[3].alpha  # eps = 0
                torch.testing.assert_close(x, wanted, rtol=2e-3, atol=1e-6)


def test_the_authors_files_are_read(tmp_path):
    made = make("StableDiffusionPipeline")
    generator = np.random.default_rng(0)
    l, s, b = (generator.normal(size=(N + 1, 4, 8, 8)) * 0.1 + shift for shift in (1, 0, 0))  # noqa: E741
    with pytest.raises(ConfigError, match=r"l.npz: there is no such file"):
        published_statistics(made.pipe, tmp_path)
    np.savez(tmp_path / "l.npz", l=l)
    np.savez(tmp_path / "sb.npz", s=s, b=b)
    found = published_statistics(made.pipe, tmp_path, guidance_scale=7.5)
    assert torch.equal(found.tensors["l"], torch.from_numpy(l).float())
    found.save(tmp_path / "ems.safetensors")
    load_pipeline(made.pipe, plugins=[DPMSolverV3(artefact=tmp_path / "ems.safetensors")])
    output = call(made, guidance_scale=7.5)
    assert not made.pipe.plugins.report().plugins["dpm_solver_v3"].notes
    made.pipe.plugins.configure("dpm_solver_v3", artefact=found)
    assert torch.equal(call(made, guidance_scale=7.5), output)
    unload(made.pipe)
    np.savez(tmp_path / "sb.npz", s=s)
    with pytest.raises(ArtefactMismatch, match=r"sb.npz does not hold s, b"):
        published_statistics(made.pipe, tmp_path)
    np.savez(tmp_path / "sb.npz", s=s, b=b * np.nan)
    with pytest.raises(ArtefactMismatch, match="not finite"):
        published_statistics(made.pipe, tmp_path)
    (tmp_path / "sb.npz").write_bytes(b"no archive")
    with pytest.raises(ArtefactMismatch, match=r"sb.npz does not hold"):
        published_statistics(made.pipe, tmp_path)


def test_inpainting_cannot_be_measured():
    made = make("StableDiffusionInpaintPipeline")
    with pytest.raises(Unsupported, match="changes its samples between steps"):
        calibrate_call(made.pipe, DPMSolverV3(intervals=4), lambda: call(made, num_inference_steps=4))


def test_contract_has_cases():
    assert contract_cases("dpm_solver_v3", ["sd"])
