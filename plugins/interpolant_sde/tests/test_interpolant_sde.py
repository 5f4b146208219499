"""interpolant_sde: marginals on data whose score is known, log-probabilities, the ODE at nought, bad input."""

from __future__ import annotations

import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft_interpolant_sde import InterpolantSDE
from diffgraft_interpolant_sde.method import diffusion, kick, log_prob
from diffgraft_pipelines.tiny import make
from diffusers import DDIMScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler

NOISES = ("flow_grpo", "const", "sigma")
VARIANCE = 0.25
MEANS, SPREADS, SHARES = (torch.tensor(values, dtype=torch.float64) for values in ([-1.5, 0.3, 1.2], [0.3, 0.2, 0.4], [0.3, 0.3, 0.4]))


def call(made, seed=3, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 6, **changes}
    return made.pipe(**kwargs, generator=torch.Generator().manual_seed(seed))[0]


# the method -----------------------------------------------------------------------------------------------------------------------


def of_a_gaussian(x, sigma):
    """E[eps | x] of Gaussian data of variance 1/4."""
    return sigma * x / ((1 - sigma) ** 2 * VARIANCE + sigma**2)


def of_a_mixture(x, sigma):
    """E[eps | x] of a mixture of three Gaussians."""
    variance, away = ((1 - sigma) * SPREADS) ** 2 + sigma**2, x[:, None] - (1 - sigma) * MEANS
    share = (SHARES.log() - 0.5 * away**2 / variance - 0.5 * variance.log()).softmax(-1)
    return sigma * (share * away / variance).sum(-1)


def simulate(noise: str, eta: float, steps: int = 400, n: int = 40_000, denoiser=of_a_gaussian) -> torch.Tensor:
    """The SDE on data whose denoiser is known, with Euler's step as the pipeline's."""
    generator = torch.Generator().manual_seed(0)
    scheduler = FlowMatchEulerDiscreteScheduler()
    scheduler.set_timesteps(steps)
    sigmas = scheduler.sigmas.double()
    x = torch.randn(n, generator=generator, dtype=torch.float64)
    for i in range(steps):
        sigma, after = sigmas[i], sigmas[i + 1]
        eps = denoiser(x, sigma)
        # u = eps - x0; where sigma is 1 the sample says nothing of x0, whose mean is the data's
        x0 = (x - sigma * eps) / (1 - sigma) if sigma < 1 else (MEANS @ SHARES if denoiser is of_a_mixture else 0.0)
        x = x + (after - sigma) * (eps - x0)
        if i < steps - 1:
            shift, std = kick(eps, sigma, diffusion(sigma, after, noise, eta), sigma - after)
            x = x + shift + std * torch.randn(n, generator=generator, dtype=torch.float64)
    return x


def distance_to_the_mixture(x: torch.Tensor) -> float:
    """Kolmogorov-Smirnov distance of samples to the mixture's distribution."""
    x = x.sort().values
    true = (SHARES * torch.distributions.Normal(MEANS, SPREADS).cdf(x[:, None])).sum(1)
    return float((true - torch.arange(1, len(x) + 1) / len(x)).abs().max())


@pytest.mark.parametrize(("noise", "eta"), [("flow_grpo", 0.0), ("flow_grpo", 0.7), ("const", 0.7), ("sigma", 0.7), ("sigma", 1.5)])
def test_a_mixture_stays_what_it_is(noise, eta):
    """20,000 samples of the true distribution are within .0096 of it with probability .95; the rest is the step's error."""
    assert distance_to_the_mixture(simulate(noise, eta, 200, 20_000, of_a_mixture)) < 0.02


def test_without_the_scores_pull_the_mixture_is_lost(monkeypatch):
    """The check above can fail."""
    monkeypatch.setitem(globals(), "kick", lambda eps, sigma, two, h: (0.0, kick_itself(eps, sigma, two, h)[1]))
    assert distance_to_the_mixture(simulate("flow_grpo", 0.7, 200, 20_000, of_a_mixture)) > 0.05


kick_itself = kick


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("eta", [0.0, 0.3, 0.7])
def test_marginals_are_those_of_the_ode(noise, eta):
    """Card: final variance .25 to 1e-2 with 400 steps."""
    x = simulate(noise, eta)
    assert abs(float(x.var()) - VARIANCE) < 1e-2
    assert abs(float(x.mean())) < 1e-2


def test_the_error_is_of_first_order():
    errors = [abs(float(simulate("sigma", 0.7, steps, 200_000).var()) - VARIANCE) for steps in (10, 40)]
    assert 2 < errors[0] / errors[1] < 8, errors


def test_diffusion_coefficients():
    sigma, first = torch.tensor([1.0, 0.8, 0.2]), torch.tensor(0.9)
    torch.testing.assert_close(diffusion(sigma, first, "flow_grpo", 0.7), 0.49 * torch.tensor([10.0, 4.0, 0.25]))
    torch.testing.assert_close(diffusion(sigma, first, "const", 0.7), torch.full((3,), 0.49))
    torch.testing.assert_close(diffusion(sigma, first, "sigma", 0.7), 0.49 * sigma)


def test_log_prob_is_that_of_a_normal_distribution():
    generator = torch.Generator().manual_seed(0)
    x, mean = torch.randn(2, 3, 4, 5, generator=generator)
    std = torch.tensor(0.3)
    torch.testing.assert_close(log_prob(x, mean, std), torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1))


# in pipelines ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionPipeline", "WanPipeline"])
def test_without_noise_it_is_the_ode_bit_for_bit(name):
    plain, grafted = make(name), make(name)
    load_pipeline(grafted.pipe, plugins=[InterpolantSDE(noise_window=(2, 2))])
    assert torch.equal(call(grafted), call(plain))
    grafted.pipe.plugins.configure("interpolant_sde", noise_window=None, eta=0.0)
    assert torch.equal(call(grafted), call(plain))


def test_flow_step_is_flow_grpos():
    """x' = x + h (-u + epsilon s) + sqrt(2 epsilon h) z, written out beside the pipeline's step."""
    made = make("FluxPipeline")
    seen = []

    class Watch(InterpolantSDE):
        name = "watch"

        def step(self, call, next):
            out = next(call)
            seen.append((call.step.sigma, call.step_at(1).sigma, call.sample, call.model_output, out.sample))
            return out

    load_pipeline(made.pipe, plugins=[Watch(), InterpolantSDE(record=True)])
    call(made)
    records = made.pipe.plugins.report().plugins["interpolant_sde"].records
    assert records["steps"].tolist() == [0, 1, 2, 3, 4]
    for i in range(5):
        sigma, after, x, u, out = seen[i]
        h = sigma - after
        two = 0.49 * sigma / (1 - (after if sigma >= 1 else sigma))
        score = -(x + (1 - sigma) * u) / sigma
        mean = x + h * (-u + 0.5 * two * score)
        torch.testing.assert_close(records["mean"][i], mean, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(records["std"][i], (two * h).sqrt(), rtol=1e-4, atol=1e-4)
        z = (out - mean) / (two * h).sqrt()
        assert abs(float(z.std()) - 1) < 0.2
        expected = torch.distributions.Normal(records["mean"][i], records["std"][i]).log_prob(records["sample"][i]).flatten(1).sum(1)
        torch.testing.assert_close(records["log_prob"][i], expected)


def test_one_rule_serves_schedulers_of_other_scales():
    """Euler's samples are DDIM's times sqrt(1 + sigma^2): so are the noisy ones, with the same noise."""
    x, samples = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for cls in (DDIMScheduler, EulerDiscreteScheduler):
        made = make("StableDiffusionPipeline")
        made.pipe.scheduler = cls.from_config(made.pipe.scheduler.config, timestep_spacing="trailing", steps_offset=0)
        made.pipe.scheduler.set_timesteps(10)
        scale = (1 + made.pipe.scheduler.sigmas[:2] ** 2).sqrt() if cls is EulerDiscreteScheduler else torch.ones(2)
        load_pipeline(made.pipe, plugins=[InterpolantSDE(eta=0.3, record=True)])
        call(made, num_inference_steps=10, latents=x * scale[0] / made.pipe.scheduler.init_noise_sigma)
        samples.append(made.pipe.plugins.report().plugins["interpolant_sde"].records["sample"][0] / scale[1])
    torch.testing.assert_close(samples[1], samples[0], rtol=1e-3, atol=1e-3)


def test_noise_comes_from_the_calls_generator():
    made = make("FluxPipeline")
    load_pipeline(made.pipe, plugins=[InterpolantSDE])
    first = call(made)
    assert torch.equal(call(made), first)
    assert not torch.equal(call(made, seed=4), first)


def test_the_last_step_is_clean_unless_asked():
    made = make("FluxPipeline")
    load_pipeline(made.pipe, plugins=[InterpolantSDE])
    call(made)
    assert made.pipe.plugins.report().plugins["interpolant_sde"].counts == {"noisy": {"run": 5}}


def test_second_order_schedulers_are_refused_before_anything_runs():
    made = make("StableDiffusionPipeline")
    before = call(made)
    own = made.pipe.scheduler
    load_pipeline(made.pipe, plugins=[InterpolantSDE])
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(own.config)
    with pytest.raises(Unsupported, match="HeunDiscreteScheduler makes a step in two stages"):
        call(made)
    made.pipe.plugins.clear()
    made.pipe.scheduler = own
    assert torch.equal(call(made), before)


@pytest.mark.parametrize(("knobs", "key"), [({"eta": -1}, "eta"), ({"noise": "pink"}, "noise"), ({"noise_window": (3,)}, "noise_window")])
def test_bad_knobs(knobs, key):
    with pytest.raises(ConfigError, match=key):
        InterpolantSDE(**knobs)
