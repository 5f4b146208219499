"""interpolant_sde: marginals on data whose score is known, log-probabilities, the ODE at nought, bad input."""

from __future__ import annotations

import re

import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft_interpolant_sde import InterpolantSDE
from diffgraft_interpolant_sde.method import diffusion, kick, log_prob
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DEISMultistepScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

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


def notes_of(made, **knobs):
    load_pipeline(made.pipe, plugins=[InterpolantSDE(**knobs)])
    call(made)
    notes = made.pipe.plugins.report().plugins["interpolant_sde"].notes
    made.pipe.plugins.clear()
    return notes


def test_a_run_without_noise_says_so():
    made = make("StableDiffusion3Pipeline")
    for knobs, why in (
        ({"noise_window": (40, 60)}, r"none of the run's 6 steps \(0 to 5\) lies in noise_window = \(40, 60\)"),
        ({"noise_window": (2, 2)}, r"lies in noise_window = \(2, 2\)"),
        ({"noise_window": (5, 9)}, "the schedule's last, which last_step_ode spares"),
        ({"eta": 0.0}, "eta is 0"),
    ):
        [note] = notes_of(made, **knobs)
        assert re.search(f"^inactive: .*{why}", note), note
    for knobs in ({"noise_window": (5, 9), "last_step_ode": False}, {"noise_window": (4, 60)}, {}):
        assert notes_of(made, **knobs) == []


def test_a_run_that_is_stopped_before_its_noise_is_not_called_inactive():
    made = make("StableDiffusion3Pipeline")
    load_pipeline(made.pipe, plugins=[InterpolantSDE(noise_window=(4, 6))])

    def stop(pipe, i, t, kwargs):
        pipe._interrupt = True
        return {}

    call(made, callback_on_step_end=stop)
    assert made.pipe.plugins.report().plugins["interpolant_sde"].notes == []


@pytest.mark.parametrize(("window", "way"), [((6, 2), r"did you mean \(2, 6\)"), ((-2, 3), "-2")])
def test_a_window_without_steps_is_refused(window, way):
    with pytest.raises(ConfigError, match=f"(?s)noise_window.*{way}"):
        InterpolantSDE(noise_window=window)


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


@torch.no_grad()
@pytest.mark.parametrize(("scheduler", "noise", "last"), [
    (DDIMScheduler, "flow_grpo", False), (DDIMScheduler, "const", True),
    (EulerDiscreteScheduler, "sigma", False), (EulerDiscreteScheduler, "flow_grpo", True),
])  # fmt: skip
def test_a_run_of_a_diffusion_model_is_the_sde_by_hand(scheduler, noise, last):
    """The SDE on the linear path in a loop with nothing of the plugin in it; the transitions' densities are of the latents' own unit."""
    made, eta, n, seen = make("StableDiffusionPipeline"), 0.7, 4, []
    pipe = made.pipe
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", steps_offset=1)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    load_pipeline(pipe, plugins=[InterpolantSDE(eta=eta, noise=noise, last_step_ode=last, record=True)])

    def keep(pipe, step, timestep, tensors):
        seen.append(tensors["latents"].clone())
        return {}

    call(made, latents=x, num_images_per_prompt=2, num_inference_steps=n, guidance_scale=1.0, callback_on_step_end=keep)
    records = pipe.plugins.report().plugins["interpolant_sde"].records
    pipe.plugins.clear()

    generator, densities = torch.Generator().manual_seed(3), []
    tokens = pipe.tokenizer(
        made.kwargs["prompt"], padding="max_length", max_length=pipe.tokenizer.model_max_length, truncation=True, return_tensors="pt"
    )
    words = pipe.text_encoder(tokens.input_ids)[0].expand(2, -1, -1)
    pipe.scheduler.set_timesteps(n)
    if scheduler is DDIMScheduler:  # x = a x0 + s eps
        abar = [*pipe.scheduler.alphas_cumprod[pipe.scheduler.timesteps].tolist(), float(pipe.scheduler.final_alpha_cumprod)]
        levels = [(a**0.5, (1 - a) ** 0.5) for a in abar]
    else:
        levels = [(1.0, float(s)) for s in pipe.scheduler.sigmas]
    x = x.double() * float(pipe.scheduler.init_noise_sigma)
    for i, t in enumerate(pipe.scheduler.timesteps):
        (a, s), (a1, s1) = levels[i : i + 2]
        eps = pipe.unet((x / (a * a + s * s) ** 0.5).float(), t, encoder_hidden_states=words).sample.double()
        x0 = (x - s * eps) / a
        sigma, after, h = s / (a + s), s1 / (a1 + s1), s / (a + s) - s1 / (a1 + s1)
        noisy = i < n - 1 or not last
        epsilon = noisy * eta**2 / 2 * {"const": 1.0, "sigma": sigma, "flow_grpo": sigma / (1 - sigma)}[noise]
        mean = ((1 - sigma) * x0 + sigma * eps - h * (eps - x0) - h * epsilon * eps / sigma) * (a1 + s1)
        x, std = mean, (2 * epsilon * h) ** 0.5 * (a1 + s1)
        if noisy:
            x = mean + std * torch.randn(x.shape, generator=generator).double()
            densities.append(torch.distributions.Normal(mean, std).log_prob(x).flatten(1).sum(1))
        assert 0 <= after < sigma < 1
        torch.testing.assert_close(seen[i].double(), x, rtol=0, atol=1e-5 * float(x.abs().max()))
    torch.testing.assert_close(records["log_prob"].double(), torch.stack(densities), rtol=1e-5, atol=2e-2)
    torch.testing.assert_close(records["log_prob_mean"].double(), torch.stack(densities) / x[0].numel(), rtol=1e-5, atol=1e-4)


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


def sigma_of(model_kind, t, scheduler):
    """(a, s) of what a denoiser is given at its timestep."""
    if model_kind == "flow":
        return 1 - t / 1000, t / 1000
    abar = float(scheduler.alphas_cumprod[round(t)])
    return abar**0.5, (1 - abar) ** 0.5


def exact(made, kind):
    """Put the exact denoiser of N(0, 1/4) on; what it is given: factors by which it is larger than at the time that it is told."""
    model = made.pipe.transformer if kind == "flow" else made.pipe.unet
    names, seen = ("hidden_states" if kind == "flow" else "sample"), []

    def forward(*args, **kwargs):
        x = kwargs.get(names, args[0] if args else None)
        t = float(torch.as_tensor(kwargs.get("timestep", args[1] if len(args) > 1 else None)).flatten()[0])
        a, s = sigma_of(kind, t, made.pipe.scheduler)
        variance = a * a * VARIANCE + s * s
        x0, eps = a * VARIANCE / variance * x, s / variance * x
        seen.append(float(x.float().std()) / variance**0.5)
        v = made.pipe.scheduler.config.get("prediction_type") == "v_prediction"
        return (eps - x0 if kind == "flow" else a * eps - s * x0 if v else eps,)

    model.forward = forward
    return seen


ZERO_SNR = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
FLOW_UNIPC = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SHIPPED = [
    ("StableDiffusionPipeline", DDIMScheduler, {}),
    ("StableDiffusionPipeline", DDIMScheduler, ZERO_SNR),
    ("StableDiffusionPipeline", PNDMScheduler, {"skip_prk_steps": True}),
    ("StableDiffusionPipeline", LMSDiscreteScheduler, {}),
    ("StableDiffusionPipeline", DPMSolverMultistepScheduler, {"use_karras_sigmas": True}),
    ("StableDiffusionPipeline", DEISMultistepScheduler, {}),
    ("StableDiffusionPipeline", UniPCMultistepScheduler, {}),
    ("StableDiffusionXLPipeline", EulerDiscreteScheduler, {}),
    ("StableDiffusionXLPipeline", EulerDiscreteScheduler, ZERO_SNR),
    ("StableDiffusion3Pipeline", FlowMatchEulerDiscreteScheduler, {"shift": 3.0}),
    ("StableDiffusion3Pipeline", UniPCMultistepScheduler, FLOW_UNIPC),
    ("WanPipeline", UniPCMultistepScheduler, FLOW_UNIPC),
    ("WanPipeline", DPMSolverMultistepScheduler, {**FLOW_UNIPC, "flow_shift": 5.0}),
    ("WanPipeline", FlowMatchEulerDiscreteScheduler, {"shift": 5.0}),
]


@pytest.mark.parametrize(("name", "scheduler", "options"), SHIPPED)
@pytest.mark.parametrize("noise", ["flow_grpo", "sigma"])
@pytest.mark.parametrize("steps", [4, 10])
def test_the_noise_is_in_proportion_under_what_pipelines_ship_with(name, scheduler, options, noise, steps):
    """sigma just below 1 counts as 1 (Wan's UniPC begins at 1 - 1e-6, Euler with zero terminal SNR at 4096 / 4097)."""
    made = make(name)
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **options)
    seen = exact(made, "flow" if "Stable" not in name or "3" in name else "scheduler")
    load_pipeline(made.pipe, plugins=[InterpolantSDE(noise=noise)])
    out = call(made, num_inference_steps=steps)
    assert torch.isfinite(out).all()
    most = 1.5 if steps == 10 else 2.5  # four steps are coarse, and the formula is only right for small ones
    assert 1 / 1.5 < min(seen) <= max(seen) < most, seen


def test_a_step_that_is_made_twice_gets_noise_once_from_where_it_began():
    """PLMS's first step. With the exact denoiser of N(0, 1/4) and the same noise, it is DDIM's but for the averaged prediction."""
    kept = []
    for scheduler in (DDIMScheduler, PNDMScheduler):
        made = make("StableDiffusionPipeline")
        options = {"skip_prk_steps": True} if scheduler is PNDMScheduler else {}
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **options)
        exact(made, "scheduler")
        load_pipeline(made.pipe, plugins=[InterpolantSDE(record=True)])
        call(made, num_inference_steps=20)
        kept.append(made.pipe.plugins.report().plugins["interpolant_sde"].records)
    assert kept[0]["steps"].tolist() == kept[1]["steps"].tolist() == list(range(19))
    torch.testing.assert_close(kept[1]["std"][0], kept[0]["std"][0])
    torch.testing.assert_close(kept[1]["mean"][0], kept[0]["mean"][0], rtol=0, atol=0.02)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_noise_of_a_step_stays(scheduler):
    """One noisy step of seven: two generators, whose first latents are the same, must still differ in the picture (UniPC's corrector
    goes back to the sample before the noise)."""
    outputs = []
    for seed in (0, 1):
        made = make("WanPipeline")
        options = FLOW_UNIPC if scheduler is UniPCMultistepScheduler else {"shift": 3.0}
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **options)
        exact(made, "flow")
        latents = torch.randn(call(made, num_inference_steps=1).shape, generator=torch.Generator().manual_seed(5))
        load_pipeline(made.pipe, plugins=[InterpolantSDE(noise_window=(3, 4), noise="const")])
        outputs.append(call(made, seed=seed, latents=latents, num_inference_steps=7))
        notes = made.pipe.plugins.report().plugins["interpolant_sde"].notes
    assert float((outputs[0] - outputs[1]).std()) > 0.1
    assert bool(notes) == (scheduler is UniPCMultistepScheduler)


def test_the_coefficient_is_that_of_the_end_only_near_it():
    sigma = torch.tensor([1 - 1e-6, 0.99, 0.98, 0.9], dtype=torch.float64)
    after = torch.tensor([0.97, 0.9, 0.97, 0.1], dtype=torch.float64)
    denominators = torch.tensor([0.03, 0.1, 0.02, 0.1], dtype=torch.float64)
    torch.testing.assert_close(diffusion(sigma, after, "flow_grpo", 0.7), 0.49 * sigma / denominators)


def test_a_step_of_no_length_adds_nothing():
    eps, zero = torch.ones(1, 4), torch.zeros(())
    shift, std = kick(eps, zero, diffusion(zero, zero, "const", 0.7), zero)
    assert not shift.any()
    assert std == 0
    assert log_prob(eps, eps, std) == 0


@pytest.mark.parametrize(("name", "scheduler"), [
    ("FluxPipeline", None), ("StableDiffusion3Pipeline", None), ("StableDiffusionPipeline", DDIMScheduler),
    ("StableDiffusionPipeline", PNDMScheduler), ("StableDiffusionXLPipeline", EulerDiscreteScheduler),
])  # fmt: skip
@pytest.mark.parametrize("noise", NOISES)
def test_noise_in_the_last_step_where_it_is_asked_for(name, scheduler, noise):
    """The last step ends at the schedule's own end, so it has a length, and its noise a density."""
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
    load_pipeline(made.pipe, plugins=[InterpolantSDE(noise=noise, record=True, last_step_ode=False)])
    call(made)
    records = made.pipe.plugins.report().plugins["interpolant_sde"].records
    assert records["steps"][-1] == 5
    assert float(records["std"][-1]) > 0
    for values in records.values():
        assert torch.isfinite(values.float()).all()
    n = records["sample"][0][0].numel()
    torch.testing.assert_close(records["log_prob_mean"], records["log_prob"] / n)


def test_a_run_that_ends_early_has_noise_in_its_last_step():
    """SDXL's ``denoising_end``: what is handed over is at the level that a refiner expects, and of the SDE."""
    made = make("StableDiffusionXLPipeline")
    abar = made.pipe.scheduler.alphas_cumprod
    made.pipe.unet.forward = lambda sample, timestep, *a, **k: (sample / (1 - abar[int(timestep)]).sqrt(),)
    early = {"num_inference_steps": 20, "denoising_end": 0.6}
    plain = call(made, **early)
    load_pipeline(made.pipe, plugins=[InterpolantSDE(record=True)])
    assert 0.75 < float(call(made, **early).std() / plain.std()) < 1.33
    assert made.pipe.plugins.report().plugins["interpolant_sde"].records["steps"].tolist() == list(range(made.pipe._num_timesteps))


@pytest.mark.parametrize("steps", [2, 3, 4])
def test_wan_in_half_precision_stays_finite(steps):
    made = make("WanPipeline")
    made.pipe.to(torch.float16)
    load_pipeline(made.pipe, plugins=[InterpolantSDE])
    assert torch.isfinite(call(made, num_inference_steps=steps)).all()


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


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler])
def test_the_sound_beside_a_picture_gets_noise_of_its_own(scheduler):
    """What is kept in the report is the picture's."""
    made = make("LTX2Pipeline")
    flow = {"prediction_type": "flow_prediction", "use_flow_sigmas": True} if scheduler is UniPCMultistepScheduler else {}
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config, **flow)

    def both(seed=3):
        kwargs = {**made.kwargs, "output_type": "latent", "num_inference_steps": 6}
        out = made.pipe(**kwargs, generator=torch.Generator().manual_seed(seed))
        return out.frames, out.audio

    plain = both()
    load_pipeline(made.pipe, plugins={"interpolant_sde": {"eta": 0.7, "record": True}})
    noisy = both()
    assert all(not torch.equal(x, y) for x, y in zip(plain, noisy, strict=True))
    assert all(torch.equal(x, y) for x, y in zip(noisy, both(), strict=True))
    records = made.pipe.plugins.report().plugins["interpolant_sde"].records
    assert records["sample"].shape == (5, 1, 192, 4)
