"""LATINO and LVTINO against their equations, loops of their own in plain torch, and predictors whose answer is known."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Unsupported, find_family, load_pipeline
from diffgraft.methods.decoding import to_latents, to_pixels
from diffgraft.methods.measurements import Blur, Identity, Mask, Phase, TemporalMean, downsample
from diffgraft.methods.operators import Operator, conjugate_gradients
from diffgraft.methods.problems import Problem, simulated
from diffgraft.testing import run_contract
from diffgraft_lvtino import Lvtino
from diffgraft_lvtino.method import LEAST_NOISE, at_step, gamma_of, nearest_level, schedule_at, share_of_noise
from diffusers import EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler, HeunDiscreteScheduler, LCMScheduler

STEPS = 4
BIG = 1e9


def tiny(name: str, module: str, **changes: Any) -> Any:
    made = importlib.import_module(f"diffgraft_pipelines.tiny.{module}").make(name)
    made.kwargs.update({"num_inference_steps": STEPS, **changes})
    return made


def ddim() -> Any:
    return tiny("DDIMPipeline", "pixel")


def lcm(**changes: Any) -> Any:
    """A tiny SD under the scheduler of few-step models, without guidance."""
    made = tiny("StableDiffusionPipeline", "sd", guidance_scale=1.0, output_type="latent", **changes)
    made.pipe.scheduler = LCMScheduler.from_config(made.pipe.scheduler.config)
    return made


def wan(**changes: Any) -> Any:
    made = tiny("WanPipeline", "wan", guidance_scale=1.0, output_type="latent", **changes)
    made.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    return made


def drawn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype).clamp(-1, 1)


def restored(made: Any, problem: Problem, seed: int = 0, generator: Any = None, **knobs: Any) -> torch.Tensor:
    """What the run ends at: latents, or pixels in [-1, 1]."""
    pipe = load_pipeline(made.pipe, plugins={"lvtino": {"problem": problem, **knobs}})
    try:
        result = pipe(**made.kwargs, generator=torch.Generator().manual_seed(seed) if generator is None else generator)[0]
    finally:
        made.report = pipe.plugins.report()
        pipe.plugins.remove("lvtino")
    return torch.from_numpy(result).permute(0, 3, 1, 2).float() * 2 - 1 if isinstance(result, np.ndarray) else result


def said(made: Any) -> Any:
    return made.report.plugins["lvtino"]


def pixels(made: Any, z: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return to_pixels(made.pipe, find_family(type(made.pipe)), z, {})


def latents(made: Any, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return to_latents(made.pipe, find_family(type(made.pipe)), x)


# the maths -------------------------------------------------------------------------------------------------------------------------------


def dense(operator: Operator, shape: tuple[int, ...]) -> np.ndarray:
    """A as a matrix."""
    size = int(np.prod(shape))
    return operator.A(torch.eye(size, dtype=torch.float64).view(size, *shape)).flatten(1).T.numpy()


@pytest.mark.parametrize("gamma", [0.3, 50.0, 3539.0])
@pytest.mark.parametrize(
    ("operator", "shape"),
    [
        (Identity(), (1, 8, 8)),
        (Mask(0.5), (1, 8, 8)),
        (downsample(4), (1, 8, 8)),
        (Blur(0.7), (1, 8, 8)),
        (downsample(2) @ TemporalMean(3), (1, 3, 8, 8)),
    ],
    ids=("identity", "mask", "downsample", "blur", "downsample of means"),
)
def test_the_proximal_step_is_the_dense_solution(operator: Operator, shape: tuple[int, ...], gamma: float) -> None:
    """(A^T A + I / gamma) u = A^T y + x / gamma, by numpy."""
    operator = operator.to(torch.device("cpu"), torch.float64)
    A = dense(operator, shape)
    x, y = drawn(1, *shape, dtype=torch.float64), operator.A(drawn(1, *shape, seed=1, dtype=torch.float64))
    wanted = np.linalg.solve(A.T @ A + np.eye(A.shape[1]) / gamma, A.T @ y.flatten().numpy() + x.flatten().numpy() / gamma)
    largest = np.abs(wanted).max()
    np.testing.assert_allclose(operator.prox(x, y, gamma).flatten().numpy(), wanted, rtol=0, atol=2e-5 * largest)  # ends at 1e-6 of b
    right = x + gamma * operator.AT(y)
    exact = conjugate_gradients(lambda z: z + gamma * operator.AT(operator.A(z)), right, start=x, tolerance=1e-9)
    np.testing.assert_allclose(exact.flatten().numpy(), wanted, rtol=0, atol=1e-6 * largest)


def test_gamma_is_latinos() -> None:
    a, s = torch.tensor(0.6, dtype=torch.float64), torch.tensor(0.8, dtype=torch.float64)
    assert float(gamma_of(0.5, a, s, 0.02)) == pytest.approx(0.5 * 0.64 / 0.02**2)
    assert float(share_of_noise(3 * a, 3 * s)) == pytest.approx(0.64)  # of a flow's sample too: by its ratio alone
    assert float(gamma_of(1.0, a, s, 0.0)) == pytest.approx(0.64 / LEAST_NOISE**2)  # rounding is noise
    assert [at_step((3539.0, 3539.0, 1363.0), k) for k in range(5)] == [3539, 3539, 1363, 1363, 1363]


def test_the_image_models_level_is_the_videos() -> None:
    """The published pairs of SDXL's timesteps and Wan's levels have about the same noise to signal: 522 with 374, and so on."""
    abar = LCMScheduler(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012).alphas_cumprod
    for tau, published in ((0.522, 374), (0.375, 249), (0.255, 124)):
        s = torch.tensor(tau)
        assert abs(int(nearest_level(abar, 1 - s, s)) - published) < 75
    for t in (0, 400, 999):
        assert int(nearest_level(abar, abar[t].sqrt(), (1 - abar[t]).sqrt())) == t


def test_schedules_are_made_of_the_times() -> None:
    flow, euler, steps = FlowMatchEulerDiscreteScheduler(), EulerDiscreteScheduler(), LCMScheduler()
    for scheduler in (flow, euler, steps):
        scheduler.set_timesteps(3)
    times = (757.0, 375.0, 125.0)
    t, sigmas = schedule_at(times, flow.timesteps, flow.sigmas, flow, True)
    torch.testing.assert_close(sigmas, torch.tensor([0.757, 0.375, 0.125, 0.0]))
    t, sigmas = schedule_at(times, euler.timesteps, euler.sigmas, euler, False)
    abar = euler.alphas_cumprod[[757, 375, 125]]
    torch.testing.assert_close(sigmas[:3], ((1 - abar) / abar).sqrt())
    t, sigmas = schedule_at(times, steps.timesteps, None, steps, False)
    assert sigmas is None
    assert t.tolist() == [757, 375, 125]
    assert t.dtype == steps.timesteps.dtype


# runs ------------------------------------------------------------------------------------------------------------------------------------


def perfect(made: Any, truth: torch.Tensor, name: str = "unet") -> None:
    """The denoiser says what it would if the clean sample were ``truth``, whatever it is given."""
    model, scheduler = getattr(made.pipe, name), made.pipe.scheduler

    def answer(sample: Any = None, timestep: Any = None, *args: Any, hidden_states: Any = None, **kwargs: Any) -> tuple[torch.Tensor]:
        x = sample if hidden_states is None else hidden_states
        if hidden_states is not None:
            s = timestep.flatten()[0] / 1000
            return ((x - truth) / s,)
        abar = scheduler.alphas_cumprod[int(torch.as_tensor(timestep).flatten()[0])]
        return ((x - abar.sqrt() * truth) / (1 - abar).sqrt(),)

    class Out(tuple):
        sample = property(lambda self: self[0])

    model.forward = lambda *args, **kwargs: Out(answer(*args, **kwargs))


def test_everything_seen_without_noise_is_the_measurement() -> None:
    made = ddim()
    y = drawn(1, 3, *[made.pipe.unet.config.sample_size] * 2)
    torch.testing.assert_close(restored(made, Problem(Identity(), y), gamma=BIG), y, rtol=0, atol=1e-5)


@pytest.mark.parametrize("operator", [downsample(2), Mask(0.5), Blur(0.7)], ids=lambda o: type(o).__name__)
@pytest.mark.parametrize("end", ["prox", "prediction"])
def test_a_perfect_predictor_gives_the_truth(operator: Operator, end: str) -> None:
    made = ddim()
    truth = drawn(1, 3, *[made.pipe.unet.config.sample_size] * 2)
    perfect(made, truth)
    torch.testing.assert_close(restored(made, simulated(operator, truth), end=end), truth, rtol=0, atol=2e-4)
    assert float(said(made).records["residual"]) < 1e-4


def test_a_perfect_predictor_gives_the_truth_through_an_autoencoder() -> None:
    """What is measured of D(z) is explained by z: the difference of encodings is nothing, whatever the autoencoder loses."""
    for made, model, operator in ((lcm(), "unet", downsample(2)), (wan(), "transformer", TemporalMean(5))):
        z = restored(made, simulated(operator, pixels_like(made)), gamma=1.0, end="prediction", few_step=True)  # some latents
        truth = drawn(*z.shape, seed=3) * 0.5
        perfect(made, truth, model)
        problem = simulated(operator, pixels(made, truth).clamp(-1, 1))
        torch.testing.assert_close(restored(made, problem, encoding="difference", end="prox"), truth, rtol=0, atol=1e-4)


def pixels_like(made: Any) -> torch.Tensor:
    frames = (made.kwargs["num_frames"],) if "num_frames" in made.kwargs else ()
    return drawn(1, 3, *frames, made.kwargs["height"], made.kwargs["width"])


def in_plain_torch(made: Any, problem: Problem, times: list[int], delta: list[float], seed: int = 0) -> torch.Tensor:
    """LATINO on a tiny SD, in eps, with the scheduler's own discarded draw of each step."""
    pipe, draws = made.pipe, torch.Generator().manual_seed(seed)
    abar, scale = pipe.scheduler.alphas_cumprod, pipe.vae.config.scaling_factor
    text = pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, False)[0]

    def encoded(x: torch.Tensor) -> torch.Tensor:
        return pipe.vae.encode(x.clamp(-1, 1)).latent_dist.mode() * scale

    with torch.no_grad():
        z = encoded(problem.operator.prox(torch.zeros(problem.shape), problem.y, 200.0))
        z = abar[times[0]].sqrt() * z + (1 - abar[times[0]]).sqrt() * torch.randn(z.shape, generator=draws)
        for k, t in enumerate(times):
            e = pipe.unet(z, t, encoder_hidden_states=text).sample
            x = pipe.vae.decode((z - (1 - abar[t]).sqrt() * e) / abar[t].sqrt() / scale).sample.clamp(-1, 1)
            clean = encoded(problem.operator.prox(x, problem.y, delta[k] * float(1 - abar[t]) / problem.noise**2))
            if k == len(times) - 1:
                return clean
            torch.randn(z.shape, generator=draws)  # LCM's own step
            after = abar[times[k + 1]]
            z = after.sqrt() * clean + (1 - after).sqrt() * torch.randn(z.shape, generator=draws)
    raise AssertionError


@pytest.mark.parametrize("operator", [downsample(2), Mask(0.5), Blur(0.7)], ids=lambda o: type(o).__name__)
def test_a_run_is_the_loop(operator: Operator) -> None:
    made, delta, times = lcm(), [0.01, 0.1, 1.0], [999, 749, 499, 249]
    problem = simulated(operator, drawn(1, 3, 64, 64), 0.05, torch.Generator().manual_seed(1))
    wanted = in_plain_torch(made, problem, times, [*delta, delta[-1]])
    got = restored(made, problem, delta=tuple(delta), times=tuple(map(float, times)))
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-4 * float(wanted.abs().max()))
    assert said(made).notes == []
    assert made.report.forwards == {"cond": 4}


def flow_in_plain_torch(made: Any, problem: Problem, taus: list[float], gammas: list[float], image: Any = None, **at: Any) -> torch.Tensor:
    """LVTINO on a tiny Wan: velocity model, each frame by the image model between two steps, the last prediction."""
    pipe, draws = made.pipe, torch.Generator().manual_seed(0)
    n = len(problem.y)
    text = pipe.encode_prompt(made.kwargs["prompt"], do_classifier_free_guidance=False, max_sequence_length=32)[0]
    z = latents(made, problem.operator.prox(torch.zeros(problem.shape), problem.y, 200.0).clamp(-1, 1))
    z = (1 - taus[0]) * z + taus[0] * torch.randn(z.shape, generator=draws)
    for k, tau in enumerate(taus):
        with torch.no_grad():
            v = pipe.transformer(hidden_states=z, timestep=torch.tensor([1000 * tau] * n), encoder_hidden_states=text, return_dict=False)[0]
        z0 = z - tau * v
        if k == len(taus) - 1:
            return z0
        x = problem.operator.prox(pixels(made, z0).clamp(-1, 1), problem.y, gammas[k]).clamp(-1, 1)
        if image is not None:
            t, scale = at["times"][k], image.vae.config.scaling_factor
            abar = image.scheduler.alphas_cumprod[t]
            words = image.encode_prompt(at["text"], "cpu", 1, False)[0]
            noise, frames = None, []
            with torch.no_grad():
                for frame in x.unbind(2):
                    w = image.vae.encode(frame).latent_dist.mode() * scale
                    noise = torch.randn(w.shape, generator=draws) if noise is None else noise
                    w = abar.sqrt() * w + (1 - abar).sqrt() * noise
                    e = image.unet(w, t, encoder_hidden_states=words).sample
                    frames.append(image.vae.decode((w - (1 - abar).sqrt() * e) / abar.sqrt() / scale).sample)
            x = problem.operator.prox(torch.stack(frames, 2).clamp(-1, 1), problem.y, at["gamma"]).clamp(-1, 1)
        z = (1 - taus[k + 1]) * latents(made, x) + taus[k + 1] * torch.randn(z.shape, generator=draws)
    raise AssertionError


def test_a_video_is_the_loop() -> None:
    made = wan()
    problem = simulated(downsample(2), pixels_like(made), 0.05)
    times, gammas = (757.0, 522.0, 255.0), (3539.0, 1363.0)
    made.kwargs["num_inference_steps"] = 3
    wanted = flow_in_plain_torch(made, problem, [t / 1000 for t in times], list(gammas))
    got = restored(made, problem, times=times, gamma=gammas, few_step=True)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert made.report.forwards == {"cond": 3}


def test_a_video_with_the_image_models_step_is_the_loop() -> None:
    """The same noise for all frames, a gamma of its own; the image model's forwards are counted apart."""
    made, image = wan(num_inference_steps=3), lcm().pipe
    problem = simulated(TemporalMean(5), pixels_like(made), 0.05)
    times, gammas = (757.0, 522.0, 255.0), (3539.0, 1363.0)
    at = {"times": (374, 124), "text": "a photo", "gamma": 20.0}
    wanted = flow_in_plain_torch(made, problem, [t / 1000 for t in times], list(gammas), image, **at)
    got = restored(made, problem, times=times, gamma=gammas, few_step=True, image=image, image_times=at["times"], image_gamma=20.0,
                   image_prompt="a photo")  # fmt: skip
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-4 * float(wanted.abs().max()))
    assert made.report.forwards == {"cond": 3}
    assert said(made).counts["image"]["run"] == 2 * 5
    other = restored(made, problem, times=times, gamma=gammas, few_step=True)
    assert float((other - got).abs().max()) > 1e-3


def test_samples_of_a_batch_are_what_they_are_alone() -> None:
    made = lcm(prompt=["a red apple", "a blue car"])
    problem = simulated(Mask(0.5), drawn(2, 3, 64, 64), 0.02)
    image = lcm().pipe
    together = restored(made, problem, generator=[torch.Generator().manual_seed(i) for i in range(2)], image=image)
    for i in range(2):
        made.kwargs["prompt"] = ["a red apple", "a blue car"][i]
        own = Problem(problem.operator, problem.y[i : i + 1], problem.noise)
        alone = restored(made, own, generator=[torch.Generator().manual_seed(i)], image=image)
        torch.testing.assert_close(together[i : i + 1], alone, rtol=0, atol=1e-4 * float(alone.abs().max()))


def test_several_pictures_a_prompt_have_one_measurement() -> None:
    made = lcm(num_images_per_prompt=2, prompt=["a red apple", "a blue car"])
    result = restored(made, simulated(Mask(0.5), drawn(1, 3, 64, 64), 0.02), image=lcm().pipe)
    assert len(result) == 4
    assert said(made).records["residual"].shape == (4,)


def test_nothing_is_kept_for_gradients() -> None:
    """No module runs with gradients on, and not one byte is kept for a way back, though all weights ask for gradients."""
    made, image, kept, seen = wan(), lcm().pipe, [], []
    for module in (made.pipe.transformer, made.pipe.vae.decoder, made.pipe.vae.encoder, image.unet, image.vae.decoder):
        module.requires_grad_(True)
        module.register_forward_hook(lambda module, args, out: seen.append(torch.is_grad_enabled()))
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.nbytes) or x, lambda x: x):
        restored(made, simulated(downsample(2), pixels_like(made)), few_step=True, image=image)
    assert seen
    assert not any(seen)
    assert sum(kept) == 0
    assert all(weight.grad is None for weight in made.pipe.transformer.parameters())


def test_a_stopped_run_ends_with_what_it_had() -> None:
    made = lcm()

    def stop(pipe: Any, i: int, t: Any, tensors: Any) -> Any:
        pipe._interrupt = i == 1
        return tensors

    made.kwargs["callback_on_step_end"] = stop
    result = restored(made, simulated(Mask(0.5), drawn(1, 3, 64, 64)))
    assert bool(result.isfinite().all())
    assert "residual" not in said(made).records
    assert made.report.forwards == {"cond": 2}


def test_a_part_of_a_schedule_hands_over_noisy_latents() -> None:
    made = tiny("StableDiffusionXLPipeline", "sdxl", guidance_scale=1.0, output_type="latent", denoising_end=0.5)
    result = restored(made, simulated(Mask(0.5), drawn(1, 3, 64, 64)), few_step=True)
    assert bool(result.isfinite().all())
    assert "residual" not in said(made).records


def test_an_autoencoder_in_float16_stays_so() -> None:
    made = lcm()
    made.pipe.vae.half()
    result = restored(made, simulated(Mask(0.5), drawn(1, 3, 64, 64), 0.02), image=made_half())
    assert bool(result.isfinite().all())
    assert made.pipe.vae.dtype == torch.float16


def made_half() -> Any:
    image = lcm().pipe
    image.vae.half()
    return image


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("StableDiffusionXLPipeline", "sdxl"),
        ("FluxPipeline", "flux"),
        ("LatentConsistencyModelPipeline", "sd"),
        ("PixArtAlphaPipeline", "pixart"),
    ],
)
def test_other_families(name: str, module: str) -> None:
    """It runs, and the measurement matters."""
    made = tiny(name, module, output_type="latent")
    for scale in ("guidance_scale", "true_cfg_scale"):
        made.kwargs.pop(scale, None)
    problem = simulated(downsample(2), drawn(1, 3, made.kwargs["height"], made.kwargs["width"]))
    found = [restored(made, problem, gamma=gamma, few_step=True) for gamma in (1e-6, 1e4)]
    assert bool(found[1].isfinite().all())
    assert float((found[1] - found[0]).abs().max()) > 1e-3
    assert said(made).records["residual"].shape == (1,)


# bad input and remarks -------------------------------------------------------------------------------------------------------------------


def refused(made: Any, error: type[Exception], told: str, problem: Problem, **knobs: Any) -> None:
    """Before the denoiser is asked."""
    asked: list[int] = []
    model = getattr(made.pipe, "unet", None) or made.pipe.transformer
    model.register_forward_hook(lambda *_: asked.append(1))
    with pytest.raises(error, match=told):
        load_pipeline(made.pipe, plugins={"lvtino": {"problem": problem, **knobs}})(**made.kwargs)
    assert not asked


def test_what_is_not_linear_has_no_proximal_step() -> None:
    refused(ddim(), Unsupported, "Phase is not linear.*red_diff", simulated(Phase(2), drawn(1, 3, 16, 16)))


@pytest.mark.parametrize(
    ("shape", "told"),
    [
        ((1, 3, 32, 32), r"makes videos \[n, c, frames, h, w\]"),
        ((1, 3, 8, 32, 32), r"of 8 frames, and the autoencoder of WanPipeline takes 4 k \+ 1: 9"),
        ((1, 3, 9, 32, 32), "ask the pipeline for that size"),
        ((3, 3, 5, 32, 32), "3 measurements for 1 pictures"),
        ((1, 1, 5, 32, 32), r"pictures with 1 channel\(s\)"),
    ],
)
def test_videos_of_another_kind(shape: tuple[int, ...], told: str) -> None:
    refused(wan(), ConfigError, told, Problem(Identity(), torch.zeros(shape)))


def test_a_video_for_a_picture_pipeline() -> None:
    refused(lcm(), ConfigError, r"makes pictures \[n, c, h, w\]", Problem(Identity(), torch.zeros(1, 3, 5, 64, 64)))


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"gamma": 0.0}, "gamma.*above 0"),
        ({"gamma": ()}, "gamma"),
        ({"gamma": (1.0, float("nan"))}, "gamma"),
        ({"delta": -1.0}, "delta"),
        ({"times": (100.0, 500.0)}, "times.*falling"),
        ({"image_times": ()}, "image_times"),
        ({"start_gamma": 0.0}, "start_gamma"),
        ({"encoding": "none"}, "encoding"),
        ({"times": (1200.0, 500.0)}, "times.*whole numbers from 0 to 999"),
        ({"times": (900.5, 500.0)}, "times.*whole numbers from 0 to 999"),
        ({"image_times": (1000, 200), "image": "own"}, "image_times.*0 to 999"),
        ({"image_prompt": ("a", "b"), "image": "own"}, "2 texts for a call with 1 prompts"),
        ({"image": 3}, "image.*give a bundled name"),
    ],
)
def test_knobs_that_are_refused(knobs: dict[str, Any], told: str) -> None:
    made = lcm()
    if "times" in knobs:
        made.kwargs.pop("num_inference_steps")
    knobs = {name: lcm().pipe if value == "own" else value for name, value in knobs.items()}
    refused(made, ConfigError, told, Problem(Identity(), torch.zeros(1, 3, 64, 64)), **knobs)


@pytest.mark.parametrize(
    ("knobs", "told"),
    [
        ({"image_gamma": 3.0}, "without effect here: image_gamma "),
        ({"image_times": (5,), "image_prompt": "a"}, "without effect here: image_times, image_prompt "),
        ({"delta": 2.0, "gamma": 3.0}, "without effect here: delta "),
        ({"delta": 2.0, "gamma": 3.0, "image_gamma": 2.0, "image": "own"}, "without effect here: delta "),
        ({"delta": 2.0, "gamma": 3.0, "image": "own"}, None),
        ({"gamma": (1.0,) * 5}, "longer than a run of 4 steps: gamma (5 values, 4 are used)"),
        ({"gamma": (1.0,) * 4, "end": "prediction"}, "longer than a run of 4 steps: gamma (4 values, 3 are used)"),
        ({"delta": (1.0,) * 5}, "delta (5 values, 4 are used)"),
        ({"image": "own", "image_times": (9, 8, 7, 6), "image_gamma": (1.0,) * 4}, "4 steps: image_times (4 values, 3 are used)"),
        ({"gamma": (1.0,) * 4}, None),
    ],
)
def test_knobs_that_say_nothing_are_told_of(knobs: dict[str, Any], told: str | None) -> None:
    made = lcm()
    knobs = {name: lcm().pipe if value == "own" else value for name, value in knobs.items()}
    restored(made, Problem(Identity(), torch.zeros(1, 3, 64, 64)), **knobs)
    assert len(said(made).notes) == (told is not None)
    assert all(told in note for note in said(made).notes)


def test_image_models_that_are_refused() -> None:
    flow = wan().pipe
    refused(lcm(), Unsupported, "WanPipeline is of the family 'wan'", Problem(Identity(), torch.zeros(1, 3, 64, 64)), image=flow)
    made = ddim()
    refused(made, ConfigError, "16x20 pixels.*multiples of 8", Problem(Identity(), torch.zeros(1, 3, 16, 20)), image=lcm().pipe)


def test_steps_and_guidance_that_contradict() -> None:
    problem = Problem(Identity(), torch.zeros(1, 3, 64, 64))
    made = lcm()
    made.kwargs["guidance_scale"] = 7.5
    refused(made, ConfigError, "guidance_scale = 7.5.*guided=True", problem)
    refused(lcm(), ConfigError, "num_inference_steps = 4, and what was distilled knows 2", problem, times=(900.0, 500.0))
    made = lcm()
    made.pipe.scheduler = HeunDiscreteScheduler.from_config(made.pipe.scheduler.config)
    refused(made, Unsupported, "asks more than once for a step", problem)


def test_a_model_that_may_not_be_distilled_is_remarked_on() -> None:
    problem = Problem(Identity(), torch.zeros(1, 3, 64, 64))
    made = tiny("StableDiffusionPipeline", "sd", guidance_scale=1.0, output_type="latent")
    restored(made, problem)
    (note,) = said(made).notes
    assert "nothing says that this pipeline is a few-step model (DDIMScheduler)" in note
    restored(made, problem, few_step=True)
    assert said(made).notes == []
    restored(made, problem, few_step=True, image=tiny("StableDiffusionPipeline", "sd").pipe)
    assert said(made).notes == []
    restored(lcm_made := lcm(), problem, image=tiny("StableDiffusionPipeline", "sd").pipe)
    assert "that image is a few-step model" in said(lcm_made).notes[0]


def test_defaults() -> None:
    config = Lvtino().config
    assert (config.delta, config.gamma, config.start_gamma, config.times, config.end, config.encoding) == (
        1.0,
        None,
        200.0,
        None,
        None,
        "plain",
    )


def test_contract() -> None:
    run_contract("lvtino", families=["pixel"])


def test_the_last_proximal_step_reaches_pipelines_that_decode_the_schedulers_second_answer() -> None:
    made = tiny("LatentConsistencyModelPipeline", "sd", output_type="latent")
    problem = simulated(downsample(4), drawn(1, 3, 64, 64))
    ends = [restored(made, problem, end=end) for end in ("prox", "prediction")]
    assert float((ends[0] - ends[1]).abs().max()) > 1e-3
