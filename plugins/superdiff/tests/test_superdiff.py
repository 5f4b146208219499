"""SuperDiff: the density estimate on Gaussians, the operations' identities, and real pipelines."""

from __future__ import annotations

import itertools

import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft_pipelines.tiny import make
from diffgraft_superdiff import SuperDiff
from diffgraft_superdiff.method import density_change, dot, kappa_and, kappa_or, mixture
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler

SIGMAS = torch.linspace(10.0, 0.05, 2000, dtype=torch.float64)
MEANS, SPREADS = (torch.tensor(-1.0), torch.tensor(1.5)), (torch.tensor(0.5), torch.tensor(0.8))


def noise_of(x, sigma, i):
    """E[eps | x] of Gaussian data i."""
    return sigma * (x - MEANS[i]) / (SPREADS[i] ** 2 + sigma**2)


def log_density(x, sigma, i):
    return torch.distributions.Normal(MEANS[i].double(), (SPREADS[i] ** 2 + sigma**2).sqrt()).log_prob(x).flatten(1).sum(1)


def walk(operation, n=64, dimensions=4, sign=1, **knobs):
    """(samples, followed log-densities, true ones, kappas) of an SDE on two Gaussians, each over the whole walk."""
    generator = torch.Generator().manual_seed(0)
    x = SIGMAS[0] * torch.randn(n, dimensions, generator=generator, dtype=torch.float64)
    start = [log_density(x, SIGMAS[0], i) for i in (0, 1)]
    logs = [torch.zeros(n, dtype=torch.float64) for _ in (0, 1)]
    gaps, errors = [], []
    for sigma, after in itertools.pairwise(SIGMAS):
        d = after - sigma
        va, vb = noise_of(x, sigma, 0), noise_of(x, sigma, 1)
        v0 = torch.zeros_like(va)
        noise = (2 * d.abs() * sigma).sqrt() * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        if operation == "and":
            kappa = kappa_and(v0, va, vb, noise, sigma, d, 1.0, knobs.get("lift", 0.0), 1.0)
        else:
            kappa = kappa_or(*logs, knobs.get("temperature", 1.0), 0.0)
        dx = 2 * d * mixture(v0, va, vb, kappa, 1.0) + noise
        before = logs
        logs = [log + density_change(v, dx, sigma, d, sign) for log, v in zip(logs, (va, vb), strict=True)]
        gaps.append(float(((logs[0] - before[0]) - (logs[1] - before[1])).abs().max()))
        x = x + dx
        errors.append(float((logs[0] - (log_density(x, after, 0) - start[0])).abs().mean()))
    return x, logs, gaps, errors


def test_the_followed_density_is_the_gaussians():
    """Card: the correct form tracks the true log-density to .08 in one dimension; the official OR code's sign is off by several."""
    assert walk("or", dimensions=1)[3][-1] < 0.15
    assert walk("or", dimensions=1, sign=-1)[3][-1] > 2


def test_and_changes_both_densities_alike():
    gaps = walk("and")[2]
    assert max(gaps) < 1e-5


def test_lift_is_what_a_gains():
    generator = torch.Generator().manual_seed(0)
    v0, va, vb, noise = torch.randn(4, 5, 8, generator=generator, dtype=torch.float64)
    sigma, d = torch.tensor(2.0), torch.tensor(-0.1)
    kappa = kappa_and(v0, va, vb, noise, sigma, d, 3.0, 0.7, 1.0)
    dx = 2 * d * mixture(v0, va, vb, kappa, 3.0) + noise
    gain = density_change(va, dx, sigma, d) - density_change(vb, dx, sigma, d)
    torch.testing.assert_close(gain.abs(), torch.full((5,), 0.7, dtype=torch.float64), rtol=1e-4, atol=1e-6)


def test_or_with_a_great_temperature_takes_the_likelier():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(kappa_or(a, b, 1e6, 0.0), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(kappa_or(a, b, 1.0, 0.0), torch.stack([a, b]).softmax(0)[0])


def test_where_both_agree_kappa_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    v0, v, noise = torch.randn(3, 5, 8, generator=generator)
    kappa = kappa_and(v0, v, v.clone(), noise, torch.tensor(2.0), torch.tensor(-0.1), 7.5, 0.0, 1.0)
    assert torch.equal(kappa, torch.full_like(kappa, 0.5))
    assert torch.equal(mixture(v0, v, v, kappa, 7.5), mixture(v0, v, v, 1 - kappa, 7.5))
    assert float(dot(v, v)[0]) > 0


# in pipelines ---------------------------------------------------------------------------------------------------------------------


STEPS = 4


def call(made, **changes):
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": STEPS, **changes}
    return made.pipe(**kwargs, generator=torch.Generator().manual_seed(3))[0]


@pytest.mark.parametrize(("name", "operation"), [
    ("StableDiffusionPipeline", "or"), ("StableDiffusionPipeline", "and"), ("StableDiffusionPipeline", "average"),
    ("StableDiffusionXLPipeline", "and"), ("StableDiffusion3Pipeline", "or"),
])  # fmt: skip
def test_both_prompts_matter(name, operation):
    made = make(name)
    before = call(made)
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation=operation)])
    first = call(made)
    assert torch.equal(call(made), first)
    assert not torch.equal(call(made, prompt="a blue car"), first)
    made.pipe.plugins.configure("superdiff", prompt="a yellow star")
    assert not torch.equal(call(made), first)
    records = made.pipe.plugins.report().plugins["superdiff"].records
    assert records["kappa"].shape == (STEPS - 1, 1)
    made.pipe.plugins.clear()
    assert torch.equal(call(made), before)


@pytest.mark.parametrize("operation", ["or", "and", "average"])
def test_the_same_prompt_twice_is_the_plain_sde(operation):
    made = make("StableDiffusionPipeline")
    prompt = str(made.kwargs["prompt"])
    outputs = []
    for each in (operation, "average"):
        load_pipeline(made.pipe, plugins=[SuperDiff(prompt=prompt, operation=each)])
        outputs.append(call(made))
        made.pipe.plugins.clear()
    assert torch.equal(*outputs)


def test_one_second_prompt_for_each_prompt():
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt=("two green dogs", "a star"))])
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 4, "negative_prompt": ["a", "b"]}
    both = made.pipe(**{**kwargs, "prompt": ["a cat", "a car"]}, generator=generators)[0]
    made.pipe.plugins.configure("superdiff", prompt="a star")
    one = made.pipe(**{**kwargs, "prompt": "a car", "negative_prompt": "b"}, generator=torch.Generator().manual_seed(4))[0]
    torch.testing.assert_close(both[1:], one, rtol=1e-3, atol=1e-3)
    made.pipe.plugins.configure("superdiff", prompt=("a", "b", "c"))
    with pytest.raises(ConfigError, match="3 texts for a call with 1 prompts"):
        call(made)


def test_a_second_model():
    made, other = make("StableDiffusionPipeline"), make("StableDiffusionPipeline", seed=1)
    other.pipe.vae = made.pipe.vae  # one latent space
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", model=other.pipe)])
    with_other = call(made)
    made.pipe.plugins.clear()
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
    assert not torch.equal(call(made), with_other)


def test_schedulers_of_another_scale_give_the_same_sde():
    x, outputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
    for euler in (False, True):
        made = make("StableDiffusionPipeline")
        if euler:
            made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config, timestep_spacing="leading", steps_offset=1)
        made.pipe.scheduler.set_timesteps(STEPS)
        level = (1 + made.pipe.scheduler.sigmas[0] ** 2).sqrt() if euler else torch.tensor(1.0)
        load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
        outputs.append(call(made, latents=x * level / made.pipe.scheduler.init_noise_sigma))
    torch.testing.assert_close(outputs[1], outputs[0], rtol=2e-2, atol=2e-2)


def test_without_guidance_the_scale_is_1():
    """v_0 has no say then: nearly the same as a guidance scale that is nearly 1."""
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
    torch.testing.assert_close(call(made, guidance_scale=1.0), call(made, guidance_scale=1.0001), rtol=1e-2, atol=1e-2)


def test_bad_input():
    made = make("StableDiffusionPipeline")
    own, before = made.pipe.scheduler, call(made)
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(own.config)
    with pytest.raises(Unsupported, match="two stages"):
        call(made)
    made.pipe.plugins.clear()
    made.pipe.scheduler = own
    assert torch.equal(call(made), before)
    for knobs, key in (({"operation": "xor"}, "operation"), ({"temperature": 0}, "temperature")):
        with pytest.raises(ConfigError, match=key):
            SuperDiff(**knobs)
