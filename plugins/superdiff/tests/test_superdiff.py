"""SuperDiff: the density estimate on Gaussians, the operations' identities, and real pipelines."""

from __future__ import annotations

import inspect
import itertools

import pytest
import torch
from diffgraft import ConfigError, Effects, Unsupported, load_pipeline
from diffgraft.installed.planner import Part, plan
from diffgraft_pipelines.tiny import make
from diffgraft_superdiff import SuperDiff
from diffgraft_superdiff.method import (
    density_change,
    dot,
    euler_maruyama,
    guided,
    kappa_and,
    kappa_or,
    mixture,
    ode,
    sde,
    to_clean,
    transition,
)
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler

SIGMAS = torch.linspace(10.0, 0.05, 2000, dtype=torch.float64)
MEANS, SPREADS = (torch.tensor(-1.0), torch.tensor(1.5)), (torch.tensor(0.5), torch.tensor(0.8))


def noise_of(x, sigma, i):
    """E[eps | x] of Gaussian data i."""
    return sigma * (x - MEANS[i]) / (SPREADS[i] ** 2 + sigma**2)


def log_density(x, sigma, i):
    return torch.distributions.Normal(MEANS[i].double(), (SPREADS[i] ** 2 + sigma**2).sqrt()).log_prob(x).flatten(1).sum(1)


def walk(operation, n=64, dimensions=4, sign=1, sigmas=SIGMAS, **knobs):
    """(samples, followed log-densities, largest gaps of their changes in each step, errors of log q_a) of a walk on two Gaussians."""
    generator = torch.Generator().manual_seed(0)
    x = sigmas[0] * torch.randn(n, dimensions, generator=generator, dtype=torch.float64)
    start = [log_density(x, sigmas[0], i) for i in (0, 1)]
    logs = [torch.zeros(n, dtype=torch.float64) for _ in (0, 1)]
    gaps, errors = [], []
    for sigma, after in itertools.pairwise(sigmas):
        along_ode = operation.endswith("_ode")
        move = ode(sigma, after) if along_ode else sde(sigma, after)
        va, vb = noise_of(x, sigma, 0), noise_of(x, sigma, 1)
        noise = torch.zeros_like(x) if along_ode else move.spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)
        divergences = tuple(dimensions * sigma / (SPREADS[i] ** 2 + sigma**2) for i in (0, 1))
        if operation.startswith("and"):
            kappa = kappa_and(va, vb, va, vb, noise, move, knobs.get("gain", 0.0), divergences)
        else:
            kappa = kappa_or(*logs, knobs.get("temperature", 1.0), 0.0)
        dx = move.drift * mixture(va, vb, kappa) + noise
        before = logs
        logs = [log + density_change(v, dx, move, d, sign) for log, v, d in zip(logs, (va, vb), divergences, strict=True)]
        gaps.append(float(((logs[0] - before[0]) - (logs[1] - before[1]) - knobs.get("gain", 0.0)).abs().max()))
        x = x + dx
        errors.append(float((logs[0] - (log_density(x, after, 0) - start[0])).abs().mean()))
    return x, logs, gaps, errors


def test_the_followed_density_is_the_gaussians():
    """Card: the correct form tracks the true log-density to .08 in one dimension; the official OR code's sign is off by several."""
    assert walk("or", dimensions=1)[3][-1] < 0.15
    assert walk("or", dimensions=1, sign=-1)[3][-1] > 2


def test_the_odes_density_is_the_gaussians():
    assert walk("and_ode", dimensions=1)[3][-1] < 0.02


@pytest.mark.parametrize("operation", ["and", "and_ode"])
@pytest.mark.parametrize("gain", [0.0, 0.01, -0.01])
def test_and_changes_both_densities_alike_up_to_the_gain(operation, gain):
    _, logs, gaps, _ = walk(operation, gain=gain)
    assert max(gaps) < 1e-5
    torch.testing.assert_close(logs[0] - logs[1], torch.full_like(logs[0], gain * (len(SIGMAS) - 1)), rtol=1e-6, atol=1e-4)


def test_the_transition_is_exact_where_x0_stays():
    """Data at one point: any interval, also from a sigma of 1000, gives the right variance and the right log-density."""
    generator = torch.Generator().manual_seed(0)
    sigma, after = torch.tensor(1000.0, dtype=torch.float64), torch.tensor(20.0, dtype=torch.float64)
    x = sigma * torch.randn(20_000, 2, generator=generator, dtype=torch.float64)
    move = transition(sigma, after)
    dx = move.drift * (x / sigma) + move.spread * torch.randn(x.shape, generator=generator, dtype=torch.float64)
    assert abs(float((x + dx).std() / after) - 1) < 0.01
    normal = torch.distributions.Normal
    true = (normal(0.0, after).log_prob(x + dx) - normal(0.0, sigma).log_prob(x)).sum(1)
    torch.testing.assert_close(density_change(x / sigma, dx, move), true, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("ratio", [0.999, 0.5, 0.1])
def test_the_step_keeps_the_level_over_any_interval(ratio):
    sigma = torch.tensor(80.0, dtype=torch.float64)
    after = ratio * sigma
    move = sde(sigma, after)
    v = sigma / (1 + sigma**2)  # of x, data of unit variance
    variance = (1 + move.drift * v) ** 2 * (1 + sigma**2) + move.spread**2
    assert abs(float(variance / (1 + after**2)) - 1) < 0.02
    small = euler_maruyama(sigma, after)
    assert ratio > 0.9 or float((1 + small.drift * v) ** 2 * (1 + sigma**2) + small.spread**2) > 2 * float(1 + after**2)  # it can fail


def test_small_steps_are_the_papers():
    """dx = 2 d sigma g + sqrt(2 |d sigma| sigma) z, bit for bit; the transition is the same to first order."""
    for sigma, after in ((14.6, 13.9), (1.0, 0.95), (0.17, 0.04)):
        sigma, after = torch.tensor(sigma, dtype=torch.float64), torch.tensor(after, dtype=torch.float64)
        assert sde(sigma, after)[:4] == euler_maruyama(sigma, after)[:4]
    sigma, after = torch.tensor(5.0, dtype=torch.float64), torch.tensor(4.999, dtype=torch.float64)
    for one, other in zip(transition(sigma, after)[:4], euler_maruyama(sigma, after)[:4], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=0.0)


def test_or_with_a_great_temperature_takes_the_likelier():
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0])
    torch.testing.assert_close(kappa_or(a, b, 1e6, 0.0), torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(kappa_or(a, b, 1.0, 0.0), torch.stack([a, b]).softmax(0)[0])


def test_where_both_agree_kappa_does_not_matter():
    generator = torch.Generator().manual_seed(0)
    v0, v, noise = torch.randn(3, 5, 8, generator=generator, dtype=torch.float64)
    g = guided(v0, v, 7.5)
    kappa = kappa_and(v, v.clone(), g, g.clone(), noise, sde(torch.tensor(2.0).double(), torch.tensor(1.9).double()))
    assert torch.equal(kappa, torch.full_like(kappa, 0.5))
    assert torch.equal(mixture(g, g.clone(), kappa), g)
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
    assert records["kappa"].shape == (STEPS, 1)
    made.pipe.plugins.clear()
    assert torch.equal(call(made), before)


@pytest.mark.parametrize("operation", ["or", "and", "average", "and_ode", "avg_ode"])
def test_the_same_prompt_twice_is_the_plain_sde(operation):
    made = make("StableDiffusionPipeline")
    prompt = str(made.kwargs["prompt"])
    outputs = []
    for each in (operation, "avg_ode" if operation.endswith("_ode") else "average"):
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


def test_a_second_model_that_stays_in_another_dtype_is_refused():
    made, other = make("StableDiffusionPipeline"), make("StableDiffusionPipeline", seed=1)
    other.pipe.vae = made.pipe.vae
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", model=other.pipe)])
    other.pipe.unet.to(torch.bfloat16)
    other.pipe.unet.conv_out.to(torch.float8_e4m3fn)  # some of it is in 8 bits: it stays
    with pytest.raises(Unsupported, match=r"its unet is in torch.bfloat16, this one in torch.float32; convert it with"):
        call(made)


def test_weights_that_move_are_refused_before_the_denoiser_runs():
    made, cpu, seen = make("StableDiffusionPipeline"), torch.device("cpu"), []
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation="and_ode")])
    made.pipe.unet.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    made.pipe.unet.conv_in.register_forward_pre_hook(lambda *given: seen.append(given))
    with pytest.raises(Unsupported, match="superdiff needs gradients, but group_offloading"):
        call(made)
    assert not seen


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


def records_of(made, **changes):
    call(made, **changes)
    return made.pipe.plugins.report().plugins["superdiff"].records


@pytest.mark.parametrize("operation", ["and", "and_ode"])
@pytest.mark.parametrize(("name", "steps"), [
    ("StableDiffusionPipeline", 10), ("StableDiffusion3Pipeline", 10), pytest.param("StableDiffusionPipeline", 40, marks=pytest.mark.slow),
])  # fmt: skip
def test_a_whole_run_lifts_a_by_lift(name, steps, operation):
    made = make(name)
    for lift in (0.7, -0.7):
        load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation=operation, lift=lift)])
        records = records_of(made, num_inference_steps=steps)
        assert abs(float(records["log_qa"] - records["log_qb"]) - lift) < 1e-3, lift
        made.pipe.plugins.clear()


def test_the_report_tells_how_it_ended():
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation="or")])
    records = records_of(made)
    told = f"at the end log q_a = {float(records['log_qa']):.4g}; log q_b = {float(records['log_qb']):.4g}; kappa = "
    assert told + f"{float(records['kappa'][-1]):.4g}" in str(made.pipe.plugins.report())
    call(made, prompt=["a cat"] * 5, negative_prompt=None)
    assert str(made.pipe.plugins.report()).count(", ...") == 3
    made.pipe.plugins.configure("superdiff", operation="avg_ode")
    call(made)
    assert made.pipe.plugins.report().plugins["superdiff"].notes == ["at the end kappa = 0.5"]


def test_without_a_second_prompt_it_says_that_it_did_nothing():
    made = make("StableDiffusionPipeline")
    before = call(made)
    load_pipeline(made.pipe, plugins=[SuperDiff])
    assert torch.equal(call(made), before)
    [note] = made.pipe.plugins.report().plugins["superdiff"].notes
    assert note.startswith("inactive: prompt is none")


@pytest.mark.parametrize("scheduler", [PNDMScheduler, DDIMScheduler, EulerDiscreteScheduler])
def test_the_lift_is_that_of_any_schedule(scheduler):
    """PLMS asks once more than it has steps; a run that ends early (``denoising_end``) has one step of the SDE more."""
    made = make("StableDiffusionPipeline")
    options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **options)
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", lift=0.7)])
    records = records_of(made, num_inference_steps=10)
    assert abs(float(records["log_qa"] - records["log_qb"]) - 0.7) < 1e-3


def said(made, text, x, t):
    """The denoiser's answer for each sample under a prompt, in float64."""
    tokenizer = made.pipe.tokenizer
    tokens = tokenizer(text, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt")
    words = made.pipe.text_encoder(tokens.input_ids)[0].expand(len(x), -1, -1)
    return made.pipe.unet(x.float(), t, encoder_hidden_states=words).sample.double()


def by_hand(made, x, b, operation, w, own, lift=0.0, temperature=1.0, bias=0.0):
    """The paper's loop for ``made``'s call, nothing of the plugin in it: samples after each step, kappas, both log-densities."""
    scheduler, generator = made.pipe.scheduler, torch.Generator().manual_seed(3)
    scheduler.set_timesteps(sigmas=own)
    x, samples, kappas = x.double() * float(scheduler.init_noise_sigma), [], []
    log_qa = log_qb = torch.zeros(len(x), dtype=torch.float64)
    sigmas = scheduler.sigmas.double().tolist()
    for t, (sigma, after) in zip(scheduler.timesteps, itertools.pairwise(sigmas), strict=True):
        texts = (made.kwargs["negative_prompt"], made.kwargs["prompt"], b)
        v0, va, vb = (said(made, text, x / (1 + sigma**2) ** 0.5, t) for text in texts)
        fall = sigma - after
        noise = torch.zeros_like(x) if not after or operation == "avg_ode" else torch.randn(x.shape, generator=generator).double()
        noise = noise * (2 * fall * sigma) ** 0.5
        of_b, apart = v0 + w * (vb - v0), va - vb
        kappa = torch.full((len(x),), 0.5, dtype=torch.float64)
        if operation == "or":
            kappa = torch.stack([temperature * (log_qa + bias), temperature * log_qb]).softmax(0)[0]
        elif operation == "and":  # both change alike; without noise that is x0 as far from that of a as from that of b
            square = (va**2 - vb**2).sum((1, 2, 3))
            gain = sigma * lift / (len(own) - 2) if after else 0.0
            numerator = fall * square + ((noise - 2 * fall * of_b) * apart).sum((1, 2, 3)) + gain
            kappa = numerator / (2 * fall * w * (apart**2).sum((1, 2, 3)))
        g = of_b + w * kappa.view(-1, 1, 1, 1) * apart
        dx = -fall * g if operation == "avg_ode" or not after else -2 * fall * g + noise
        if after:
            log_qa = log_qa - ((fall * va**2 + dx * va) / sigma).sum((1, 2, 3))
            log_qb = log_qb - ((fall * vb**2 + dx * vb) / sigma).sum((1, 2, 3))
        x = x + dx
        samples.append(x)
        kappas.append(kappa)
    return samples, torch.stack(kappas), log_qa, log_qb


@torch.no_grad()
@pytest.mark.parametrize("knobs", [
    {"operation": "avg_ode"}, {"operation": "and", "lift": 3.0}, {"operation": "or", "temperature": 0.02, "bias": 20.0},
], ids=str)  # fmt: skip
def test_a_whole_run_is_the_papers_loop(knobs):
    """Every step, the last one too, which is a long one; no interval is too long for the explicit step."""
    made, b, seen = make("StableDiffusionPipeline"), "two green dogs", []
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    x, sigmas = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), [3.0, 2.2, 1.6, 1.2, 0.9, 0.7, 0.0]
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt=b, **knobs)])

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    records = records_of(made, latents=x, num_images_per_prompt=2, sigmas=sigmas, guidance_scale=4.0, callback_on_step_end=keep)
    made.pipe.plugins.clear()
    samples, kappas, log_qa, log_qb = by_hand(made, x, b, w=4.0, own=sigmas, **knobs)
    for one, other in zip(seen, samples, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=0, atol=2e-5 * float(other.abs().max()))
    torch.testing.assert_close(records["kappa"], kappas, rtol=1e-3, atol=1e-3)
    if knobs["operation"] != "avg_ode":
        torch.testing.assert_close(records["log_qa"], log_qa, rtol=1e-4, atol=1e-2)
        torch.testing.assert_close(records["log_qb"], log_qb, rtol=1e-4, atol=1e-2)


def test_a_run_of_one_step_knows_its_kappa():
    """Nothing is known of the densities but the bias; "and" is as far from a as from b."""
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation="or", bias=0.7, temperature=2.0)])
    records = records_of(made, num_inference_steps=1)
    torch.testing.assert_close(records["kappa"], torch.tensor([[1.4]], dtype=torch.float64).sigmoid())
    va, vb, v0 = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    ga, gb, move = guided(v0, va, 3.0), guided(v0, vb, 3.0), to_clean(torch.tensor(0.4, dtype=torch.float64))
    g = mixture(ga, gb, kappa_and(va, vb, ga, gb, torch.zeros_like(va), move))
    torch.testing.assert_close((g - va).norm(dim=1), (g - vb).norm(dim=1))


def test_only_the_mode_that_takes_gradients_says_so():
    """Beside a plugin that replaces the denoiser the planner warns of gradients past it."""
    other = Part("other", Effects(replaces=frozenset({"denoiser"})))
    for operation in ("or", "and", "average", "avg_ode", "and_ode"):
        plugin = SuperDiff(prompt="a", operation=operation)
        warned = any("gradients" in text for text in plan([Part(plugin.name, plugin.effects), other]).warnings)
        assert warned == (operation == "and_ode"), operation
    assert "plain_gradients" in SuperDiff.effects.needs
    made = make("StableDiffusionPipeline")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="a", operation="and_ode")])
    made.pipe.plugins.configure("superdiff", operation="and")
    assert "plain_gradients" not in made.pipe.plugins["superdiff"].effects.needs


def test_the_ode_draws_no_noise_and_is_the_schedulers_for_one_prompt():
    """avg_ode of one prompt twice is Euler's own ODE."""
    made = make("StableDiffusionXLPipeline")
    plain = call(made)
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt=str(made.kwargs["prompt"]), operation="avg_ode")])
    torch.testing.assert_close(call(made), plain, rtol=1e-4, atol=1e-4)
    assert set(records_of(made)) == {"kappa"}


def test_divergences_are_those_of_the_denoiser():
    """Hutchinson's estimate has the mean of the trace: a denoiser that is linear in x has it exactly for every e where it is diagonal."""
    made = make("StableDiffusionXLPipeline")  # Euler: x = x0 + sigma eps, the denoiser is given x / sqrt(1 + sigma^2)
    made.pipe.unet.forward = lambda sample, timestep, *a, **k: (0.5 * sample,)
    seen = []

    class Spy(SuperDiff):
        def divergences(self, call):
            found = super().divergences(call)
            seen.append((call.step.sigma, call.latents[0].numel(), found))
            return found

    load_pipeline(made.pipe, plugins=[Spy(prompt="two green dogs", operation="and_ode")])
    call(made)
    assert len(seen) == STEPS
    for sigma, n, found in seen:
        expected = torch.full((1,), 0.5 * n, dtype=torch.float64) / (1 + sigma.double() ** 2).sqrt()
        for one in found:
            torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("steps", [4, 10, 28, 50])
@pytest.mark.parametrize("operation", ["and", "and_ode"])
def test_a_flow_models_denoiser_is_given_the_level_that_it_is_told(steps, operation):
    """The first interval of a flow model goes from sigma / a = infinity (explicit: 10 to 20 times too large)."""
    made, ratios = make("StableDiffusion3Pipeline"), []

    def forward(hidden_states, timestep, *args, **kwargs):
        s, x = float(timestep.flatten()[0]) / 1000, hidden_states
        variance = 0.25 * (1 - s) ** 2 + s * s
        ratios.append(float(x.std()) / variance**0.5)
        return (s * x / variance - 0.25 * (1 - s) * x / variance,)

    made.pipe.transformer.forward = forward
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs", operation=operation)])
    call(made, height=256, width=256, num_inference_steps=steps, guidance_scale=1.0)
    assert (0.6 if steps >= 10 else 0.0) < min(ratios) <= max(ratios) < 1.4, ratios  # few steps lose variance of the data


def test_a_run_that_ends_early_hands_over_noisy_latents():
    """SDXL's ``denoising_end``: data that are zero leave nothing but the noise of the level reached."""
    for scheduler in (EulerDiscreteScheduler, DDIMScheduler):
        levels = []
        for plugins in ([], [SuperDiff(prompt="two green dogs")]):
            made = make("StableDiffusionXLPipeline")
            made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
            abar = made.pipe.scheduler.alphas_cumprod
            made.pipe.unet.forward = lambda sample, timestep, *a, abar=abar, **k: (sample / (1 - abar[int(timestep)]).sqrt(),)
            if plugins:
                load_pipeline(made.pipe, plugins=plugins)
            levels.append(float(call(made, num_inference_steps=20, denoising_end=0.6).std()))
        assert 0.75 < levels[1] / levels[0] < 1.33, (scheduler, levels)
        assert len(made.pipe.plugins.report().plugins["superdiff"].records["kappa"]) == made.pipe._num_timesteps


def embeddings(made, prompt, negative):
    """The call arguments that say a prompt as embeddings."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    takes = inspect.signature(made.pipe.encode_prompt).parameters
    more = {name: made.kwargs.get(name) for name in ("prompt_2", "prompt_3", "max_sequence_length") if name in takes}
    vectors = made.pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, negative_prompt=negative, **more
    )
    return dict(zip(names, vectors, strict=False))


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline", "StableDiffusion3Pipeline"])
def test_the_first_prompt_may_be_said_in_any_form(name):
    """As text, for each encoder, or as embeddings: what the pipeline takes for the same is the same with a second prompt too."""
    made = make(name)
    said = {"prompt": "a red apple", "negative_prompt": "blurry"}
    vectors = embeddings(made, "a red apple", "blurry")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
    text = call(made, **said)
    torch.testing.assert_close(call(made, **{"prompt": None, "negative_prompt": None, **vectors}), text, rtol=1e-3, atol=1e-3)
    if name != "StableDiffusionPipeline":
        both = call(made, **said, prompt_2="a red apple", negative_prompt_2="blurry")
        torch.testing.assert_close(both, text, rtol=1e-3, atol=1e-3)
        assert not torch.equal(call(made, **said, prompt_2="a blue sea"), text)


def test_embeddings_longer_than_the_second_prompt():
    """Prompts of more than 77 tokens come as two parts; b keeps its own length."""
    made = make("StableDiffusionPipeline")
    vectors = {key: torch.cat([value, value], dim=1) for key, value in embeddings(made, "a red apple", "blurry").items()}
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt=("a star", "a dog"))])
    twice = {key: torch.cat([value, value]) for key, value in vectors.items()}
    assert torch.isfinite(call(made, prompt=None, negative_prompt=None, **twice)).all()
    with pytest.raises(ConfigError, match="2 texts for a call with 1 prompts"):
        call(made, prompt=None, negative_prompt=None, **vectors)


def test_a_callback_that_changes_the_prompt_is_followed():
    """a's prompt changes from step 2 on, and with it what a is; b is the knob's."""
    made = make("StableDiffusionPipeline")
    vectors = embeddings(made, "a blue car", "blurry")
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt="two green dogs")])
    before = call(made)

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": torch.cat([vectors["negative_prompt_embeds"], vectors["prompt_embeds"]])} if step == 1 else {}

    changed = call(made, callback_on_step_end=change, callback_on_step_end_tensor_inputs=["prompt_embeds"])
    assert not torch.equal(changed, before)


def test_skip_layer_guidance_guides_both_prompts():
    """g_i = v_0 + w (v_i - v_0) + k (v_i - v_i without the layers); of one prompt twice it is the pipeline's own combination."""
    skips = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    made = make("StableDiffusion3Pipeline")
    plain = call(made, **skips)
    load_pipeline(made.pipe, plugins=[SuperDiff(prompt=str(made.kwargs["prompt"]), operation="avg_ode")])
    torch.testing.assert_close(call(made, **skips), plain, rtol=1e-3, atol=1e-3)
    made.pipe.plugins.configure("superdiff", prompt="two green dogs")
    assert not torch.equal(call(made, **skips), call(made))


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
