"""rbf_search: the interpolants' identities, the SDE's marginals, the budget's arithmetic, searches in pipelines, bad rewards."""

from __future__ import annotations

import itertools
import math
from typing import ClassVar

import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, Paper, Plugin, RewardError, Unsupported, load_pipeline
from diffgraft.installed.planner import Part, plan
from diffgraft_pipelines.tiny import make
from diffgraft_rbf_search import FlowSDEScheduler, RBFSearch, VPFlowScheduler
from diffgraft_rbf_search.method import (
    VP,
    BestOfN,
    Climb,
    Greedy,
    Level,
    Linear,
    diffusion,
    move,
    quota,
    score,
    sde_step,
    spaced,
    tweedie,
    velocity,
)
from diffgraft_rbf_search.rewards import compressibility
from diffgraft_rbf_search.search import Search, captions, nominal
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline
from PIL import Image

PATHS = {"vp": VP(), "linear": Linear()}
TIMES = (0.05, 0.3, 0.6, 0.9, 0.995)
SIZE = "diffgraft_rbf_search.rewards:compressibility"


def call(made, seed=3, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 4, **changes}
    return made.pipe(**kwargs, generator=torch.Generator().manual_seed(seed))[0]


def searching(name="FluxPipeline", reward=SIZE, **knobs):
    made = make(name)
    load_pipeline(made.pipe, plugins={"rbf_search": {"reward": reward, "max_nfe": 12, "particles": 3, "record": True, **knobs}})
    return made


def report(made):
    return made.pipe.plugins.report().plugins["rbf_search"]


# the interpolants -----------------------------------------------------------------------------------------------------------------

VARIANCE, MEAN = 0.25, 0.7


def gaussian(x, level: Level):
    """(velocity, score, x0) of data N(MEAN, VARIANCE) on an interpolant, in closed form."""
    a, s = level.a, level.s
    total = a * a * VARIANCE + s * s
    centred = x - a * MEAN
    x0 = MEAN + a * VARIANCE / total * centred
    eps = s / total * centred
    return level.da * x0 + level.ds * eps, -centred / total, x0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", TIMES)
def test_converted_velocity_is_the_analytic_one(path, r):
    """Card: to 1e-12 on a Gaussian; the flow model is asked at the linear time and x / c."""
    level = PATHS[path].at(r)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    v, _, _ = gaussian(x / level.c, Linear().at(level.t))
    u, _, _ = gaussian(x, level)
    torch.testing.assert_close(velocity(x, v, level), u, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", TIMES)
def test_score_and_tweedie(path, r):
    level = PATHS[path].at(r)
    x = torch.linspace(-3, 3, 13, dtype=torch.float64)
    u, right, x0 = gaussian(x, level)
    torch.testing.assert_close(score(x, u, level), right, rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(tweedie(x, u, level), x0, rtol=1e-11, atol=1e-11)
    v, _, _ = gaussian(x / level.c, Linear().at(level.t))
    torch.testing.assert_close(x / level.c - level.t * v, x0, rtol=1e-11, atol=1e-11)  # the flow model's own x0 is the same


@pytest.mark.parametrize("r", TIMES)
def test_conversion_formulas(r):
    """The level's shorter forms are the general ones for a linear source, and derivatives are derivatives."""
    at, h = VP().at(r), 1e-6
    assert at.t == pytest.approx(1 / (1 + at.a / at.s), rel=1e-12)
    assert at.c == pytest.approx(at.s / at.t, rel=1e-12)
    assert at.dt == pytest.approx(at.t**2 * (at.s * at.da - at.a * at.ds) / (at.s**2 * (at.t * -1 - (1 - at.t))), rel=1e-10)
    assert at.dc == pytest.approx((at.t * at.ds - at.s * at.dt) / at.t**2, rel=1e-8)
    for name, derivative in (("a", at.da), ("s", at.ds), ("t", at.dt), ("c", at.dc)):
        slope = (getattr(VP().at(r + h), name) - getattr(VP().at(r - h), name)) / (2 * h)
        assert derivative == pytest.approx(slope, rel=1e-4, abs=1e-8), name


def test_vp_ends_before_pure_noise():
    end = VP().at(1.0)
    assert end.t == pytest.approx(0.99347, abs=1e-5)
    assert end.c == pytest.approx(1.00655, abs=1e-5)
    assert VP().at(0.0).t == 0
    assert VP().time(1.0) == VP().time(0.999) == 1.0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("r", [0.0, *TIMES])
def test_time_is_the_inverse(path, r):
    assert PATHS[path].time(PATHS[path].at(r).t) == pytest.approx(r, abs=1e-9)


def test_equal_betas():
    path = VP(5.0, 5.0)
    assert path.time(path.at(0.4).t) == pytest.approx(0.4)


def walk(path, norm, shape, steps, n, generator) -> torch.Tensor:
    """The SDE on Gaussian data, by ``move`` on the flow model's own samples, from the exact marginal at r = 1 to the last level."""
    levels = [path.at(1 - i / steps) for i in range(steps)]
    first = Linear().at(levels[0].t)
    std = math.sqrt(first.a**2 * VARIANCE + first.s**2)
    x = first.a * MEAN + std * torch.randn(n, generator=generator, dtype=torch.float64)
    for here, there in itertools.pairwise(levels):
        v, _, _ = gaussian(x, Linear().at(here.t))
        of_x, of_v, of_noise = move(here, there, diffusion(here, norm, shape))
        x = of_x * x + of_v * v + of_noise * torch.randn(n, generator=generator, dtype=torch.float64)
    return x


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("norm", "shape"), [(0.0, "square"), (1.0, "constant"), (3.0, "square"), (2.0, "linear"), (1.0, "sigma"), (2.0, "sin")]
)
def test_marginals_stay_for_any_noise(path, norm, shape):
    """Card: the SDE preserves Gaussian marginals as dr -> 0; here after 400 steps, at the last level before r = 0."""
    x = walk(PATHS[path], norm, shape, 400, 40_000, torch.Generator().manual_seed(0))
    last = Linear().at(PATHS[path].at(1 / 400).t)
    assert float(x.mean()) == pytest.approx(last.a * MEAN, abs=0.015)
    assert float(x.var()) == pytest.approx(last.a**2 * VARIANCE + last.s**2, abs=0.015)


def test_the_error_falls_with_the_step():
    """And the check above can fail: with few steps it would."""
    errors = []
    for steps in (10, 40):
        x = walk(VP(), 3.0, "square", steps, 200_000, torch.Generator().manual_seed(0))
        last = Linear().at(VP().at(1 / steps).t)
        errors.append(abs(float(x.var()) - last.a**2 * VARIANCE - last.s**2))
    assert errors[0] > 0.02
    assert errors[1] < errors[0] / 2, errors


def test_move_is_the_step_in_the_flow_models_coordinates():
    here, there, g = VP().at(0.8), VP().at(0.7), 1.9
    x, v, w = torch.randn(3, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scaled = here.c * x
    wanted = sde_step(scaled, velocity(scaled, v, here), here, there.r, g, w) / there.c
    of_x, of_v, of_noise = move(here, there, g)
    torch.testing.assert_close(of_x * x + of_v * v + of_noise * w, wanted)


def test_the_last_step_is_tweedie():
    here = VP().at(0.4)
    assert move(here, VP().at(0.0), 1.0) == (1.0, -here.t, 0.0)


def test_grids():
    assert [spaced(t, "exp") for t in (1.0, 0.5, 0.0)] == pytest.approx([1.0, math.sqrt(0.75), 0.0])
    assert spaced(0.3, "uniform") == 0.3


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ("square", 0.75),
        ("linear", 1.5),
        ("constant", 3.0),
        ("sigma", 3 * VP().at(0.5).s),
        ("sin", 3 * math.sqrt(0.5)),
        ("clipping", 0.0),
        ("exp", 3 * math.exp(-25)),
        ("tan", 3.0),
    ],
)
def test_forms_of_the_noise(shape, wanted):
    assert diffusion(VP().at(0.5), 3.0, shape) == pytest.approx(wanted, abs=1e-9)
    assert diffusion(VP().at(1.0), 2.0, "clipping") == 2.0
    assert diffusion(VP().at(1.0), 2.0, "tan") == diffusion(VP().at(0.95), 2.0, "tan")  # finite at r = 1


# the schedulers -------------------------------------------------------------------------------------------------------------------


def run(scheduler, x, model, generator=None):
    for t in scheduler.timesteps:
        x = scheduler.step(model(x, t / 1000), t, x, generator=generator, return_dict=False)[0]
    return x


def field(x, t):
    return x * (1 + t) - 0.3


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_without_noise_the_linear_one_is_eulers_method(shift):
    x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    ours, eulers = FlowSDEScheduler(shift=shift, norm=0.0), FlowMatchEulerDiscreteScheduler(shift=shift)
    for scheduler in (ours, eulers):
        scheduler.set_timesteps(7)
    assert torch.equal(ours.timesteps, eulers.timesteps)
    torch.testing.assert_close(run(ours, x, field), run(eulers, x, field), rtol=1e-5, atol=1e-5)


def test_vp_grid_is_the_papers():
    scheduler = VPFlowScheduler()
    scheduler.set_timesteps(10)
    times = [VP().time(t) for t in scheduler.sigmas.tolist()]
    assert times == pytest.approx([math.sqrt(1 - (1 - t / 10) ** 2) for t in range(10, -1, -1)], abs=1e-5)
    assert float(scheduler.timesteps[0]) == pytest.approx(993.47, abs=0.01)
    assert float(scheduler.sigmas[-1]) == 0


def test_vp_on_the_pipelines_levels_keeps_them():
    scheduler, eulers = VPFlowScheduler(grid="pipeline", shift=3.0), FlowMatchEulerDiscreteScheduler(shift=3.0)
    for each in (scheduler, eulers):
        each.set_timesteps(6)
    torch.testing.assert_close(scheduler.sigmas[1:], eulers.sigmas[1:], rtol=1e-5, atol=1e-6)
    assert float(scheduler.sigmas[0]) == pytest.approx(0.99347, abs=1e-5)


def test_schedulers_come_from_configs_and_draw_from_generators():
    made = make("FluxPipeline")
    for cls in (FlowSDEScheduler, VPFlowScheduler):
        made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config, norm=2.0)
        assert cls.from_config(made.pipe.scheduler.config).config.norm == 2.0
        assert torch.isfinite(call(made)).all()  # a plain diffusers call
        scheduler = cls()
        scheduler.set_timesteps(5)
        x = torch.randn(2, 4, 4, generator=torch.Generator().manual_seed(0))
        outs = []
        for _ in range(2):
            scheduler.set_timesteps(5)
            outs.append(run(scheduler, x, field, [torch.Generator().manual_seed(i) for i in (1, 2)]))
        scheduler.set_timesteps(5)
        alone = run(scheduler, x[1:], field, [torch.Generator().manual_seed(2)])
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(alone, outs[0][1:])


@pytest.mark.parametrize("options", [{"grid": "log"}, {"diffusion": "cubic"}, {"norm": -1.0}])
def test_bad_scheduler_options(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        VPFlowScheduler(**options)


def test_bad_betas():
    with pytest.raises(ValueError, match="beta_min"):
        VPFlowScheduler(beta_min=30.0)


# the budget -----------------------------------------------------------------------------------------------------------------------


def test_the_quota_is_the_official_one():
    """int((500 - 25 B) / (10 B)) for one picture."""
    assert quota(500, 25, 10) == 47


def test_a_constant_reward_uses_up_every_budget():
    """Card: always the budget-exhausted path, and exactly max_nfe evaluations."""
    climb = Climb(steps=5, particles=3, budget=4)
    seen = []
    for _ in range(30):
        seen.append(climb.candidate)
        climb.judge(1.0)
    assert seen == [0] * 3 + [1] * 4 + [2] * 4 + [3] * 4 + [4] * 15
    assert (climb.accepted, climb.exhausted, climb.nfe) == (0, 3, 30)
    assert seen == nominal(30, 3, 4, 5)


def test_what_is_left_rolls_over():
    climb = Climb(steps=4, particles=1, budget=3)
    assert climb.judge(0.0) == (True, True, True)
    assert climb.judge(1.0) == (True, True, True)  # accepted with 1 of 3
    assert climb.left == 5
    for reward in (0.5, 0.7, 0.2, 0.6):
        assert not climb.judge(reward).advances
    assert climb.judge(0.1) == (False, True, False)  # the fifth: the best child is taken, although it is worse
    assert climb.bar == 1.0  # and the bar stays
    assert climb.level == 2
    for reward in (0.9, 0.8, 1.0):  # the last step is not left
        assert not climb.judge(reward).advances
        assert climb.candidate == 3
    assert (climb.accepted, climb.exhausted) == (1, 1)


def test_the_bar_is_the_best_reward_so_far_and_never_falls():
    """A child that beats its parent, but not the best before it, does not end the step."""
    climb = Climb(steps=4, particles=1, budget=2)
    rewards = (5.0, 1.0, 2.0, 3.0, 4.0, 6.0)  # the particle; two and two that use up a budget; one above the bar
    assert [climb.judge(reward).advances for reward in rewards] == [True, False, True, False, True, False]  # the last step is not left
    assert (climb.accepted, climb.exhausted, climb.bar) == (0, 2, 5.0)
    climb = Climb(steps=5, particles=1, budget=2)
    assert [climb.judge(reward).advances for reward in (5.0, 1.0, 2.0, 6.0)] == [True, False, True, True]
    assert (climb.accepted, climb.exhausted, climb.bar) == (1, 1, 6.0)


def test_particles_are_the_best_of_them():
    climb = Climb(steps=3, particles=3, budget=1)
    assert [climb.judge(reward)[:2] for reward in (0.1, 0.5, 0.2)] == [(True, False), (True, False), (False, True)]
    assert climb.bar == 0.5


def test_svdd_takes_the_best_child_of_every_whole_budget():
    climb = Greedy(steps=4, particles=1, budget=3)
    verdicts = [climb.judge(reward) for reward in (0.0, 9.0, 1.0, 2.0, 0.5, 0.7, 0.1)]
    assert [verdict.advances for verdict in verdicts] == [True, False, False, True, False, False, True]
    assert [verdict.leads for verdict in verdicts] == [True, True, False, False, True, True, False]
    assert (climb.accepted, climb.exhausted, climb.level) == (0, 2, 2)


def test_best_of_n_judges_the_ends_of_whole_paths():
    climb = BestOfN(steps=3, particles=1, budget=1)
    rewards = (0, 0, 1.0, 0, 0, 3.0, 0, 0, 2.0, 0)
    seen = [(climb.starting, climb.candidate, climb.judged, climb.judge(reward).shown) for reward in rewards]
    first = [(True, 0, False, True), (False, 1, False, True)]  # what there is to show before a path has ended
    ways = [(True, 0, False, False), (False, 1, False, False)]
    assert seen == [*first, (False, 2, True, True), *ways, (False, 2, True, True), *ways, (False, 2, True, False), ways[0]]
    assert climb.bar == 3.0


class Toy:
    """Data N(0, I) in ``d`` dimensions with its exact velocity, searched for the point nearest to ``c``."""

    def __init__(self, norm: float, n: int, d: int = 8) -> None:
        self.c, self.n, self.d = torch.full((d,), 0.8), n, d
        self.scheduler = VPFlowScheduler(norm=norm, grid="uniform")
        self.scheduler.set_timesteps(10)
        self.generator = torch.Generator().manual_seed(0)

    def noise(self) -> torch.Tensor:
        return torch.randn(self.n, self.d, generator=self.generator)

    @staticmethod
    def velocity(x, levels):
        t = torch.tensor([level.t for level in levels])[:, None]
        return (t - (1 - t)) / (t**2 + (1 - t) ** 2) * x

    def reward(self, x0):
        return -(x0 - self.c).norm(dim=1)

    def search(self, max_nfe: int) -> Search:
        levels = self.scheduler.levels
        search = Search(levels, max_nfe, 10, quota(max_nfe, 10, 10), "last")
        search.begin([""] * self.n)
        x = self.noise() / levels[0].c
        while True:
            v = self.velocity(x, search.places())
            x0 = search.clean(x, v)
            search.judge(x, v, x0, self.reward(x0).tolist())
            if search.is_over:
                return search
            x = search.propose(self.noise(), self.scheduler)

    def best_of(self, number: int) -> torch.Tensor:
        rewards = []
        for _ in range(number):
            x = self.noise() / self.scheduler.levels[0].c
            for here, there in itertools.pairwise(self.scheduler.levels):
                of_x, of_v, _ = move(here, there, 0.0)
                x = of_x * x + of_v * self.velocity(x, [here] * self.n)
            rewards.append(self.reward(x))
        return torch.stack(rewards).amax(0)


def test_the_search_beats_best_of_n_with_as_many_evaluations():
    """Card: reward = -||x0 - c||, in expectation. 200 searches; the difference is many standard errors."""
    toy = Toy(norm=3.0, n=200)
    found = toy.search(100)
    assert torch.allclose(toy.reward(found.x0), torch.tensor(found.reward), atol=1e-5)
    difference = torch.tensor(found.reward) - toy.best_of(10)
    assert float(difference.mean()) > 5 * float(difference.std()) / math.sqrt(200), float(difference.mean())


# in pipelines ---------------------------------------------------------------------------------------------------------------------


def test_neutral_is_bit_equal_and_leaves_the_scheduler():
    plain, grafted = make("FluxPipeline"), make("FluxPipeline")
    load_pipeline(grafted.pipe, plugins={"rbf_search": dict(RBFSearch.neutral)})
    assert torch.equal(call(grafted), call(plain))
    assert "scheduler" not in report(grafted).fired


def test_without_noise_on_the_linear_interpolant_it_is_the_pipelines_ode():
    plain, grafted = make("StableDiffusion3Pipeline"), make("StableDiffusion3Pipeline")
    load_pipeline(grafted.pipe, plugins={"rbf_search": {"norm": 0.0, "interpolant": "linear", "grid": "pipeline", "beta_min": 0.2}})
    grafted.pipe.plugins.configure("rbf_search", grid="uniform")  # this model's levels are shifted
    assert not torch.allclose(call(grafted), call(plain), atol=1e-3)
    grafted.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    plain.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sigmas = {"sigmas": [1.0, 0.75, 0.5, 0.25]}
    torch.testing.assert_close(call(grafted, **sigmas), call(plain, **sigmas), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline"])
def test_exactly_max_nfe_evaluations(name):
    made = searching(name, reward=lambda images, prompts: [0.0] * len(images))
    call(made)
    found, calls = report(made), made.pipe.plugins.report().denoiser_calls
    assert found.total("nfe") == 12
    assert set(calls.values()) == {12}
    assert found.records["level"][:, 0].tolist() == nominal(12, 3, 2, 4)
    assert found.total("exhausted") == 2


def test_the_picture_is_the_one_that_was_judged():
    """The run's output decodes to what the reward saw and preferred, and the model was asked at each candidate's own time."""
    seen, times = [], []

    def reward(images, prompts):
        seen.append((images, prompts))
        return compressibility(images, prompts)

    made = searching(reward=reward)
    made.pipe.transformer.register_forward_pre_hook(lambda m, a, k: times.append(k["timestep"].clone()), with_kwargs=True)
    prompts = ["a red apple", "two green dogs"]
    kwargs = {**made.kwargs, "output_type": "pil", "num_inference_steps": 4, "prompt": prompts, "negative_prompt": ["", ""]}
    images = made.pipe(**kwargs, generator=[torch.Generator().manual_seed(i) for i in (3, 4)])[0]
    records = report(made).records
    assert compressibility(images, prompts) == pytest.approx(records["result"][-1].tolist())
    assert all(given == prompts for _, given in seen)
    scheduler = VPFlowScheduler()
    scheduler.set_timesteps(4)
    asked = torch.stack(times[::2])  # the guidance's other half is asked at the same times
    assert torch.equal(torch.stack(times[1::2]), asked)
    torch.testing.assert_close(asked, scheduler.sigmas[records["level"]], rtol=1e-5, atol=1e-6)


def test_each_sample_is_searched_on_its_own():
    """Sample i of a batch with a generator each is sample i alone, although the two are at other levels at the same time."""
    prompts, made = ["a red apple", "two green dogs"], searching(max_nfe=16)
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 4}
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    both = made.pipe(**{**kwargs, "prompt": prompts, "negative_prompt": ["", ""]}, generator=generators)[0]
    levels = report(made).records["level"]
    assert not torch.equal(levels[:, 0], levels[:, 1])
    for i in (0, 1):
        one = {**kwargs, "prompt": prompts[i], "negative_prompt": ""}
        alone = made.pipe(**one, generator=torch.Generator().manual_seed(3 + i))[0]
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3)


def test_it_finds_what_the_reward_asks_for():
    made = searching(max_nfe=40, particles=4)
    call(made)
    records = report(made).records
    assert float(records["result"][-1]) > float(records["reward"][0])
    assert "reward of the result" in report(made).notes[0]


def test_best_of_all_steps():
    made = searching(max_nfe=20, result="best")
    call(made)
    records = report(made).records
    assert float(records["result"][-1]) == float(records["reward"].max())


def test_best_of_n_is_the_best_of_the_plain_pipelines_pictures():
    """With the ODE on the pipeline's grid, from the noises that the denoiser was given."""
    knobs = {"interpolant": "linear", "norm": 0.0, "grid": "pipeline", "search": "best_of_n", "max_nfe": 13}
    asked, inputs = [], []

    def reward(images, prompts):
        asked.append(images)
        return compressibility(images, prompts)

    made, plain = searching(reward=reward, **knobs), make("FluxPipeline")
    made.pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k["hidden_states"].clone()), with_kwargs=True)
    found = call(made)
    assert len(asked) == 3  # 13 // 4 paths; nothing on the way is decoded
    assert (report(made).total("paths"), report(made).total("nfe")) == (3, 12)  # a fourth path could not end
    calls = len(inputs) // 12  # guidance
    pictures = [call(plain, latents=inputs[4 * calls * i]) for i in range(3)]
    best = max(range(3), key=lambda i: float(report(made).records["reward"][4 * i + 3]))
    torch.testing.assert_close(found, pictures[best], rtol=1e-4, atol=1e-4)


def test_best_of_n_of_one_step():
    """A one-step model's pictures, x - v for each noise; a search over steps has none to choose at."""
    knobs = {"interpolant": "linear", "norm": 0.0, "grid": "pipeline", "max_nfe": 3}
    made, plain = searching(search="best_of_n", **knobs), make("FluxPipeline")
    inputs = []
    made.pipe.transformer.register_forward_pre_hook(lambda m, a, k: inputs.append(k["hidden_states"].clone()), with_kwargs=True)
    found = call(made, num_inference_steps=1)
    best = int(report(made).records["reward"][:, 0].argmax())
    torch.testing.assert_close(found, call(plain, latents=inputs[best * (len(inputs) // 3)], num_inference_steps=1), rtol=1e-4, atol=1e-4)
    made = searching("FluxPipeline")
    with pytest.raises(ConfigError, match=r"search = 'rbf' chooses among children of a step.*num_inference_steps >= 2"):
        call(made, num_inference_steps=1)
    made = searching(search="best_of_n", max_nfe=3)
    with pytest.raises(ConfigError, match="max_nfe = 3 is no path of 4 steps: give max_nfe >= 4, or fewer steps"):
        call(made)


def test_svdd_uses_its_budget_at_every_step():
    made = searching(search="svdd")
    call(made)
    assert report(made).records["level"][:, 0].tolist() == nominal(12, 3, 2, 4)
    assert (report(made).total("accepted"), report(made).total("exhausted")) == (0, 2)


# a whole search, once more -----------------------------------------------------------------------------------------------------------


class Again:
    """The searches written a second time, from the paper's equations alone: float64, on the VP interpolant's own samples, one picture.

    ``model(x, t)`` is the flow model's velocity of a sample of the linear path, ``judge(x0)`` the reward of a picture.
    """

    def __init__(self, model, judge, draw, steps):
        self.model, self.judge, self.draw = model, judge, draw
        self.times = [math.sqrt(1 - (i / steps) ** 2) for i in range(steps + 1)]

    def coefficients(self, i):
        r = self.times[i]
        T, dT = 19.9 * r * r / 2 + 0.1 * r, 19.9 * r + 0.1
        a, s = math.exp(-T / 2), math.sqrt(1 - math.exp(-T))
        return r, a, s, -dT / 2 * a, dT * math.exp(-T) / (2 * s)

    def evaluate(self, x, i, judged=True):
        """(reward, x, u, x0) of a sample at level i."""
        _, a, s, da, ds = self.coefficients(i)
        t = 1 / (1 + a / s)
        c, dt = s / t, t * t * (s * da - a * ds) / (s * s * (-t - (1 - t)))
        dc = (t * ds - s * dt) / t**2
        u = dc / c * x + c * dt * self.model(x / c, t)
        x0 = (s * u - ds * x) / (da * s - ds * a)
        return (self.judge(x0) if judged else 0.0), x, u, x0

    def child(self, parent, i):
        r, a, s, da, ds = self.coefficients(i)
        _, x, u, _ = parent
        score, g, dr = ((a / da) * u - x) / (s**2 - (a / da) * ds * s), 3 * r * r, r - self.times[i + 1]
        return x + (-u + g * g / 2 * score) * dr + g * math.sqrt(dr) * self.draw()

    def starts(self, n):
        return max((self.evaluate(self.draw(), 0) for _ in range(n)), key=lambda found: found[0])

    def rbf(self, max_nfe, particles, steps):
        state = self.starts(particles)
        bar, quota, i, best = state[0], (max_nfe - particles) // steps, 0, None
        budget = quota
        for _ in range(max_nfe - particles):
            new = self.evaluate(self.child(state, i), i + 1)
            best = new if best is None or new[0] > best[0] else best
            budget -= 1
            accepted, bar = new[0] > bar, max(bar, new[0])
            if i < steps - 2 and (accepted or budget == 0):
                state, i, budget = (new if accepted else best), i + 1, budget + quota
                best = None
        return best

    def svdd(self, max_nfe, particles, steps):
        state = self.starts(particles)
        for i in range(steps - 1):
            quota = (max_nfe - particles) // steps
            n = quota if i < steps - 2 else max_nfe - particles - i * quota
            state = max((self.evaluate(self.child(state, i), i + 1) for _ in range(n)), key=lambda found: found[0])
        return state

    def best_of_n(self, max_nfe, particles, steps):
        def path():
            found = self.evaluate(self.draw(), 0, judged=False)
            for i in range(steps - 1):
                found = self.evaluate(self.child(found, i), i + 1, judged=i == steps - 2)
            return found

        return max((path() for _ in range(max_nfe // steps)), key=lambda found: found[0])


@pytest.mark.parametrize("search", ["rbf", "svdd", "best_of_n"])
def test_a_whole_search_is_the_one_of_the_equations(search):
    """In the pipeline and in a loop of its own, from one generator: every evaluation's input, time and reward, and the result."""
    made, plain, given, inputs, times = searching(search=search, max_nfe=18), make("FluxPipeline"), {}, [], []
    guidance = {"true_cfg_scale": 1.0}
    model, vae, processor = plain.pipe.transformer, plain.pipe.vae, plain.pipe.image_processor
    handle = model.register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    call(plain, num_inference_steps=1, **guidance)
    handle.remove()
    rewards = []

    def velocity(x, t):
        inputs.append(x.float())
        times.append(t)
        told = given["timestep"].new_full(given["timestep"].shape, t)
        with torch.no_grad():
            return model(**{**given, "hidden_states": x.float(), "timestep": told, "return_dict": False})[0].double()

    def judge(x0):
        tokens = FluxPipeline._unpack_latents(x0.float(), plain.kwargs["height"], plain.kwargs["width"], plain.pipe.vae_scale_factor)
        with torch.no_grad():
            picture = vae.decode(tokens / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        rewards.append(compressibility(processor.postprocess(picture, output_type="pil"), [""])[0])
        return rewards[-1]

    generator = torch.Generator().manual_seed(3)
    tokens = given["hidden_states"].shape

    def draw():
        if inputs:
            return torch.randn(tokens, generator=generator).double()
        first = torch.randn((1, 4, 8, 8), generator=generator)  # the pipeline's own, before it packs
        return FluxPipeline._pack_latents(first, 1, 4, 8, 8).double()

    wanted = getattr(Again(velocity, judge, draw, 4), search)(18, 3, 4)
    seen, told = [], []
    made.pipe.transformer.x_embedder.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()))
    made.pipe.transformer.time_text_embed.register_forward_pre_hook(lambda m, a: told.append(float(a[0][0]) / 1000))
    found = call(made, **guidance)
    assert told == pytest.approx(times, abs=1e-6)
    torch.testing.assert_close(torch.cat(seen), torch.cat(inputs), rtol=0, atol=1e-4)
    asked = report(made).records["reward"][:, 0]
    torch.testing.assert_close(asked[asked > -math.inf], torch.tensor(rewards), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found, wanted[3].float(), rtol=0, atol=1e-4)


# stops ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "knobs", "at"),
    [
        ("FluxPipeline", {}, 6),
        ("FluxPipeline", {"result": "best"}, 8),
        ("FluxPipeline", {"search": "svdd"}, 1),
        ("FluxPipeline", {"search": "best_of_n"}, 9),
        ("StableDiffusion3Pipeline", {}, 4),
        ("QwenImagePipeline", {}, 4),
        ("WanPipeline", {}, 4),
    ],
)
def test_a_stopped_search_gives_the_best_picture_so_far(name, knobs, at):
    """And not the next candidate, which is what the pipeline has then. What the report says is the reward of that picture."""
    judged, answers = [], [2.0, 3.0, 4.0, 9.0, 5.0, 6.0, 1.0, 7.0]

    def reward(images, prompts):
        judged.append(images[0])
        return [answers[len(judged) - 1]]

    def callback(pipe, step, t, tensors):
        pipe._interrupt = step + 1 == at
        return tensors

    made = searching(name, reward=reward, **knobs)
    found = call(made, output_type="pil", callback_on_step_end=callback)[0]
    records = report(made).records
    assert len(records["reward"]) == at
    said = float(records["result"][-1, 0])
    if knobs.get("result") == "best":
        assert said == 9.0
    picture = judged[answers.index(said)]
    pairs = zip(found, picture, strict=True) if name == "WanPipeline" else [(found, picture)]
    assert all(a.tobytes() == b.tobytes() for a, b in pairs)
    assert f"reward of the result: {said:.4g}" in str(made.pipe.plugins.report())


def test_a_reward_may_stop_the_search():
    judged = []

    def reward(images, prompts):
        judged.append(images[0])
        made.pipe._interrupt = len(judged) == 5
        return [float(len(judged))]

    made = searching(reward=reward)
    found = call(made, output_type="pil")[0]
    assert len(judged) == 5
    assert found.tobytes() == judged[-1].tobytes()


def test_best_of_n_stopped_on_its_first_path_shows_where_that_is():
    made, seen = searching(search="best_of_n"), []

    def callback(pipe, step, t, tensors):
        pipe._interrupt = step == 1
        return tensors

    keep = lambda m, a, k, out: seen.append((k["hidden_states"], k["timestep"], out[0]))  # noqa: E731
    made.pipe.transformer.register_forward_hook(keep, with_kwargs=True)
    found = call(made, callback_on_step_end=callback, true_cfg_scale=1.0)
    x, t, v = seen[1]
    torch.testing.assert_close(found, x - t * v)
    assert "reward of the result: not asked" in str(made.pipe.plugins.report())


def test_no_gradients_are_taken():
    def reward(images, prompts):
        assert not torch.is_grad_enabled()
        assert all(isinstance(image, Image.Image) for image in images)
        return compressibility(images, prompts)

    call(searching(reward=reward))


def test_videos_are_lists_of_frames():
    shapes = []

    def reward(videos, prompts):
        shapes.append([len(frames) for frames in videos])
        return compressibility(videos, prompts)

    made = searching("WanPipeline", reward=reward)
    call(made)
    assert shapes == [[5]] * 12


def test_same_seed_same_picture():
    made = searching()
    first = call(made)
    assert torch.equal(call(made), first)
    assert not torch.equal(call(made, seed=4), first)


def test_without_a_reward_it_samples():
    made = searching(reward=None)
    call(made)
    assert report(made).total("nfe") == 4


# what goes wrong ------------------------------------------------------------------------------------------------------------------


def test_what_a_reward_raises_comes_through_and_the_pipeline_is_as_before():
    made = make("FluxPipeline")
    before, error = call(made), RuntimeError("the server is gone")
    calls = []

    def reward(images, prompts):
        calls.append(1)
        if len(calls) == 5:
            raise error
        return [0.0]

    load_pipeline(made.pipe, plugins={"rbf_search": {"reward": reward, "max_nfe": 12, "particles": 3}})
    with pytest.raises(RuntimeError, match="the server is gone") as caught:
        call(made)
    assert caught.value is error
    assert len(calls) == 5
    with made.pipe.plugins.disabled():
        assert torch.equal(call(made), before)
    assert torch.isfinite(call(made)).all()
    made.pipe.plugins.clear()
    assert torch.equal(call(made), before)


@pytest.mark.parametrize(
    ("answer", "text"),
    [([math.nan], "nan for picture 0"), ([1.0, 2.0], "2 numbers for 1 pictures"), (0.5, "gave 0.5: it must give a list")],
)
def test_a_reward_that_is_none(answer, text):
    answers = iter([[0.0]] * 6 + [answer])
    made = searching(reward=lambda images, prompts: next(answers))
    with pytest.raises(RewardError, match=f"evaluation 7 of 12: .*{text}"):
        call(made)
    made.pipe.plugins.configure("rbf_search", reward=SIZE)
    assert torch.isfinite(call(made)).all()


def test_too_small_a_budget_is_refused_before_anything_is_computed():
    made = searching(max_nfe=6)
    made.pipe.transformer.register_forward_pre_hook(lambda *a: pytest.fail("computed"))
    with pytest.raises(ConfigError, match=r"max_nfe = 6 with particles = 3 .* 4 steps: give max_nfe >= 7"):
        call(made)


def test_captions():
    assert captions(None, {"prompt": ["a", "b"]}, 4) == ["a", "a", "b", "b"]
    assert captions("c", {"prompt": ["a", "b"]}, 2) == ["c", "c"]
    with pytest.raises(ConfigError, match="captions = None"):
        captions(None, {}, 2)
    with pytest.raises(ConfigError, match="3 for 4 pictures"):
        captions(("a", "b", "c"), {}, 4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("FluxImg2ImgPipeline", "starts from a picture"), ("WanPipeline@2.2", "2 denoisers"), ("StableDiffusionPipeline", "family")],
)
def test_where_there_is_nothing_to_search(name, reason):
    with pytest.raises(Unsupported, match=reason):
        searching(name)


def test_without_a_reward_image_to_image_samples():
    made = make("FluxImg2ImgPipeline")
    plain = call(made)
    load_pipeline(made.pipe, plugins={"rbf_search": {"norm": 0.5, "interpolant": "vp"}})
    out = call(made)
    assert out.shape == plain.shape
    assert torch.isfinite(out).all()


def test_methods_that_skip_blocks_are_refused():
    for skipped in ("blocks", "denoiser"):
        with pytest.raises(Conflict, match="rbf_search needs every block computed"):
            plan([Part("rbf_search", RBFSearch.effects), Part("cache", Effects(skips=frozenset({skipped})))]).ensure()


def test_methods_that_edit_from_step_to_step_are_refused_in_a_search_only():
    class Nudge(Plugin):
        name = "nudge"
        paper = Paper("a probe", "0000.00000", "edits")
        families = ("*",)
        neutral: ClassVar[dict] = {}
        effects = Effects(edits=frozenset({"latents"}))

        def step(self, call, next):
            return next(call)

    made = make("FluxPipeline")
    load_pipeline(made.pipe, plugins=[Nudge(), RBFSearch()])
    assert torch.isfinite(call(made)).all()
    knobs = {"reward": SIZE, "max_nfe": 12, "particles": 3}
    refused = pytest.raises(Conflict, match="nudge edits latents from step to step, but the calls of rbf_search are no successive steps")
    with refused:
        made.pipe.plugins.configure("rbf_search", **knobs)
    assert made.pipe.plugins["rbf_search"].config.reward is None
    assert torch.isfinite(call(made)).all()
    made.pipe.plugins.clear()
    for stack in ([Nudge(), RBFSearch(**knobs)], [RBFSearch(**knobs), Nudge()]):
        with refused:
            load_pipeline(made.pipe, plugins=stack)


def test_a_model_that_stands_in_must_be_inside():
    class StandIn(Plugin):
        name = "stand_in"
        paper = Paper("a probe", "0000.00000", "answers")
        families = ("*",)
        neutral: ClassVar[dict] = {}

        def denoise(self, call, next):
            return torch.zeros_like(call.sample)

    made = make("FluxPipeline")
    search = RBFSearch(reward=SIZE, max_nfe=12, particles=3)
    load_pipeline(made.pipe, plugins=[StandIn(), search])
    with pytest.raises(Unsupported, match="put rbf_search first"):
        call(made)
    made.pipe.plugins.clear()
    load_pipeline(made.pipe, plugins=[search, StandIn()])
    assert torch.isfinite(call(made)).all()


@pytest.mark.parametrize(
    ("knobs", "key"),
    [
        ({"reward": 3}, "reward"),
        ({"reward": SIZE, "norm": 0}, "norm = 0 with a reward"),
        ({"max_nfe": 0}, "max_nfe"),
        ({"particles": 0}, "particles"),
        ({"interpolant": "cosine"}, "interpolant"),
        ({"beta_min": 30.0}, "beta_min"),
        ({"norm": float("nan")}, "norm"),
    ],
)
def test_bad_knobs(knobs, key):
    with pytest.raises(ConfigError, match=key):
        RBFSearch(**knobs)


def test_a_reward_of_no_such_name():
    with pytest.raises(ConfigError, match="reward = 'emoji_juge' is no reward; did you mean 'emoji_judge'"):
        searching(reward="emoji_juge")


def test_video_to_video_steps_from_the_time_that_the_pipeline_chose():
    """WanVideoToVideoPipeline cuts the front of the schedule off without set_begin_index."""
    ends = []
    for says in (True, False):
        scheduler = FlowSDEScheduler()
        scheduler.set_timesteps(5)
        if says:
            scheduler.set_begin_index(2)
        x, generator = torch.ones(1, 2, 3), torch.Generator().manual_seed(0)
        for t in scheduler.timesteps[2:]:
            x = scheduler.step(x.sin(), t, x, generator=generator).prev_sample
        ends.append(x)
    assert torch.equal(*ends)
