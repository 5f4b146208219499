"""Observation self-guidance against its equations, loops of its own in plain torch, and a Gaussian whose posterior is known."""

from __future__ import annotations

import importlib
from itertools import pairwise
from typing import Any

import diffgraft_observation_guidance as plugin_module
import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft.methods.measurements import Blur, Identity, Mask, Phase, downsample
from diffgraft.methods.predictions import SignalNoise, clean_estimate, noise_estimate
from diffgraft.methods.problems import Problem, simulated
from diffgraft.testing import run_contract
from diffgraft_observation_guidance import ObservationGuidance
from diffgraft_observation_guidance.method import (
    energy,
    eps_shift,
    is_told,
    output_shift,
    pinball,
    posterior_variance,
    quantiles,
    squared,
)
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    UNet2DModel,
)

STEPS = 4
NAME = "observation_guidance"


def tiny(name: str, module: str, steps: int = STEPS) -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update(num_inference_steps=steps)
    return made


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def run(made: Any, problem: Problem | None, seed: int = 0, others: dict[str, Any] | None = None, **knobs: Any) -> torch.Tensor:
    """What the run ends at: latents, of pixel models the picture in [0, 1]; the plugin is off again."""
    knobs.setdefault("noisiest", 1e4)
    call = {key: knobs.pop(key) for key in ("batch_size", "num_images_per_prompt") if key in knobs}
    pipe = load_pipeline(made.pipe, plugins={**(others or {}), NAME: {"problem": problem, **knobs}})
    output = "np" if module_of(pipe) == "pixel" else "latent"
    if type(pipe).__name__ == "DiTPipeline":
        output = "np"
    try:
        result = pipe(**{**made.kwargs, **call, "output_type": output}, generator=torch.Generator().manual_seed(seed))[0]
    finally:
        made.report = pipe.plugins.report()
        for name in (NAME, *(others or {})):
            pipe.plugins.remove(name)
    return torch.as_tensor(result)


def module_of(pipe: Any) -> str:
    return pipe.plugins.family.name


def pixel(steps: int = STEPS, scheduler: Any = None) -> Any:
    made = tiny("DDIMPipeline", "pixel", steps)
    if scheduler is not None:
        made.pipe.scheduler = scheduler
    return made


def picture(side: int = 16, n: int = 1, seed: int = 7) -> torch.Tensor:
    return drawn(n, 3, side, side, seed=seed, dtype=torch.float32).clamp(-1, 1)


# the maths -------------------------------------------------------------------------------------------------------------------------------


def test_quantiles_are_the_papers() -> None:
    torch.testing.assert_close(quantiles(6, 3), torch.tensor([0.25, 0.5, 0.75] * 2))
    assert quantiles(1, 1).tolist() == [0.5]


def test_pinball_of_one_picture_is_half_the_absolute_error() -> None:
    measured, y = drawn(1, 3, 4, 4), drawn(1, 3, 4, 4, seed=1)
    assert torch.equal(pinball(measured, y, quantiles(1, 1)), (y - measured).abs() / 2)


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_pinball_is_least_at_the_quantile(k: int) -> None:
    q = k / 5
    y = torch.arange(1000, dtype=torch.float64) / 999
    tried = torch.linspace(0, 1, 201, dtype=torch.float64)
    losses = pinball(tried[:, None].expand(-1, 1000), y[None], torch.full((201,), q)).mean(1)
    assert abs(float(tried[losses.argmin()]) - q) < 0.01


def test_energy_is_the_official_sum_over_the_share_that_is_seen() -> None:
    losses, seen = drawn(2, 3, 4, 4).square(), (drawn(1, 1, 4, 4, seed=1) > 0).double()
    official = (losses * seen).flatten(1).sum(1)
    torch.testing.assert_close(energy(losses, seen.expand(1, 3, 4, 4), 48), official * 48 / (3 * seen.sum()))


def told(x: torch.Tensor, seen: torch.Tensor, operator: Any = None) -> torch.Tensor:
    """The gradient of a model of one pixel, x0_hat = tanh(x)."""
    x = x.clone().requires_grad_()
    measured = torch.tanh(x) if operator is None else operator.A(torch.tanh(x))
    (gradient,) = torch.autograd.grad(energy(squared(measured, torch.full_like(measured, 0.3)), seen, x[0].numel()).sum(), x)
    return gradient


def test_the_size_of_a_picture_changes_nothing() -> None:
    """Four times the picture: each quarter is told what the whole was told; so it is under an operator that makes pictures smaller."""
    x, seen = drawn(1, 3, 4, 4), (drawn(1, 1, 4, 4, seed=1) > 0).double()
    torch.testing.assert_close(told(x.repeat(1, 1, 2, 2), seen.repeat(1, 1, 2, 2))[..., :4, :4], told(x, seen))
    small, large = torch.ones(1, 3, 2, 2), torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(told(x.repeat(1, 1, 2, 2), large, downsample(2))[..., :4, :4], told(x, small, downsample(2)))


def test_a_bare_sum_or_mean_would_not_do() -> None:
    """The toy that must not be: a mean alone falls with the size, a sum alone with the share that is seen."""
    x, seen = drawn(1, 3, 4, 4), torch.ones(1, 1, 4, 4, dtype=torch.float64)
    few = seen.clone()
    few[..., 1:] = 0
    mean = [told(each, torch.ones_like(each[:, :1])) / each[0].numel() for each in (x, x.repeat(1, 1, 2, 2))]
    torch.testing.assert_close(mean[1][..., :4, :4], mean[0] / 4)
    ours = [float(told(x, mask).abs().sum()) for mask in (seen, few)]
    summed = [ours[0], ours[1] * float(few.mean())]
    assert summed[1] < 0.5 * summed[0] < ours[1]


def test_nothing_is_told_where_nothing_depends_on_what_was_seen() -> None:
    seen = torch.zeros(1, 1, 4, 4, dtype=torch.float64)
    seen[..., 0] = 1
    gradient = told(drawn(1, 3, 4, 4), seen)
    assert bool((gradient[..., 1:] == 0).all())
    assert bool((gradient[..., 0] != 0).all())


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_an_output_shift_is_the_shift_of_the_noise(kind: str) -> None:
    x, output, eps = drawn(1, 3, 4, 4), drawn(1, 3, 4, 4, seed=1), drawn(1, 3, 4, 4, seed=2)
    every = [(0.8, 0.6), (1.0, 2.5), (0.6, 0.4)] if kind != "flow" else [(0.6, 0.4)]
    for a, s in every:
        levels = SignalNoise(torch.tensor(a, dtype=torch.float64), torch.tensor(s, dtype=torch.float64))
        moved = output + output_shift(eps, levels, kind)
        was, now = (noise_estimate(x, each, levels, kind) for each in (output, moved))
        torch.testing.assert_close(now, was + eps)
        torch.testing.assert_close(clean_estimate(x, moved, levels, kind), (x - levels.s * now) / levels.a)


def test_noisy_levels_are_left_alone() -> None:
    levels = SignalNoise(torch.tensor(0.1), torch.tensor(0.99**0.5))
    assert [bool(is_told(levels, noisiest)) for noisiest in (9.0, 10.0)] == [False, True]
    assert not is_told(SignalNoise(torch.tensor(0.0), torch.tensor(1.0)), 1e4)
    abar = torch.cumprod(1 - torch.linspace(1e-4, 0.1, 100), 0)[-1]  # of the official schedule
    assert float(((1 - abar) / abar).sqrt()) == pytest.approx(ObservationGuidance().config.noisiest, abs=0.5)


def test_the_posterior_variance_is_ddpms() -> None:
    scheduler = DDPMScheduler(variance_type="fixed_small")
    scheduler.set_timesteps(50)
    abar = scheduler.alphas_cumprod.double()
    for t, before in ((980, 960), (500, 480), (20, 0)):
        levels, after = (SignalNoise(abar[i].sqrt(), (1 - abar[i]).sqrt()) for i in (t, before))
        torch.testing.assert_close(posterior_variance(levels, after), scheduler._get_variance(t).double(), rtol=1e-4, atol=1e-9)


# runs ------------------------------------------------------------------------------------------------------------------------------------


def in_plain_torch(pipe: Any, problem: Problem, scale: float, form: str, loss: str, n: int = 1, seed: int = 0) -> torch.Tensor:
    """Algorithms 1 and 2 of the paper on a pixel model that predicts eps, with the official sum over what was seen."""
    draws = torch.Generator().manual_seed(seed)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    side, abar = pipe.unet.config.sample_size, scheduler.alphas_cumprod
    x = torch.randn(n, 3, side, side, generator=draws)
    q = ((torch.arange(n) + 1) / (n + 1))[:, None, None, None]
    seen = (problem.operator.A(torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(5))) != 0).expand(n, -1, -1, -1)
    share = float(seen[0].sum()) / x[0].numel()

    def gradient(x: torch.Tensor, t: Any) -> torch.Tensor:
        x = x.detach().requires_grad_()
        x0 = (x - (1 - abar[t]).sqrt() * pipe.unet(x, t).sample) / abar[t].sqrt()
        e = problem.y - problem.operator.A(x0)
        losses = e.square() if loss == "squared" else torch.max(q * e, (q - 1) * e)
        return torch.autograd.grad(losses[seen].sum() / share, x)[0]

    for i, t in enumerate(scheduler.timesteps):
        with torch.no_grad():
            e = pipe.unet(x, t).sample
        if form == "ddim":
            e = e + scale * (1 - abar[t]).sqrt() * gradient(x, t)
        options: dict[str, Any] = {"generator": draws}
        if form == "ddim":
            options["use_clipped_model_output"] = True  # DDIM's x0 is clipped, and eps is what then makes x of it
        x = scheduler.step(e, t, x, **options).prev_sample
        if form == "ddpm":
            before = abar[scheduler.timesteps[i + 1]] if i + 1 < STEPS else scheduler_end(scheduler)
            variance = (1 - before) / (1 - abar[t]) * (1 - abar[t] / before)
            x = x - scale * variance * gradient(x, t)
    return (x.detach() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)


def scheduler_end(scheduler: Any) -> torch.Tensor:
    return torch.as_tensor(getattr(scheduler, "final_alpha_cumprod", 1.0))


@pytest.mark.parametrize("loss", ["squared", "pinball"])
@pytest.mark.parametrize("form", ["ddim", "ddpm"])
@pytest.mark.parametrize("operator", [downsample(2), Mask(0.5), Blur(0.8)], ids=lambda o: type(o).__name__)
def test_a_run_is_the_papers_algorithm(operator, form: str, loss: str) -> None:
    made = pixel()
    problem = simulated(operator, picture())
    wanted = in_plain_torch(made.pipe, problem, 0.3, form, loss, n=2)
    found = run(made, problem, scale=0.3, form=form, loss=loss, batch_size=2)
    torch.testing.assert_close(found, wanted, rtol=0, atol=2e-4)
    saved = form == "ddpm" and float(scheduler_end(made.pipe.scheduler)) == 1  # there the last gradient would count nothing
    assert made.report.forwards == {"cond": 2 * STEPS - saved}


@pytest.mark.parametrize("to_one", [True, False])
def test_ddpms_last_step_asks_for_no_gradient_where_it_ends_without_noise(to_one: bool) -> None:
    made = pixel()
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, set_alpha_to_one=to_one)
    problem = simulated(Mask(0.5), picture())
    wanted = in_plain_torch(made.pipe, problem, 0.3, "ddpm", "squared")
    torch.testing.assert_close(run(made, problem, scale=0.3, form="ddpm"), wanted, rtol=0, atol=2e-4)
    assert sum(made.report.plugins[NAME].counts["gradient passes"].values()) == STEPS - to_one
    made.kwargs["num_inference_steps"] = 1
    run(made, problem, scale=0.3, form="ddpm")
    assert "residual" in made.report.plugins[NAME].records


def test_ddpms_form_on_ddpm() -> None:
    made = tiny("DDPMPipeline", "pixel")
    problem = simulated(Mask(0.5), picture())
    wanted = in_plain_torch(made.pipe, problem, 0.3, "ddpm", "squared")
    torch.testing.assert_close(run(made, problem, scale=0.3, form="ddpm"), wanted, rtol=0, atol=2e-4)


def test_what_it_costs() -> None:
    """A forward for each step, and one more for each that is led: of t = 750, 500, 250, 0 the last three."""
    made = pixel()
    run(made, simulated(Mask(0.5), picture()), noisiest=ObservationGuidance().config.noisiest)
    assert made.report.forwards == {"cond": STEPS + 3}


@pytest.mark.parametrize("knobs", [{"scale": 0.0}, {"problem": None}, {}], ids=["scale 0", "no problem", "empty mask"])
@pytest.mark.parametrize(("name", "module"), [("DDIMPipeline", "pixel"), ("StableDiffusionPipeline", "sd"), ("DiTPipeline", "dit")])
def test_off_is_bit_equal(name: str, module: str, knobs: dict[str, Any]) -> None:
    made = tiny(name, module)
    side = 16 if module == "pixel" else 64
    problem = Problem(Mask(torch.zeros(side, side)), torch.zeros(1, 3, side, side))
    plain = run(made, None)
    given = {"problem": problem, **knobs}
    if module == "dit" and not knobs:
        given["problem"] = Problem(Mask(torch.zeros(32, 32)), torch.zeros(1, 3, 32, 32)) if plain.shape[1] == 32 else problem
    assert torch.equal(run(made, given.pop("problem"), **given), plain)


@pytest.mark.parametrize(
    ("mask", "knobs", "told"),
    [
        (Mask(torch.zeros(16, 16)), {}, "inactive: the operator sees nothing of the picture"),
        (Mask(0.5), {"noisiest": 1e-6}, "inactive: every step is noisier than noisiest = 1e-06"),
    ],
)
def test_a_run_that_nothing_leads_says_so(mask: Mask, knobs: dict[str, Any], told: str) -> None:
    made = pixel()
    run(made, Problem(mask, torch.zeros(1, 3, 16, 16)), **knobs)
    assert told in made.report.plugins[NAME].notes


def test_a_mask_that_sees_no_latent_whole_is_refused() -> None:
    with pytest.raises(ConfigError, match="take space='pixels'"):
        run(tiny("StableDiffusionPipeline", "sd"), Problem(Mask(0.5), torch.zeros(1, 3, 64, 64)), space="latents")


def test_a_batch_is_its_samples_and_each_has_its_own_y() -> None:
    made, truth = pixel(), picture(n=2)
    together = run(made, simulated(Mask(0.5), truth), scale=0.3, batch_size=2)
    noise = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert not torch.equal(noise[0], noise[1])
    first = run(made, simulated(Mask(0.5), truth[:1]), scale=0.3, batch_size=2)
    torch.testing.assert_close(first[0], together[0], rtol=0, atol=1e-5)
    assert float((first[1] - together[1]).abs().max()) > 1e-3


def gradients_of(monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """The gradients that runs from now on are led by, in order."""
    seen: list[torch.Tensor] = []
    monkeypatch.setattr(plugin_module, "eps_shift", lambda g, s, scale: (seen.append(g), eps_shift(g, s, scale))[1])
    return seen


def test_guidance_is_differentiated_through_an_autoencoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gradient of the guided x0_hat's misfit in pixels, at the first step, against autograd through the parts of the pipeline."""
    made, seen = tiny("StableDiffusionPipeline", "sd"), gradients_of(monkeypatch)
    pipe, problem = made.pipe, simulated(downsample(2), picture(64))
    guidance = made.kwargs.get("guidance_scale", 7.5)
    run(made, problem, scale=1.0)
    cond, uncond = pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    z = (torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0)) * scheduler.init_noise_sigma).requires_grad_()
    t = scheduler.timesteps[0]
    said = [pipe.unet(scheduler.scale_model_input(z, t), t, encoder_hidden_states=each).sample for each in (uncond, cond)]
    out, abar = said[0] + guidance * (said[1] - said[0]), scheduler.alphas_cumprod[t]
    x0 = (z - (1 - abar).sqrt() * out) / abar.sqrt()
    pixels = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
    E = z.numel() * (problem.operator.A(pixels) - problem.y).square().mean()
    (wanted,) = torch.autograd.grad(E, z)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert made.report.forwards == {"both": 2 * STEPS}


def test_a_learned_variance_is_no_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen = tiny("DiTPipeline", "dit"), gradients_of(monkeypatch)
    pipe = made.pipe
    side = pipe.transformer.config.sample_size * 2 ** (len(pipe.vae.config.block_out_channels) - 1)
    problem = simulated(downsample(2), picture(side))
    led = run(made, problem, scale=1.0)
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    z = torch.randn(seen[0].shape, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t, C = scheduler.timesteps[0], z.shape[1]
    assert pipe.transformer.config.out_channels == 2 * C
    labels = torch.tensor([made.kwargs["class_labels"][0], pipe.transformer.config.num_embeds_ada_norm])
    said = [pipe.transformer(z, timestep=t[None], class_labels=label[None]).sample[:, :C] for label in labels]
    guidance = made.kwargs.get("guidance_scale", 4.0)
    out, abar = said[1] + guidance * (said[0] - said[1]), scheduler.alphas_cumprod[t]
    x0 = (z - (1 - abar).sqrt() * out) / abar.sqrt()
    E = z.numel() * (problem.operator.A(pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample) - problem.y).square().mean()
    (wanted,) = torch.autograd.grad(E, z)
    torch.testing.assert_close(seen[0], wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
    assert bool(torch.as_tensor(led).isfinite().all())


def test_the_gradient_goes_past_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """deepcache reuses features from its second step on; the gradients there are those without it, at the same latents."""
    pytest.importorskip("diffgraft_deepcache")
    made, problem = tiny("StableDiffusionPipeline", "sd"), simulated(downsample(2), picture(64))
    seen = gradients_of(monkeypatch)
    plain = run(made, problem, scale=1.0)
    cached = run(made, problem, scale=1.0, others={"deepcache": {}})
    assert not torch.equal(plain, cached)
    assert torch.equal(seen[0], seen[STEPS])
    assert torch.equal(seen[1], seen[STEPS + 1])


def test_it_is_the_same_path_under_an_exploding_scheduler() -> None:
    """DDIM and Euler are one solver in two scales: led, they stay so."""
    made = tiny("StableDiffusionPipeline", "sd", 10)
    options = {"timestep_spacing": "trailing", "set_alpha_to_one": True, "clip_sample": False, "steps_offset": 0}
    config = made.pipe.scheduler.config
    problem = simulated(downsample(2), picture(64))
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(config, **options)
    found = run(made, problem, scale=0.1)
    assert bool(found.isfinite().all())
    made.pipe.scheduler = DDIMScheduler.from_config(config, **options)
    wanted = run(made, problem, scale=0.1)
    assert float((found - wanted).abs().max()) < 0.01 * float(wanted.abs().max())


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("StableDiffusion3Pipeline", "sd3"),
        ("StableDiffusionXLPipeline", "sdxl"),
        ("PixArtAlphaPipeline", "pixart"),
        ("StableDiffusionPipeline", "sd"),
    ],
)
def test_the_measurement_comes_nearer(name: str, module: str) -> None:
    made = tiny(name, module, 8)
    problem = simulated(downsample(2), picture(64) * 0.2)
    residuals = []
    for scale in (1e-6, 0.2):
        run(made, problem, scale=scale)
        residuals.append(float(made.report.plugins[NAME].records["residual"]))
    assert residuals[1] < residuals[0]
    assert made.report.plugins[NAME].records["energy"].shape == (7 if module == "sd3" else 8, 1)  # SD3 begins at pure noise


def test_latents_are_compared_where_all_their_pixels_were_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    made = tiny("StableDiffusionPipeline", "sd")
    seen = torch.ones(64, 64)
    seen[:, 33:] = 0
    problem = simulated(Mask(seen), picture(64))
    decoded: list[int] = []
    made.pipe.vae.decoder.register_forward_hook(lambda *_: decoded.append(1))
    found = run(made, problem, scale=0.3, space="latents")
    assert len(decoded) == 1  # for the residual alone
    full = run(made, problem, scale=0.3)
    assert bool(found.isfinite().all())
    assert not torch.equal(found, full)


def test_checkpointing_changes_nothing_but_memory() -> None:
    made, problem = tiny("StableDiffusionPipeline", "sd"), simulated(downsample(2), picture(64))
    torch.testing.assert_close(run(made, problem, checkpointing=True), run(made, problem), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_half_precision(dtype: torch.dtype) -> None:
    made, problem = tiny("StableDiffusionPipeline", "sd"), simulated(downsample(2), picture(64))
    wanted = run(made, problem, scale=0.3)
    made.pipe.to(dtype)
    found = run(made, problem, scale=0.3)
    assert found.dtype == dtype
    assert float((found.float() - wanted).square().mean().sqrt()) < 0.15 * float(wanted.square().mean().sqrt())


def test_quantiles_of_the_pictures_of_a_prompt() -> None:
    """Of two pictures from one noise the first is led below y and the second above it."""
    made, problem = tiny("StableDiffusionPipeline", "sd", 8), Problem(Identity(), torch.zeros(1, 3, 64, 64))
    pair = run(made, problem, loss="pinball", num_images_per_prompt=2, scale=0.3)
    alone = run(made, problem, loss="pinball", num_images_per_prompt=2, scale=0.3, quantiles=1)
    assert pair.shape[0] == 2
    assert not torch.equal(pair[0], alone[0])
    assert ObservationGuidance(loss="pinball").effects.couples_batch
    assert not ObservationGuidance().effects.couples_batch


def test_what_is_edited_is_said() -> None:
    assert ObservationGuidance().effects.edits == {"prediction"}
    assert ObservationGuidance(form="ddpm").effects.edits == {"latents"}


# a Gaussian ------------------------------------------------------------------------------------------------------------------------------

MEAN, S, DEVIATION = 0.1, 0.04, 0.2
"""Of the prior N(mean, S) of each pixel; deviation of y."""


class Exact(UNet2DModel):
    """eps of a model of N(MEAN, S), exactly."""

    def forward(self, sample, timestep, *args, return_dict=True, **kwargs):  # type: ignore[no-untyped-def]
        abar = DDIMScheduler().alphas_cumprod.to(sample)[timestep]
        a, s = abar.sqrt(), (1 - abar).sqrt()
        x0 = MEAN + a * S / (a * a * S + s * s) * (sample - a * MEAN)
        return ((sample - a * x0) / s,)


def posterior_of_runs(steps: int, y: float, scale: float) -> torch.Tensor:
    """What 4096 pixels end at."""
    unet = Exact(sample_size=64, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
                 up_block_types=("UpBlock2D",) * 2, in_channels=1, out_channels=1)  # fmt: skip
    pipe = DDIMPipeline(unet, DDIMScheduler(clip_sample=False, timestep_spacing="trailing"))
    pipe.set_progress_bar_config(disable=True)
    problem = Problem(Identity(), torch.full((1, 1, 64, 64), y), noise=DEVIATION)
    pipe = load_pipeline(pipe, plugins={NAME: {"problem": problem, "scale": scale, "noisiest": 1e4}})
    x = pipe(num_inference_steps=steps, generator=torch.Generator().manual_seed(0), output_type="np")[0]
    return torch.from_numpy(x) * 2 - 1


def limit_of_the_ode(y: float, scale: float, steps: int = 200_000) -> float:
    """The mean that the led ODE goes to, by its own closed form in float64: d x / d lambda is linear, so the mean follows it."""
    abar = DDIMScheduler().alphas_cumprod.double()
    log = torch.nn.functional.interpolate(abar.log()[None, None], size=steps, mode="linear", align_corners=True)[0, 0].flip(0)
    m = drawn(1, 1, 64, 64, dtype=torch.float32).double().mean()  # of the noise that the run begins with
    levels = [*log.exp().tolist(), 1.0]
    for now, then in pairwise(levels):
        a, s = now**0.5, (1 - now) ** 0.5
        slope = a * S / (a * a * S + s * s)
        x0 = MEAN + slope * (m - a * MEAN)
        e = (m - a * x0) / s + scale * s * 2 * (x0 - y) * slope
        m = then**0.5 * (m - s * e) / a + (1 - then) ** 0.5 * e
    return float(m)


def test_the_mean_under_a_gaussian_prior() -> None:
    """s = 1 / (2 deviation^2) is the Gaussian likelihood. The posterior's mean is (deviation^2 mean + S y) / (S + deviation^2); the method
    takes p(y | x_t) for p(y | x0_hat), so it counts y too much where there is noise: its limit is further towards y, and that is where
    runs of more and more steps go."""
    y, scale = 0.5, 1 / (2 * DEVIATION**2)
    exact = (DEVIATION**2 * MEAN + S * y) / (S + DEVIATION**2)
    limit = limit_of_the_ode(y, scale, 20_000)
    off = [abs(float(posterior_of_runs(steps, y, scale).mean()) - limit) for steps in (10, 40, 160)]
    assert off[0] > off[1] > off[2]
    assert off[2] < 0.01
    assert 0 < (limit - exact) / (y - MEAN) < 0.25


# bad input -------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problem", "knobs", "told"),
    [
        (Problem(downsample(2), torch.zeros(1, 3, 4, 4)), {}, "problem is of pictures of 8x8 with 3 channels"),
        (Problem(Identity(), torch.zeros(3, 3, 16, 16)), {}, "3 measurements for 1 pictures"),
        (Problem(Identity(), torch.zeros(1, 1, 16, 16)), {}, "pictures with 1 channel"),
        (Problem(downsample(2), torch.zeros(1, 3, 8, 8)), {"space": "latents"}, "space = 'latents' is for masks"),
        (Problem(Identity(), torch.zeros(1, 3, 16, 16)), {"loss": "pinball", "quantiles": 3}, "quantiles = 3"),
    ],
)
def test_a_problem_that_does_not_fit(problem: Problem, knobs: dict[str, Any], told: str) -> None:
    made, asked = pixel(), []
    made.pipe.unet.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(ConfigError, match=told):
        run(made, problem, **knobs)
    assert not asked


@pytest.mark.parametrize("knobs", [{"scale": -1}, {"loss": "huber"}, {"form": "sde"}, {"quantiles": 0}, {"problem": "mask(0.5)"}])
def test_knobs_that_are_none(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        load_pipeline(pixel().pipe, plugins={NAME: knobs})


def test_schedulers_that_are_refused() -> None:
    made, problem = tiny("StableDiffusionPipeline", "sd"), simulated(downsample(2), picture(64))
    config = made.pipe.scheduler.config
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(config)
    with pytest.raises(Unsupported, match="asks more than once for a step"):
        run(made, problem)
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(config)
    with pytest.raises(Unsupported, match="variance-preserving"):
        run(made, problem, form="ddpm")


def test_a_measurement_that_is_not_linear() -> None:
    made = pixel()
    run(made, simulated(Phase(2), picture()), scale=0.1)
    assert bool(made.report.plugins[NAME].records["energy"].isfinite().all())


def test_contract() -> None:
    run_contract(NAME, families=["pixel"])
