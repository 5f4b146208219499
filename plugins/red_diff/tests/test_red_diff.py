"""RED-diff against its equations, a loop of its own in plain torch, and a Gaussian prior whose fixed point is known."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from diffgraft import ConfigError, Effects, Unsupported, load_pipeline
from diffgraft.installed.planner import Part, judge
from diffgraft.methods.measurements import Blur, Identity, Mask, Phase, downsample
from diffgraft.methods.problems import Problem, simulated
from diffgraft.testing import run_contract
from diffgraft_red_diff import BETAS, RedDiff
from diffgraft_red_diff.method import misfit, prior_gradient, share
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    IPNDMScheduler,
    PNDMScheduler,
)

STEPS = 6
WEIGHTINGS = {
    "linear": lambda r: r,
    "sqrt": lambda r: r**0.5,
    "square": lambda r: r**2,
    "log": lambda r: torch.log(1 + r),
    "clip": lambda r: r.clamp(max=1),
    "power": lambda r: r ** (2 / 3),
    "const": torch.ones_like,
}


def tiny(name: str, module: str) -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update(num_inference_steps=STEPS)
    return made


def ddim() -> Any:
    return tiny("DDIMPipeline", "pixel")


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def restored(made: Any, problem: Problem, seed: int = 0, **knobs: Any) -> torch.Tensor:
    """What the run ends at, in the pipeline's range."""
    pipe = load_pipeline(made.pipe, plugins={"red_diff": {"problem": problem, **knobs}})
    output = "latent" if hasattr(pipe, "vae") else "np"
    result = pipe(**{**made.kwargs, "output_type": output}, generator=torch.Generator().manual_seed(seed))[0]
    if output == "np":
        return torch.from_numpy(result).permute(0, 3, 1, 2).float() * 2 - 1
    return result


# the maths -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_prior_is_the_papers(weighting) -> None:
    """w (eps_hat - eps) over the number of elements, w = lambda g(r), whatever the denoiser says."""
    mu, eps, said = drawn(2, 3, 4, 4), drawn(2, 3, 4, 4, seed=1), drawn(2, 3, 4, 4, seed=2)
    for abar in (0.999, 0.5, 0.01):
        a, s = (torch.tensor(value, dtype=torch.float64).sqrt() for value in (abar, 1 - abar))
        x0 = (a * mu + s * eps - s * said) / a
        w = 0.25 * WEIGHTINGS[weighting](s / a)
        torch.testing.assert_close(prior_gradient(mu, x0, s / a, 0.25, weighting), w * (said - eps) / 48, rtol=1e-9, atol=1e-12)


def test_pure_noise_has_a_finite_gradient() -> None:
    r = torch.tensor(float("inf"))
    for weighting in WEIGHTINGS:
        assert bool(share(r, weighting).isfinite())
    assert float(share(r, "linear")) == 1


@pytest.mark.parametrize("abar", [0.9, 0.5, 0.1])
def test_fixed_point_of_a_gaussian_prior(abar: float) -> None:
    """N(0, s2) and A = I: E[eps_hat - eps] = sqrt(abar (1 - abar)) mu / (abar s2 + 1 - abar), so mu = y / (1 + lambda r times that)."""
    s2, lam, y = 0.3, 0.25, drawn(1, 1, 2, 2)
    a, s = (torch.tensor(value, dtype=torch.float64).sqrt() for value in (abar, 1 - abar))
    noise = drawn(500, 1, 2, 2, seed=3)
    noise = torch.cat([noise, -noise])
    mu = torch.zeros_like(y)
    for _ in range(2000):
        x = a * mu + s * noise
        x0 = a * s2 / (a * a * s2 + s * s) * x
        prior = prior_gradient(mu.expand_as(x), x0, s / a, lam, "linear").mean(0, keepdim=True)
        mu = mu - 0.5 * (prior * 4 + (mu - y))
    slope = (abar * (1 - abar)) ** 0.5 / (abar * s2 + 1 - abar)
    torch.testing.assert_close(mu, y / (1 + lam * float(s / a) * slope), rtol=1e-9, atol=1e-9)


def test_lambda_does_not_depend_on_the_size() -> None:
    """Both terms are means: a picture of four times the pixels has the same gradients, in proportion."""
    mu, x0, y = (drawn(1, 3, 4, 4, seed=i) for i in range(3))
    ratios = []
    for times in (1, 2):
        big, clean, seen = (v.repeat(1, 1, times, times) for v in (mu, x0, y))
        big = big.requires_grad_()
        (data,) = torch.autograd.grad(misfit(big, seen), big)
        ratios.append((prior_gradient(big, clean, torch.tensor(1.0), 0.25, "linear") / data)[..., :4, :4])
    torch.testing.assert_close(*ratios)


def test_a_batch_is_its_samples() -> None:
    x, y = drawn(3, 3, 4, 4), drawn(3, 3, 4, 4, seed=1)
    torch.testing.assert_close(misfit(x, y), sum(misfit(x[i : i + 1], y[i : i + 1]) for i in range(3)))


# runs ------------------------------------------------------------------------------------------------------------------------------------


def in_plain_torch(made: Any, problem: Problem, lam: float, lr: float, seed: int = 0, spread: float = 0.0) -> torch.Tensor:
    """The card's loop on a pixel model, in eps: x = sqrt(abar) x0 + sqrt(1 - abar) z, x0 = mu + spread n; Adam on
    w mean(stopgrad(e - z) x0) and the misfit of x0."""
    pipe, draws = made.pipe, torch.Generator().manual_seed(seed)
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    size = pipe.unet.config.sample_size
    mu = problem.operator.pinv(problem.y).clone().requires_grad_()
    adam = torch.optim.Adam([mu], lr, (0.9, 0.99))
    for i, t in enumerate(scheduler.timesteps):
        z = torch.randn(1, 3, size, size, generator=draws) if i == 0 else None  # the pipeline's own comes first
        x0 = mu + spread * torch.randn(1, 3, size, size, generator=draws) if spread else mu
        z = torch.randn(1, 3, size, size, generator=draws) if z is None else z
        abar = scheduler.alphas_cumprod[t]
        x = (abar.sqrt() * x0 + (1 - abar).sqrt() * z).detach()
        with torch.no_grad():
            e = pipe.unet(x, t).sample
        adam.zero_grad()
        w = lam * ((1 - abar) / abar).sqrt()
        loss = (problem.y - problem.operator.A(x0)).square().mean() / 2 + w * ((e - z) * x0).mean()
        loss.backward()
        adam.step()
    return mu.detach().clamp(-1, 1)


@pytest.mark.parametrize("lam", [0.25, 1.0])
@pytest.mark.parametrize("operator", [downsample(2), Mask(0.5), Identity()], ids=lambda o: type(o).__name__)
def test_a_run_is_the_loop(operator, lam: float) -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(operator, drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    wanted = in_plain_torch(made, problem, lam, 0.1)
    torch.testing.assert_close(restored(made, problem, weight=lam), wanted, rtol=0, atol=2e-5)


def test_without_the_prior_it_is_the_pseudo_inverse() -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(downsample(2), drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    torch.testing.assert_close(restored(made, problem, weight=0.0), problem.operator.pinv(problem.y).clamp(-1, 1), rtol=0, atol=1e-6)


def test_without_the_prior_rounding_is_all_that_moves() -> None:
    """Adam makes steps of rounding errors too: the pseudo-inverse of a larger factor is left by them, and y is explained all the same."""
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(downsample(4), drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    assert float(problem.residual(restored(made, problem, weight=0.0))) < 0.1


def test_everything_seen_and_no_prior_stays() -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(Mask(torch.ones(size, size)), drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    torch.testing.assert_close(restored(made, problem, weight=0.0), problem.y, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "module"), [("StableDiffusionPipeline", "sd"), ("FluxPipeline", "flux"), ("StableDiffusion3Pipeline", "sd3")]
)
def test_the_measurement_comes_nearer_through_an_autoencoder(name: str, module: str) -> None:
    made = tiny(name, module)
    problem = simulated(downsample(2), drawn(1, 3, 64, 64, dtype=torch.float32).clamp(-1, 1))
    residuals = []
    for steps in (2, 30):
        made.kwargs["num_inference_steps"] = steps
        restored(made, problem, weight=0.0)
        residuals.append(float(made.pipe.plugins.report().plugins["red_diff"].records["residual"]))
        made.pipe.plugins.remove("red_diff")
    assert residuals[1] < residuals[0]


def test_nothing_is_kept_for_gradients_through_the_denoiser() -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    seen = []
    made.pipe.unet.register_forward_hook(lambda module, args, out: seen.append((torch.is_grad_enabled(), out[0].requires_grad)))
    made.pipe.unet.requires_grad_(True)
    restored(made, simulated(downsample(2), torch.zeros(1, 3, size, size)))
    assert seen == [(False, False)] * STEPS
    assert all(weight.grad is None for weight in made.pipe.unet.parameters())
    assert made.pipe.plugins.report().forwards == {"cond": STEPS}


def test_a_measurement_that_is_not_linear_begins_at_grey() -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(Phase(2), drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    made.kwargs["num_inference_steps"] = 40
    grey = float(problem.residual(torch.zeros(1, 3, size, size)))
    restored(made, problem, weight=0.0)
    assert float(made.pipe.plugins.report().plugins["red_diff"].records["residual"]) < 0.5 * grey


def test_spread_asks_about_pictures_around_mu_in_both_terms() -> None:
    made = ddim()
    size = made.pipe.unet.config.sample_size
    problem = simulated(downsample(2), drawn(1, 3, size, size, dtype=torch.float32).clamp(-1, 1))
    wanted = in_plain_torch(made, problem, 0.25, 0.1, spread=0.1)
    torch.testing.assert_close(restored(made, problem, spread=0.1), wanted, rtol=0, atol=2e-5)


def test_beside_a_step_cache_the_reason_is_true() -> None:
    outer = Part("red_diff", RedDiff.effects)
    (conflict,), _ = judge(outer, Part("cache", Effects(skips=frozenset({"blocks"}))))
    assert conflict == "red_diff needs every block computed, but cache skips blocks; disable one"


# bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "told"),
    [
        (Problem(downsample(2), torch.zeros(1, 3, 4, 4)), "problem is of pictures of 8x8 with 3 channels"),
        (Problem(Identity(), torch.zeros(3, 3, 16, 16)), "3 measurements for 1 pictures"),
        (Problem(Identity(), torch.zeros(1, 1, 16, 16)), "pictures with 1 channel"),
    ],
)
def test_a_problem_of_other_pictures(problem: Problem, told: str) -> None:
    made = ddim()
    asked = []
    made.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=told):
        restored(made, problem)
    assert not asked


@pytest.mark.parametrize("operator", [Mask(0.5), downsample(3)], ids=["mask", "downsample"])
def test_a_size_that_an_autoencoder_would_cut_is_refused_before_the_denoiser_runs(operator: Any) -> None:
    """Of 66 or 33 pixels the encoder leaves some out, and what it makes may be as large as the run's latents."""
    made = tiny("StableDiffusionPipeline", "sd")
    scale, asked = made.pipe.vae_scale_factor, []
    side = 33 if scale % 3 else 34
    made.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=f"red_diff: pictures of {side}x{side}.*multiples of {scale}: {side - side % scale}x"):
        restored(made, simulated(operator, torch.zeros(1, 3, side, side)))
    assert not asked


def test_it_begins_at_a_picture_whatever_the_inverse_makes_of_noise() -> None:
    """The pseudo-inverse of a blur with noise is far beyond white; pictures are not, and the way back would be long."""
    made = ddim()
    problem = simulated(Blur(1.5), torch.zeros(1, 3, 16, 16), 0.02, torch.Generator().manual_seed(0))
    assert float(problem.operator.pinv(problem.y).abs().max()) > 2
    started = []

    class Watched(RedDiff):
        def _begin(self, call, search):
            super()._begin(call, search)
            started.append(search.mu.clone())

    load_pipeline(made.pipe, plugins=[Watched(problem=problem)])
    made.pipe(**made.kwargs, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(started[0], problem.operator.pinv(problem.y).clamp(-1, 1))


def test_what_is_no_problem() -> None:
    for value, told in (("downsample(2)", r"y is missing: give Problem\(operator, y"), ({"y": 1}, r"give a Problem\(operator, y, noise\)")):
        with pytest.raises(ConfigError, match=told):
            load_pipeline(ddim().pipe, plugins={"red_diff": {"problem": value}})


@pytest.mark.parametrize(
    ("cls", "told", "options"),
    [
        (HeunDiscreteScheduler, "asks more than once for a step", {}),
        (PNDMScheduler, "asks more than once for a step", {"skip_prk_steps": False}),
        (DDIMInverseScheduler, "from the picture to noise", {}),
        (IPNDMScheduler, "red_diff: IPNDMScheduler does not say how noisy", {}),
        (EDMEulerScheduler, "red_diff: EDMEulerScheduler wants", {}),
    ],
)
def test_schedulers_that_are_refused(cls: Any, told: str, options: dict[str, Any]) -> None:
    made = tiny("StableDiffusionPipeline", "sd")
    made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config, **options)
    with pytest.raises(Unsupported, match=told):
        restored(made, simulated(downsample(2), torch.zeros(1, 3, 64, 64)))


def test_under_an_exploding_scheduler_it_is_the_same_method() -> None:
    """DDIM and Euler ask at other times, and both end near what was measured."""
    made = tiny("StableDiffusionPipeline", "sd")
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    problem = simulated(downsample(2), drawn(1, 3, 64, 64, dtype=torch.float32).clamp(-1, 1))
    result = restored(made, problem)
    assert bool(result.isfinite().all())
    assert float(result.abs().max()) < 20


def test_adam_is_the_official_one() -> None:
    assert BETAS == (0.9, 0.99)
    config = RedDiff().config
    assert (config.lr, config.weight, config.data_weight, config.weighting, config.spread) == (0.1, 0.25, 1.0, "linear", 0.0)


def test_inference_mode_is_refused_before_the_denoiser_runs() -> None:
    made = ddim()
    with torch.inference_mode(), pytest.raises(Unsupported, match="inference_mode"):
        restored(made, Problem(Mask(0.5), torch.zeros(1, 3, 16, 16)))


def test_contract() -> None:
    run_contract("red_diff", families=["pixel"])
