"""Bottleneck Sampling against its equations, and its stages as the denoiser, the scheduler and the user see them."""

from __future__ import annotations

import functools
import importlib
import itertools
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Conflict, Effects, Paper, Plugin, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.methods.predictions import SignalNoise, clean_estimate, levels_at, noise_estimate, prediction_kind
from diffgraft_bottleneck_sampling import PRESETS, BottleneckSampling, Grid, method, plms_tail
from diffusers import DDIMScheduler, FluxPipeline, LTXPipeline, QwenImagePipeline
from PIL import Image

TWO = {"shares": (1, 1), "strengths": (1, 0.5), "shifts": "own"}
HIGH_LOW_HIGH = {"scales": (1.0, 0.5, 1.0), "shares": (1.0, 2.0, 1.0)}


def new(family, name=None):
    family = registry.families()[family]
    module, function = family.tiny.split(":")
    made = getattr(importlib.import_module(module), function)(name or family.pipelines[0], 0)
    made.kwargs["output_type"] = "latent"
    return made


@functools.cache
def tiny(family, name=None):
    """One pipeline for all tests; ``call`` takes its plugins off again, and a test that changes the scheduler puts it back."""
    return new(family, name)


def call(made, plugins, seed=0, **kwargs):
    """(output, report) of one call with these plugins."""
    pipe = load_pipeline(made.pipe, plugins=plugins)
    try:
        out = pipe(**{"generator": torch.Generator().manual_seed(seed), **made.kwargs, **kwargs})[0]
        return out, pipe.plugins.report()
    finally:
        pipe.plugins.clear()


def bottleneck(made, knobs, **kwargs):
    return call(made, [("bottleneck_sampling", knobs)], **kwargs)[0]


class Watch(Plugin):
    """Inside the others: records every denoiser call, and may answer it."""

    name = "watch"
    paper = Paper("a test", "0000.00000", "nothing")
    families = ("*",)
    neutral = {}  # noqa: RUF012
    effects = Effects(edits=frozenset({"latents"}))

    def __init__(self, answer=None):
        super().__init__()
        self.answer = answer
        self.seen = []

    def denoise(self, call, next):
        out = self.answer(call) if self.answer else next(call)
        seen = {"latents": call.latents.clone(), "input": call.sample.clone(), "step": call.step, "out": out.clone()}
        seen["levels"] = levels_at(call.family, call.pipe.scheduler, call.step.t, call.step.sigma, out.device)
        self.seen.append(SimpleNamespace(**seen, arguments=call.arguments()))
        return out

    def step(self, call, next):
        out = next(call)
        self.seen[-1].after = out.sample.clone()
        return out


def watched(made, knobs, answer=None, **kwargs):
    """(output, what the denoiser saw)"""
    watch = Watch(answer)
    out, _ = call(made, [("bottleneck_sampling", knobs), watch], **kwargs)
    return out, watch.seen


class Using:
    """``with Using(made, scheduler):`` another scheduler for a while."""

    def __init__(self, made, name, **options):
        self.made, self.old = made, made.pipe.scheduler
        self.new = getattr(diffusers, name).from_config(self.old.config, **options)

    def __enter__(self):
        self.made.pipe.scheduler = self.new

    def __exit__(self, *_):
        self.made.pipe.scheduler = self.old


# stages -----------------------------------------------------------------------------------------------------------------------------


def test_the_presets_are_the_papers_tables():
    """FLUX.1-dev 1024 / 512 / 1024 and HunyuanVideo 720x1280 / 544x960 / 720x1280: w, N and s of each stage."""
    assert BottleneckSampling().config.of_stages("strengths") == (1, 0.8, 0.6)
    assert method.stage_steps(34, PRESETS["flux"]["shares"]) == (6, 20, 8)
    assert method.stage_steps(44, PRESETS["hunyuan_video"]["shares"]) == (4, 24, 16)
    assert (PRESETS["flux"]["shifts"], PRESETS["hunyuan_video"]["shifts"]) == ((9, 6, 9), (7, 9, 9))
    assert [method.stage_side(side, 0.5, 16) for side in (1024, 1024)] == [512, 512]
    assert [method.stage_side(side, PRESETS["hunyuan_video"]["scales"][1], 16) for side in (720, 1280)] == [544, 960]


@pytest.mark.parametrize("shares", [(1,), (1, 1), (6, 20, 8), (1, 1000, 1), (0.001, 1), (3, 1, 4, 1, 5)])
def test_the_stages_share_all_steps(shares):
    for T in range(len(shares), 60):
        steps = method.stage_steps(T, shares)
        assert len(steps) == len(shares)
        assert sum(steps) == T
        assert min(steps) >= 1
        if min(shares) * T >= 2 * sum(shares):  # nobody needs the step that everyone gets at least
            assert np.abs(np.cumsum(steps) - T * np.cumsum(shares) / sum(shares)).max() <= 0.5


def test_fewer_steps_than_stages_are_refused():
    with pytest.raises(ValueError, match="3 stages need at least 3 steps, not 2"):
        method.stage_steps(2, (1, 1, 1))
    with pytest.raises(ConfigError, match="at least 3 steps, not 2; use more steps"):
        bottleneck(tiny("flux"), HIGH_LOW_HIGH, num_inference_steps=2)


def test_only_steps_below_the_strength_explain_the_published_ratios():
    """FLUX by the RALU paper, N = 4, 12, 5 and 3, 8, 4 against 50 full steps: 5.24x and 6.9x of the FLOPs.

    A step at half the sides costs 0.29 of a full one there (512 text tokens; attention a fifth of the FLOPs of 4608 tokens).
    """

    def ratio(counts, strengths):
        return 50 / method.work([n * w for n, w in zip(counts, strengths, strict=True)], (1, 0.29, 1), 1)

    w = PRESETS["flux"]["strengths"]
    assert ratio((4, 12, 5), w) == pytest.approx(5.24, rel=0.05)
    assert ratio((3, 8, 4), w) == pytest.approx(6.9, rel=0.05)
    assert ratio((4, 12, 5), (1, 1, 1)) < 4.1
    assert ratio((3, 8, 4), (1, 1, 1)) < 5.5
    published = 3719.50 / 1234.39  # the paper's own FLOPs (Table 1, "x 3")
    assert ratio((6, 20, 8), w) == pytest.approx(published, rel=0.08)
    assert ratio((6, 20, 8), (1, 1, 1)) < published / 1.18


def test_the_papers_flops_of_hunyuan_video_are_nearer_to_the_steps_below_the_strength():
    """Table 2, "x 2.5": 232756 of 605459 TFLOPs, 38 %. Neither way of counting gives it; the steps below w_i 44 %, all N_i 57 %.

    119056 and 67576 tokens a step, 256 of text; attention in 60 layers of width 3072 is 86 % of the FLOPs at full size.
    """
    full, small = 33 * 45 * 80 + 256, 33 * 34 * 60 + 256
    attention = 4 * 60 * 3072 * full**2 / (605459.49e12 / 50)
    assert attention == pytest.approx(0.86, abs=0.01)
    step = attention * (small / full) ** 2 + (1 - attention) * small / full
    counts = PRESETS["hunyuan_video"]["shares"]
    part = method.work([n * w for n, w in zip(counts, PRESETS["hunyuan_video"]["strengths"], strict=True)], (1, step, 1), 50)
    assert (part, method.work(counts, (1, step, 1), 50)) == pytest.approx((0.44, 0.57), abs=0.005)
    assert part > 232756.28 / 605459.49
    assert method.work((6, 16, 5), (4, 1, 4), 34) == pytest.approx((6 + 16 / 4 + 5) / 34)
    assert method.work((6, 16, 5), (4, 1, 4), 34, 2) == pytest.approx((6 + 16 / 16 + 5) / 34)


# scheduler re-shifting ----------------------------------------------------------------------------------------------------------------


def test_a_shift_multiplies_the_noise_to_signal_ratio():
    sigma = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    for s in (0.3, 1.0, 3.0, 9.0):
        out = method.shifted(sigma, s)
        torch.testing.assert_close(out / (1 - out), s * sigma / (1 - sigma))
    torch.testing.assert_close(method.shifted(method.shifted(sigma, 3), 2), method.shifted(sigma, 6))
    assert method.shifted(torch.tensor([0.0, 1.0]), 5).tolist() == [0, 1]


@pytest.mark.parametrize(("w", "s", "first"), [(1, 9, 1.0), (0.8, 6, 0.96), (0.6, 9, 0.93103), (0.8, 9, 0.97297), (0.7, 9, 0.95455)])
def test_a_stage_begins_at_the_level_of_its_strength(w, s, first):
    """sigma_i = s w / (1 + (s - 1) w): FLUX's third stage at 0.931. And it falls in even times to 0."""
    sigmas = method.stage_sigmas(w, s, 8)
    assert float(sigmas[0]) == pytest.approx(first, abs=1e-5)
    assert float(sigmas[-1]) == 0
    t = sigmas / (s - (s - 1) * sigmas)
    torch.testing.assert_close(t, w * torch.linspace(1, 0, 9, dtype=torch.float64))
    as_level = method.stage_sigmas(method.time_of(w, s), s, 8)
    assert float(as_level[0]) == pytest.approx(w)
    assert bool((as_level[:-1] > as_level[1:]).all())


# noise re-introduction --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(0.7, 0.3), (0.6, 0.8), (1.0, 7.5)])
def test_the_signal_to_noise_ratio_after_a_transition_is_the_schedules(levels):
    a, sigma = map(torch.tensor, levels)
    generator = torch.Generator().manual_seed(0)
    x0 = torch.randn(1, 4, 16, 16, generator=generator).repeat(4000, 1, 1, 1)
    x = method.renoised(x0, torch.randn(x0.shape, generator=generator), a, sigma)
    assert (x.mean(0) - a * x0[0]).abs().max() < 5 * sigma / 4000**0.5  # signal
    assert x.var(0).mean() == pytest.approx(float(sigma) ** 2, rel=1e-2)  # noise


@pytest.mark.parametrize(("sigma", "after"), [(0.9, 0.95), (0.5, 0.9), (0.1, 0.05)])
def test_on_gaussian_data_a_transition_loses_the_variance_that_the_estimate_lacks(sigma, after):
    """x0-hat = E[x0 | x] has variance m = (a d^2)^2 / (a^2 d^2 + s^2) < d^2: what the denoiser does not know yet is gone."""
    d, n = 1.3, 400_000
    generator = torch.Generator().manual_seed(0)
    a = 1 - sigma
    x = a * d * torch.randn(n, generator=generator) + sigma * torch.randn(n, generator=generator)
    x0_hat = x * a * d**2 / (a**2 * d**2 + sigma**2)
    v = (x - x0_hat) / sigma  # the exact flow prediction eps - x0
    found = clean_estimate(x, v, SignalNoise(torch.tensor(a), torch.tensor(sigma)), "flow")
    torch.testing.assert_close(found, x0_hat, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(x - sigma * v, x0_hat, rtol=1e-4, atol=1e-4)  # what Euler's last step ends in
    x = method.renoised(found, torch.randn(n, generator=generator), torch.tensor(1 - after), torch.tensor(after))
    m = (a * d**2) ** 2 / (a**2 * d**2 + sigma**2)
    assert x.var() == pytest.approx((1 - after) ** 2 * m + after**2, rel=1e-2)
    assert x.var() < (1 - after) ** 2 * d**2 + after**2


# resizing -----------------------------------------------------------------------------------------------------------------------------

PIL_FILTERS = {"lanczos": "LANCZOS", "bicubic": "BICUBIC", "bilinear": "BILINEAR", "box": "BOX"}


@pytest.mark.parametrize("kernel", method.KERNELS)
@pytest.mark.parametrize(("size", "to"), [((16, 16), (8, 8)), ((8, 8), (16, 16)), ((12, 20), (9, 26)), ((10, 7), (10, 7))])
def test_resizing_is_pillows(kernel, size, to):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0))
    picture = Image.fromarray(x.numpy()).resize(to[::-1], getattr(Image.Resampling, PIL_FILTERS[kernel]))
    torch.testing.assert_close(method.resize(x, *to, kernel), torch.from_numpy(np.array(picture)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kernel", method.KERNELS)
def test_a_constant_survives_down_and_up(kernel):
    x = torch.full((2, 3, 5, 12, 20), 1.7)
    down = method.resize(x, 6, 10, kernel)
    assert down.shape == (2, 3, 5, 6, 10)  # frames stay
    torch.testing.assert_close(method.resize(down, 12, 20, kernel), x)


def test_every_frame_and_channel_is_resized_alone():
    x = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    out = method.resize(x, 4, 4, "lanczos")
    torch.testing.assert_close(out[1, 2, 3], method.resize(x[1, 2, 3], 4, 4, "lanczos"))
    assert method.resize(x.bfloat16(), 4, 4, "box").dtype == torch.bfloat16


@pytest.mark.parametrize("pipeline", [FluxPipeline, QwenImagePipeline])
def test_two_by_two_tokens_are_those_of_the_pipelines(pipeline):
    x = torch.randn(2, 3, 8, 12, generator=torch.Generator().manual_seed(0))
    tokens = pipeline._pack_latents(x, 2, 3, 8, 12)
    assert torch.equal(method.unpack(tokens, 8, 12, 2)[:, 0], x)
    assert torch.equal(method.pack(x[:, None], 2), tokens)


def test_video_tokens_are_those_of_the_pipeline():
    x = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))  # channels before frames
    tokens = LTXPipeline._pack_latents(x, 1, 1)
    assert torch.equal(method.unpack(tokens, 4, 6, 1), x.transpose(1, 2))
    assert torch.equal(method.pack(x.transpose(1, 2), 1), tokens)


@pytest.mark.parametrize(
    ("side", "scale", "multiple", "wanted"),
    [(1024, 0.5, 16, 512), (720, 0.5, 16, 368), (720, 0.75, 8, 544), (16, 0.5, 16, 16), (16, 0.4, 16, 0)],
)
def test_stage_sides_are_the_nearest_multiples(side, scale, multiple, wanted):
    assert method.stage_side(side, scale, multiple) == wanted


@pytest.mark.parametrize("family", ["sd", "sdxl", "sd3", "pixart", "cogvideox", "wan", "ltx", "animatediff", "flux", "qwen_image"])
def test_the_size_that_nobody_gave_is_the_pipelines_own(family):
    pipe = tiny(family).pipe
    stub = SimpleNamespace(pipe=pipe, family=registry.families()[family], get=lambda name: None)
    usual = {"wan": (480, 832), "ltx": (512, 704), "flux": (1024, 1024), "qwen_image": (1024, 1024), "cogvideox": (32, 32)}
    grid = Grid.of(stub)
    assert grid.full == usual.get(family, (64, 64))
    assert grid.factor * grid.patch == {"flux": 16, "qwen_image": 16, "sd3": 16, "pixart": 16, "wan": 16, "cogvideox": 16}.get(family, 8)


# a stage is image to image -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "other", "scheduler"),
    [
        ("sd", "StableDiffusionImg2ImgPipeline", "DDIMScheduler"),
        ("sd", "StableDiffusionImg2ImgPipeline", "EulerDiscreteScheduler"),
        ("sd", "StableDiffusionImg2ImgPipeline", "DPMSolverMultistepScheduler"),
        ("sdxl", "StableDiffusionXLImg2ImgPipeline", "EulerDiscreteScheduler"),
        ("flux", "FluxImg2ImgPipeline", None),
        ("sd3", "StableDiffusion3Img2ImgPipeline", None),
    ],
)
def test_a_later_stage_is_diffusers_own_image_to_image_at_that_strength(family, other, scheduler):
    """Two stages of one size are the pipeline, and then its image to image from what came out, with strength w and the same noise."""
    made = new(family)
    if scheduler:
        made.pipe.scheduler = getattr(diffusers, scheduler).from_config(made.pipe.scheduler.config)
    made.kwargs["num_inference_steps"] = 10
    knobs = {"scales": (1, 1), "shares": (1, 1), "strengths": (1, 0.6), "shifts": "own"}
    found, seen = watched(made, knobs, seed=3)
    assert [s.step.total for s in seen if s.step.index == 0][-1] == 3
    first = made.pipe(**{**made.kwargs, "num_inference_steps": 5}, generator=torch.Generator().manual_seed(3))[0]
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, *first.shape[1:] if family != "flux" else (4, 8, 8), generator=generator)
    pipe = getattr(diffusers, other)(**made.pipe.components)
    pipe.set_progress_bar_config(disable=True)
    kwargs = {**made.kwargs, "num_inference_steps": 5, "strength": 0.6, "generator": generator}
    if family == "flux":  # takes no finished latents as its picture
        eps = torch.randn(1, 4, 8, 8, generator=generator)
        eps = FluxPipeline._pack_latents(eps, 1, 4, 8, 8)
        sigma = seen[-3 * (len(seen) // 8)].step.sigma
        kwargs |= {"latents": sigma * eps + (1 - sigma) * first, "image": torch.zeros(1, 3, 64, 64)}
    else:
        kwargs |= {"image": first}
        kwargs = {key: value for key, value in kwargs.items() if key not in ("height", "width")}
    wanted = pipe(**kwargs)[0]
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


# what the denoiser sees -------------------------------------------------------------------------------------------------------------


def test_high_low_high_on_stable_diffusion():
    made = tiny("sd")
    _, seen = watched(made, {}, num_inference_steps=17)
    assert [tuple(s.input.shape) for s in seen] == [(2, 4, 8, 8)] * 3 + [(2, 4, 4, 4)] * 8 + [(2, 4, 8, 8)] * 2
    assert [(s.step.index, s.step.total) for s in seen] == [(i, n) for n in (3, 8, 2) for i in range(n)]
    wanted = []
    for N, n in ((3, 3), (10, 8), (4, 2)):
        made.pipe.scheduler.set_timesteps(N)
        wanted += made.pipe.scheduler.timesteps[-n:].tolist()
    assert [int(s.step.t) for s in seen] == wanted


def test_high_low_high_on_packed_latents_with_the_papers_settings():
    made = tiny("flux")
    _, seen = watched(made, {}, num_inference_steps=34, true_cfg_scale=1.0)
    assert [tuple(s.input.shape) for s in seen] == [(1, 16, 16)] * 6 + [(1, 4, 16)] * 16 + [(1, 16, 16)] * 5
    assert [s.arguments["img_ids"].shape[0] for s in seen] == [16] * 6 + [4] * 16 + [16] * 5
    wanted = [method.stage_sigmas(w, s, n)[:-1] for w, s, n in ((1, 9, 6), (0.8, 6, 16), (0.6, 9, 5))]
    sigmas = torch.stack([s.step.sigma for s in seen])
    torch.testing.assert_close(sigmas, torch.cat(wanted).float())
    assert float(sigmas[22]) == pytest.approx(0.931, abs=1e-3)
    torch.testing.assert_close(torch.stack([s.step.t for s in seen]), sigmas * 1000)  # what the denoiser is told


def test_all_steps_of_a_stage_may_run_below_its_strength():
    for family in ("flux", "sd"):
        off = {"true_cfg_scale": 1.0} if family == "flux" else {"guidance_scale": 1.0}
        _, seen = watched(tiny(family), {"runs": "whole"}, num_inference_steps=17, **off)
        assert [s.step.total for s in seen if s.step.index == 0] == [3, 10, 4]
        if family == "sd":  # 10 / 0.8 and 4 / 0.6 steps, of which the last 10 and 4
            tiny(family).pipe.scheduler.set_timesteps(13)
            assert int(seen[3].step.t) == int(tiny(family).pipe.scheduler.timesteps[3])


def test_strengths_may_be_levels():
    """Times .4 and .143: of 20 and 8 steps 8 and 1 lie below them, as far apart as in a whole run."""
    _, seen = watched(tiny("flux"), {"strength_of": "sigma"}, num_inference_steps=34, true_cfg_scale=1.0)
    assert [(float(s.step.sigma), s.step.total) for s in seen if s.step.index == 0] == [
        (1, 6),
        (pytest.approx(0.8), 8),
        (pytest.approx(0.6), 1),
    ]
    t = [float(s.step.sigma / (6 - 5 * s.step.sigma)) for s in seen[6:14]]
    assert t == pytest.approx([0.4 - i / 20 for i in range(8)])


# a whole run, once more ---------------------------------------------------------------------------------------------------------------


def pillow(x, side):
    """Every map of ``x`` [1, C, h, w] by Pillow's Lanczos."""
    maps = [Image.fromarray(plane.numpy()).resize((side, side), Image.Resampling.LANCZOS) for plane in x[0].float()]
    return torch.from_numpy(np.stack([np.asarray(each) for each in maps]))[None]


def asked_with(made, name, side):
    """The arguments that the pipeline gives its denoiser at this size."""
    given = {}
    handle = getattr(made.pipe, name).register_forward_pre_hook(lambda m, a, k: given.update(k), with_kwargs=True)
    made.pipe(**{**made.kwargs, "height": side, "width": side, "num_inference_steps": 2})
    handle.remove()
    return given


@torch.no_grad()
def test_a_whole_run_on_flux_is_the_one_of_the_equations():
    """At T = 12: N = 2, 7, 3, of which 2, 6 and 2 run. Noise, Pillow's resizing, shifted times and Euler's method, without the plugin."""
    made, generator, x0 = new("flux"), torch.Generator().manual_seed(5), None
    made.kwargs["true_cfg_scale"] = 1.0
    for side, w, s, n in ((8, 1.0, 9, 2), (4, 0.8, 6, 6), (8, 0.6, 9, 2)):
        given = asked_with(made, "transformer", 8 * side)
        times = [w * (n - i) / n for i in range(n + 1)]
        sigmas = [s * t / (1 + (s - 1) * t) for t in times]
        eps = torch.randn((1, 4, side, side), generator=generator)
        x = eps if x0 is None else (1 - sigmas[0]) * pillow(x0, side) + sigmas[0] * eps
        x = FluxPipeline._pack_latents(x, 1, 4, side, side)
        for here, there in itertools.pairwise(sigmas):
            told = torch.full_like(given["timestep"], here)
            x = x + (there - here) * made.pipe.transformer(**{**given, "hidden_states": x, "timestep": told, "return_dict": False})[0]
        x0 = FluxPipeline._unpack_latents(x, 8 * side, 8 * side, 8)
    found = bottleneck(made, {}, num_inference_steps=12, seed=5)
    torch.testing.assert_close(found, x, rtol=0, atol=1e-5 * float(x.abs().max()))


@torch.no_grad()
def test_a_whole_run_on_stable_diffusion_is_the_one_of_the_equations():
    """The same with DDIM on its own grid: the last 2 of 2, 6 of 7 and 2 of 3 steps, x = sqrt(abar) x0 + sqrt(1 - abar) eps between."""
    made, generator, x0 = new("sd"), torch.Generator().manual_seed(5), None
    made.pipe.scheduler = DDIMScheduler.from_config(made.pipe.scheduler.config, clip_sample=False)
    made.kwargs["guidance_scale"] = 1.0
    scheduler = made.pipe.scheduler
    abar = [*scheduler.alphas_cumprod.double().tolist(), float(scheduler.final_alpha_cumprod)]  # the last: before the first timestep
    for side, N, n in ((8, 2, 2), (4, 7, 6), (8, 3, 2)):
        given = asked_with(made, "unet", 8 * side)
        stride = 1000 // N
        times = [scheduler.config.steps_offset + stride * i for i in range(n)][::-1]
        eps = torch.randn((1, 4, side, side), generator=generator).double()
        x = eps if x0 is None else abar[times[0]] ** 0.5 * pillow(x0, side) + (1 - abar[times[0]]) ** 0.5 * eps
        for t in times:
            e = made.pipe.unet(x.float(), t, encoder_hidden_states=given["encoder_hidden_states"], return_dict=False)[0].double()
            here, there = abar[t], abar[max(t - stride, -1)]
            x = there**0.5 * (x - (1 - here) ** 0.5 * e) / here**0.5 + (1 - there) ** 0.5 * e
        x0 = x
    found = bottleneck(made, {}, num_inference_steps=12, seed=5)
    torch.testing.assert_close(found, x.float(), rtol=0, atol=1e-5 * float(x.abs().max()))


def test_the_schedulers_own_shift_is_that_of_each_stages_size():
    made = tiny("flux")
    knobs = {"scales": (1, 0.5, 1), "shares": (1, 2, 1), "strengths": (1, 0.5, 0.5), "shifts": "own"}
    _, seen = watched(made, knobs, num_inference_steps=16, true_cfg_scale=1.0)
    wanted = []
    for tokens, N, n in ((16, 4, 4), (4, 8, 4), (16, 4, 2)):
        linear = torch.linspace(1, 1 / N, N)
        mu = 0.5 + (tokens - 256) * (1.15 - 0.5) / (4096 - 256)
        wanted.append(method.shifted(linear, float(np.exp(mu)))[-n:])
    torch.testing.assert_close(torch.stack([s.step.sigma for s in seen]), torch.cat(wanted))


def test_one_stage_with_a_shift_is_the_reshifted_run():
    one = {"scales": (1.0,), "shares": (1.0,), "strengths": (1.0,), "shifts": (2.0,)}
    _, seen = watched(tiny("flux"), one, num_inference_steps=8, true_cfg_scale=1.0)
    torch.testing.assert_close(torch.stack([s.step.sigma for s in seen]), method.stage_sigmas(1, 2, 8)[:-1].float())


@pytest.mark.parametrize(
    ("family", "scheduler"), [("sd", None), ("sd", "EulerDiscreteScheduler"), ("sd", "DPMSolverMultistepScheduler"), ("flux", None)]
)
def test_a_stage_begins_from_the_resized_estimate_and_the_users_noise(family, scheduler):
    made = new(family)
    if scheduler:
        made.pipe.scheduler = getattr(diffusers, scheduler).from_config(made.pipe.scheduler.config)
    off = {"true_cfg_scale": 1.0} if family == "flux" else {"guidance_scale": 1.0}
    _, seen = watched(made, HIGH_LOW_HIGH, seed=3, num_inference_steps=4, **off)
    generator = torch.Generator().manual_seed(3)
    torch.randn(1, 4, 8, 8, generator=generator)  # the pipeline's own
    kind = prediction_kind(registry.families()[family], made.pipe.scheduler)
    for last, first, old, side in ((0, 1, 8, 4), (2, 3, 4, 8)):
        before, after = seen[last], seen[first]
        x0 = before.after
        if kind == "flow":
            torch.testing.assert_close(x0, clean_estimate(before.latents, before.out, before.levels, kind), rtol=1e-4, atol=1e-4)
        if family == "flux":
            x0 = FluxPipeline._unpack_latents(x0, old * 8, old * 8, 8)
        x0 = method.resize(x0, side, side, "lanczos")
        eps = torch.randn(x0.shape, generator=generator)
        x = after.levels.a * x0 + after.levels.s * eps
        if family == "flux":
            x = FluxPipeline._pack_latents(x, 1, 4, side, side)
        torch.testing.assert_close(after.latents, x, rtol=1e-4, atol=1e-4)
        scaled = x / (1 + after.levels.s**2) ** 0.5 if scheduler == "EulerDiscreteScheduler" else x
        torch.testing.assert_close(after.input, scaled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("family", "shapes"), [("wan", [(1, 8, 2, 4, 4), (1, 8, 2, 2, 2)]), ("cogvideox", [(2, 3, 4, 4, 4), (2, 3, 4, 2, 2)])]
)
def test_of_a_video_only_height_and_width_change(family, shapes):
    out, seen = watched(tiny(family), HIGH_LOW_HIGH)
    per_step = len(seen) // 4
    assert [tuple(s.input.shape) for s in seen[::per_step]] == [shapes[0], shapes[1], shapes[1], shapes[0]]
    assert torch.isfinite(out).all()


def test_sizes_are_rounded_to_what_the_pipeline_can_do():
    _, seen = watched(tiny("sd"), HIGH_LOW_HIGH, height=72, width=40)
    assert [tuple(s.input.shape[2:]) for s in seen] == [(9, 5), (5, 3), (5, 3), (9, 5)]
    _, seen = watched(tiny("sd"), {**HIGH_LOW_HIGH, "multiple": 16}, height=96, width=64)
    assert [tuple(s.input.shape[2:]) for s in seen] == [(12, 8), (6, 4), (6, 4), (12, 8)]


def test_a_run_may_begin_low():
    out, seen = watched(tiny("flux"), {"scales": (0.5, 1), "shares": (1, 1), "strengths": (1, 0.6), "shifts": "own"}, true_cfg_scale=1.0)
    assert [s.input.shape[1] for s in seen] == [4, 4, 16]  # 0.6 of two steps is one
    assert out.shape == (1, 16, 16)


def test_sdxl_is_told_the_stages_sizes():
    made = tiny("sdxl")
    _, seen = watched(made, HIGH_LOW_HIGH)
    ids = [s.arguments["added_cond_kwargs"]["time_ids"][-1].tolist() for s in seen]
    assert ids == [[64, 64, 0, 0, 64, 64], *[[32, 32, 0, 0, 32, 32]] * 2, [64, 64, 0, 0, 64, 64]]
    _, seen = watched(made, HIGH_LOW_HIGH, original_size=(128, 96), target_size=(64, 64), crops_coords_top_left=(8, 0))
    ids = [s.arguments["added_cond_kwargs"]["time_ids"][-1].tolist() for s in seen]
    assert ids == [[128, 96, 8, 0, 64, 64], *[[64, 48, 4, 0, 32, 32]] * 2, [128, 96, 8, 0, 64, 64]]


@pytest.mark.parametrize("scheduler", [None, "EulerDiscreteScheduler"])
@pytest.mark.parametrize(
    ("family", "name"), [("sd", "StableDiffusionControlNetPipeline"), ("animatediff", "AnimateDiffControlNetPipeline")]
)
def test_a_controlnet_sees_what_the_denoiser_sees(family, name, scheduler):
    made = new(family, name)
    if scheduler:
        made.pipe.scheduler = getattr(diffusers, scheduler).from_config(made.pipe.scheduler.config)
    given = []

    class WatchControl(Watch):
        name = "watch_control"

        def control(self, call, next):
            given.append(call["sample"].clone())
            return next(call)

    watch = WatchControl()
    call(made, [("bottleneck_sampling", HIGH_LOW_HIGH), watch])
    seen = watch.seen
    assert len(given) == len(seen) == 4
    for control, denoiser in zip(given, seen, strict=True):
        x = denoiser.input.transpose(1, 2).flatten(0, 1) if denoiser.input.ndim == 5 else denoiser.input
        torch.testing.assert_close(control, x)


# schedulers ---------------------------------------------------------------------------------------------------------------------------

SCHEDULERS = [
    ("DDIMScheduler", {"set_alpha_to_one": True}),
    ("DDPMScheduler", {}),
    ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": True}),
    ("EulerDiscreteScheduler", {}),
    ("EulerAncestralDiscreteScheduler", {}),
    ("HeunDiscreteScheduler", {}),
    ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ("UniPCMultistepScheduler", {}),
    ("LCMScheduler", {}),
]


@pytest.mark.parametrize(("name", "options"), SCHEDULERS)
@pytest.mark.parametrize("T", [5, 12])
def test_every_scheduler_restarts_in_its_part_of_the_schedule(name, options, T):
    """A denoiser that knows the answer (constant maps, which resizing keeps) gets there only if solver and stage agree on every level."""
    made = tiny("sd")

    def answer(call):
        levels = levels_at(call.family, call.pipe.scheduler, call.step.t, call.step.sigma, call.sample.device)
        return noise_estimate(call.latents, torch.full_like(call.latents, 0.7), levels, "sample")

    with Using(made, name, **options):
        out, seen = watched(made, HIGH_LOW_HIGH, answer, num_inference_steps=T, guidance_scale=1.0)
        again, _ = watched(made, HIGH_LOW_HIGH, answer, num_inference_steps=T, guidance_scale=1.0)
    assert (out - 0.7).abs().max() < 2e-2
    assert torch.equal(out, again)
    starts = [s for s in seen if (s.step.call, s.step.index) == (0, 0)]
    stages = zip(method.stage_steps(T, (1, 2, 1)), PRESETS["flux"]["strengths"], strict=True)
    assert [s.step.total for s in starts] == [method.rounded(N * w) for N, w in stages]


def test_a_stage_that_begins_with_a_repeated_timestep():
    """Karras sigmas round to timesteps that repeat; a scheduler that looks its first one up by value would start one too late."""
    made = tiny("sd")
    with Using(made, "DPMSolverMultistepScheduler", use_karras_sigmas=True):
        made.pipe.scheduler.set_timesteps(88)
        t = made.pipe.scheduler.timesteps.tolist()
        begin = next(i for i in range(3, 87) if t[i] == t[i + 1])
        knobs = {"scales": (1, 1), "shares": (2, 88), "strengths": (1, (88 - begin) / 88), "shifts": "own"}
        _, seen = watched(made, knobs, lambda call: call.latents * 0, num_inference_steps=90, guidance_scale=1.0)
        assert int(seen[2].step.t) == t[begin]
        assert len(seen) == 2 + 88 - begin
        assert made.pipe.scheduler.step_index == 88 - begin  # all of its steps, and no more


def test_tails_of_plms_start_with_a_repeated_timestep():
    whole = torch.tensor([901, 801, 801, 701, 601, 501])
    assert plms_tail(whole.clone(), 5).tolist() == [901, 801, 801, 701, 601, 501]
    assert plms_tail(whole.clone(), 3).tolist() == [701, 601, 601, 501]
    assert plms_tail(whole.clone(), 2).tolist() == [601, 501, 501]
    assert plms_tail(whole.clone(), 1).tolist() == [501]


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("KDPM2DiscreteScheduler", {}, "plan of the whole schedule"),
        ("DPMSolverSinglestepScheduler", {}, "plan of the whole schedule"),
        ("PNDMScheduler", {"skip_prk_steps": False}, "skip_prk_steps"),
    ],
)
def test_schedulers_that_cannot_be_cut_are_refused(name, options, why):
    made = tiny("sd")
    with Using(made, name, **options):
        with pytest.raises(Unsupported, match=why):
            load_pipeline(made.pipe, plugins=["bottleneck_sampling"])
        assert not hasattr(made.pipe, "plugins")
    pipe = load_pipeline(made.pipe, plugins=["bottleneck_sampling"])
    try:
        with Using(made, name, **options), pytest.raises(Unsupported, match=why):  # put in after attaching
            pipe(**made.kwargs)
    finally:
        pipe.plugins.clear()


def test_flow_schedulers_of_second_order_and_with_memory():
    made = tiny("wan")
    for name, options in [("FlowMatchHeunDiscreteScheduler", {}), ("UniPCMultistepScheduler", {}), ("FlowMatchEulerDiscreteScheduler", {})]:
        if name in ("FlowMatchHeunDiscreteScheduler", "FlowMatchEulerDiscreteScheduler"):
            made = new("sd3")
            made.pipe.scheduler = getattr(diffusers, name)(shift=3.0, **options)

        def answer(call):
            x = call.latents
            v = (x - 0.7) / call.step.sigma
            return torch.cat([v] * len(call.branches))

        out, _ = watched(made, HIGH_LOW_HIGH, answer, num_inference_steps=6)
        assert (out - 0.7).abs().max() < 2e-2, name


# as the user calls it -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_same_seed_same_picture_and_a_sample_alone_is_the_sample_in_a_batch(family):
    made = tiny(family)
    prompts = ["a red apple on the left", "two green dogs"]
    negatives = {"negative_prompt": ["blurry"] * 2}

    def generators():
        return [torch.Generator().manual_seed(i) for i in (5, 6)]

    both = bottleneck(made, HIGH_LOW_HIGH, prompt=prompts, generator=generators(), **negatives)
    assert torch.equal(both, bottleneck(made, HIGH_LOW_HIGH, prompt=prompts, generator=generators(), **negatives))
    for i in range(2):
        alone = bottleneck(made, HIGH_LOW_HIGH, prompt=prompts[i], generator=generators()[i])
        torch.testing.assert_close(both[i : i + 1], alone, rtol=1e-3, atol=1e-3 * float(alone.abs().max()))


def test_two_pictures_a_prompt_and_no_generator():
    out = bottleneck(tiny("flux"), HIGH_LOW_HIGH, num_images_per_prompt=2, generator=None)
    assert out.shape == (2, 16, 16)
    assert not torch.equal(out[0], out[1])


def test_output_types_and_forms_are_the_pipelines():
    made = tiny("sd")
    pipe = load_pipeline(made.pipe, plugins=[("bottleneck_sampling", HIGH_LOW_HIGH)])
    try:
        picture = pipe(**{**made.kwargs, "output_type": "pil"}).images[0]
        assert picture.size == (64, 64)
        assert isinstance(pipe(**made.kwargs, return_dict=False), tuple)
        assert pipe(made.kwargs["prompt"], 64, 64, num_inference_steps=3, output_type="np").images.shape == (1, 64, 64, 3)  # by position
    finally:
        pipe.plugins.clear()


def test_the_report_counts_the_steps_of_every_stage():
    _, report = call(tiny("sd"), [("bottleneck_sampling", {})], num_inference_steps=17)
    part = report.plugins["bottleneck_sampling"]
    counts = {key: sum(of.values()) for key, of in part.counts.items()}
    assert counts == {"steps of stage 1 (64x64)": 3, "steps of stage 2 (32x32)": 8, "steps of stage 3 (64x64)": 2}
    assert part.notes == ["steps: 3 at 64 x 64, 8 at 32 x 32, 2 at 64 x 64 pixels; pixels x steps are 41% of the plain run's"]
    assert report.steps == 13


def test_callbacks_see_every_step_and_may_edit_the_sample_between_two_stages():
    made, seen = tiny("sd"), []

    def callback(pipe, index, t, tensors):
        seen.append((index, tuple(tensors["latents"].shape)))
        return {"latents": tensors["latents"] * 0} if index == 1 else {}  # the end of the second stage

    edited = bottleneck(made, HIGH_LOW_HIGH, callback_on_step_end=callback)
    assert seen == [(0, (1, 4, 8, 8)), (0, (1, 4, 4, 4)), (1, (1, 4, 4, 4)), (0, (1, 4, 8, 8))]
    assert not torch.equal(edited, bottleneck(made, HIGH_LOW_HIGH))


@pytest.mark.parametrize("family", ["sd", "flux", "wan"])
@pytest.mark.parametrize("at", [1, 4])
def test_a_stopped_run_gives_what_there_was_at_the_full_size(family, at):
    """In the first stage as it was, in the small one resized once; no later stage's size leaves its traces."""
    made, seen = tiny(family), []

    def stop(pipe, step, t, tensors):
        seen.append(tensors["latents"].clone())
        pipe._interrupt = len(seen) == at
        return tensors

    out, report = call(
        made, [("bottleneck_sampling", {})], num_inference_steps=10, height=64, width=64, output_type="latent", callback_on_step_end=stop
    )
    assert len(seen) == at
    if at == 1:  # N = 2, 6, 2
        assert torch.equal(out, seen[-1])
    elif family == "sd":
        torch.testing.assert_close(out, pillow(seen[-1], 8), rtol=0, atol=1e-5 * float(out.abs().max()))
    else:
        assert out.shape == seen[0].shape
        assert out.numel() > seen[-1].numel()
    assert "% of the plain run" not in str(report)  # which counts stages that were not run


def test_users_latents_are_used_and_schedules_refused():
    made = tiny("sd")
    latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    _, seen = watched(made, HIGH_LOW_HIGH, latents=latents)
    torch.testing.assert_close(seen[0].latents, latents)
    for given in ({"timesteps": [900, 700, 500, 300]}, {"sigmas": [14.0, 7.0, 3.0, 1.0]}):
        with pytest.raises(Unsupported, match=f"{next(iter(given))} were given, and every stage has a schedule of its own"):
            bottleneck(made, HIGH_LOW_HIGH, **given)


def test_prompt_embeddings_save_the_text_encoders_further_calls():
    made, calls = new("sd"), []
    made.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    wanted = bottleneck(made, HIGH_LOW_HIGH)
    assert len(calls) == 3 * 2  # prompt and negative prompt, a stage
    kwargs = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "negative_prompt")}
    cond, uncond = made.pipe.encode_prompt(made.kwargs["prompt"], "cpu", 1, True, made.kwargs["negative_prompt"])
    calls.clear()
    embedded = SimpleNamespace(pipe=made.pipe, kwargs={**kwargs, "prompt_embeds": cond, "negative_prompt_embeds": uncond})
    assert torch.equal(bottleneck(embedded, HIGH_LOW_HIGH), wanted)
    assert not calls


def test_a_pipeline_without_vae_runs_on_latents():
    made = new("flux")
    wanted = bottleneck(made, HIGH_LOW_HIGH)
    made.pipe.register_modules(vae=None)
    assert torch.equal(bottleneck(made, HIGH_LOW_HIGH), wanted)


def test_bfloat16_stays_bfloat16():
    made = new("flux")
    made.pipe.to(dtype=torch.bfloat16)
    out, seen = watched(made, HIGH_LOW_HIGH)
    assert out.dtype == torch.bfloat16
    assert {s.input.dtype for s in seen} == {torch.bfloat16}


# refusals -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "text"),
    [
        ({**TWO, "scales": (1, 0.5)}, "the last 1"),
        ({**TWO, "scales": (0, 1)}, "> 0 and <= 1"),
        ({**TWO, "scales": (2, 1)}, "> 0 and <= 1"),
        ({"scales": (0.5, 1)}, "scales 2, shares 3, strengths 3, shifts 3.*what is not given is that of preset 'flux'"),
        ({"shifts": (1, 1)}, "shifts 2"),
        ({"shifts": (1, 0, 1)}, "each must be > 0"),
        ({"shares": (1, -1, 1)}, "each must be > 0"),
        ({"shares": (1, float("inf"), 1)}, "finite number"),
        ({"strengths": (0.9, 0.8, 0.6)}, "the first 1"),
        ({"strengths": (1, 1.2, 0.6)}, "> 0 and <= 1"),
        ({"strengths": (1, 0, 0.6)}, "> 0 and <= 1"),
        ({"shifts": "own", "strength_of": "sigma"}, "only under shifts"),
        ({"preset": "wan"}, "preset"),
        ({"multiple": 0}, "multiple"),
        ({"resampling": "area"}, "resampling"),
    ],
)
def test_bad_knobs(knobs, text):
    with pytest.raises(ConfigError, match=text):
        BottleneckSampling(**knobs)


def test_a_size_that_a_stage_cannot_have_is_refused_before_anything_runs():
    made, calls = tiny("flux"), []
    handle = made.pipe.text_encoder.register_forward_hook(lambda *_: calls.append(1))
    try:
        with pytest.raises(ConfigError, match=r"stage 2 cannot have 0\.1 times 64 x 64 pixels, sizes are multiples of 16"):
            bottleneck(made, {"scales": (1, 0.1, 1)})
        with pytest.raises(Unsupported, match="latents were given"):
            bottleneck(made, {"scales": (0.5, 1), "shares": (1, 1), "strengths": (1, 0.6), "shifts": "own"}, latents=torch.zeros(1, 16, 16))
        assert not calls
    finally:
        handle.remove()


@pytest.mark.parametrize(
    ("family", "name", "argument"),
    [
        ("sdxl", None, {"denoising_end": 0.8}),
        ("sd", "StableDiffusionControlNetPipeline", {"control_guidance_end": 0.5}),
        ("sd", "StableDiffusionControlNetPipeline", {"control_guidance_start": [0.2]}),
        ("sd3", None, {"skip_guidance_layers": [0]}),
    ],
)
def test_fractions_of_the_whole_run_are_refused(family, name, argument):
    with pytest.raises(Unsupported, match=f"{next(iter(argument))} = .* fractions of the whole run"):
        bottleneck(tiny(family, name), HIGH_LOW_HIGH, **argument)


def test_pipelines_that_begin_from_a_picture_are_refused():
    for family, name in [
        ("sd", "StableDiffusionImg2ImgPipeline"),
        ("sdxl", "StableDiffusionXLInpaintPipeline"),
        ("flux", "FluxImg2ImgPipeline"),
    ]:
        made = new(family, name)
        with pytest.raises(Unsupported, match="starts from a given picture"):
            load_pipeline(made.pipe, plugins=["bottleneck_sampling"])
        assert not hasattr(made.pipe, "plugins")
    with pytest.raises(Unsupported, match="does not work on"):
        load_pipeline(new("flux_kontext").pipe, plugins=["bottleneck_sampling"])


def test_shifts_of_a_diffusion_model_are_refused():
    for knobs in ({"shifts": (1, 2, 1)}, {"scales": (1,), "shares": (1,), "strengths": (1,), "shifts": (2,)}):
        with pytest.raises(Unsupported, match="shifts are those of flow models"):
            load_pipeline(tiny("sd").pipe, plugins=[("bottleneck_sampling", knobs)])
    with pytest.raises(Unsupported, match="strength_of = 'sigma' is that of flow models"):
        load_pipeline(tiny("sd").pipe, plugins=[("bottleneck_sampling", {"strength_of": "sigma"})])


def test_who_needs_a_deterministic_run_is_refused():
    class Exact(Watch):
        name = "exact"
        effects = Effects(needs=frozenset({"determinism"}))

    with pytest.raises(Conflict, match="draws noise of its own"):
        load_pipeline(tiny("sd").pipe, plugins=["bottleneck_sampling", Exact()])
