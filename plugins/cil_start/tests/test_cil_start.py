"""Late start: the nearest Gaussian, the shorter schedules, what is measured and refused, and the contract."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, Unsupported, load_pipeline, unload
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate_call
from diffgraft.methods.late import left, spread
from diffgraft.methods.published import Weights
from diffgraft.testing import Case, contract_sample
from diffgraft.testing.watch import FirstLatents
from diffgraft_cil_start import CilStart, __version__, measured_on
from diffgraft_cil_start.method import UNIT, Moments, Sums, begin, divergence, official_svd, optimum
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LCMScheduler,
    PNDMScheduler,
    TCDScheduler,
)

CASES = contract_sample("cil_start", __version__)
"""Each check once and each family once; which meet changes with the version. All of them: ``diffgraft check``, or ``contract_cases``."""


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contract(case: Case) -> None:
    case.run()


# helpers ------------------------------------------------------------------------------------------------------------------------------


def run(name: str, scheduler: Any = None, steps: int = 4, call: dict[str, Any] | None = None, **knobs: Any) -> tuple[Any, torch.Tensor]:
    """(the pipeline with its plugin, the latents that it began with) of a run of a tiny pipeline."""
    made = make(name)
    if scheduler is not None:
        made.pipe.scheduler = scheduler
    made.pipe.set_progress_bar_config(disable=True)
    FirstLatents.seen.clear()
    pipe = load_pipeline(made.pipe, plugins=[CilStart(**knobs), FirstLatents])
    arguments = {**made.kwargs, "num_inference_steps": steps, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
    pipe(**{**arguments, **(call or {})})
    return pipe, FirstLatents.seen[0]


@cache
def drawn(name: str) -> torch.Tensor:
    """The noise of these runs."""
    pipe, first = run(name, start=1.0, init="plain")
    return first / getattr(pipe.scheduler, "init_noise_sigma", 1.0)


def gaussian(d: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """(mean, covariance) of data."""
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(d, generator=generator, dtype=torch.float64), root @ root.T / d


LEVELS = [(0.0, 1.0), (0.3, math.sqrt(1 - 0.09)), (1.0, 100.0), (0.06, 0.94)]
"""(a, s): pure noise, variance preserving, variance exploding, flow."""


def pair(a: float, s: float) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(a, dtype=torch.float64), torch.tensor(s, dtype=torch.float64)


# the equations ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", LEVELS)
def test_no_gaussian_of_one_variance_is_nearer_to_the_marginal(levels):
    """Eq. 5: the gradient of the divergence vanishes there, and every step away makes it larger."""
    mean, cov = gaussian()
    a, s = pair(*levels)
    mu, S = a * mean, a * a * cov + s * s * torch.eye(6, dtype=torch.float64)
    m, v = (x.clone().requires_grad_() for x in optimum(Moments(mean, cov.trace() / 6), a, s))
    best = divergence(mu, S, m, v)
    for gradient in torch.autograd.grad(best, (m, v)):
        assert gradient.abs().max() < 1e-9
    for step in (1.01, 0.99):
        assert divergence(mu, S, m, v * step) > best
        assert divergence(mu, S, m + (step - 1), v) > best


@pytest.mark.parametrize("levels", LEVELS)
def test_it_is_the_marginal_itself_where_the_covariance_is_the_same_in_all_directions(levels):
    mean, c = gaussian()[0], 0.4
    a, s = pair(*levels)
    mu, S = a * mean, (a * a * c + s * s) * torch.eye(6, dtype=torch.float64)
    assert divergence(mu, S, *optimum(Moments(mean, torch.tensor(c, dtype=torch.float64)), a, s)).abs() < 1e-12
    plain = divergence(mu, S, torch.zeros(6, dtype=torch.float64), a * a + s * s)
    assert plain > 1e-8 if a > 0 else plain.abs() < 1e-12


def test_the_divergence_is_torchs_own():
    mu, S = gaussian()
    m, v = gaussian(seed=1)[0], torch.tensor(1.7, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(normal(mu, S), normal(m, v * torch.eye(6, dtype=torch.float64)))
    torch.testing.assert_close(divergence(mu, S, m, v), expected)


def test_mean_0_and_the_noises_own_variance_are_the_noise_bit_for_bit():
    noise = torch.randn(2, 4, 8, 8)
    assert begin(noise, torch.zeros(()), torch.ones(())).equal(noise)
    assert begin(noise, *optimum(UNIT, torch.zeros(()), torch.ones(()))).equal(noise)


def test_a_level_of_noise_alone_adds_no_data_variance_twice():
    """sigma^2 + tr Cov / d, not (sigma^2 + 1) + tr Cov / d: that is the official SVD code's."""
    moments, sigma = Moments(torch.zeros(3), torch.tensor(0.25)), torch.tensor(100.0)
    assert optimum(moments, torch.ones(()), sigma)[1] == 100**2 + 0.25
    assert official_svd(torch.ones(3), math.sqrt(100**2 + 1), moments)[0] == pytest.approx(math.sqrt(100**2 + 1) + 0.25)


def test_sums_give_the_mean_and_the_mean_variance_however_they_are_cut():
    x = torch.randn(7, 3, 2) * 2 + 5
    once = Sums.of(x).moments()
    torch.testing.assert_close(once.mean, x.double().mean(0))
    torch.testing.assert_close(once.trace, x.double().var(0, correction=0).mean())
    parts = Sums.of(x[:2]).plus(Sums.of(x[2:3])).plus(Sums.of(x[3:]))
    torch.testing.assert_close(parts.moments(), once)
    assert Sums.of(x[:1]).moments().trace == 0


def test_the_start_is_the_official_codes_of_dynamicrafter():
    """Written out again from its formula: mu = sqrt(abar) E, sigma = sqrt(1 - abar + abar tr), x = mu + sigma eps."""
    abar, moments, eps = torch.tensor(0.013), Moments(torch.randn(4, 2), torch.tensor(0.7)), torch.randn(3, 4, 2)
    expected = abar.sqrt() * moments.mean + (1 - abar + abar * moments.trace).sqrt() * eps
    torch.testing.assert_close(begin(eps, *optimum(moments, abar.sqrt(), (1 - abar).sqrt())), expected)


# schedules ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [4, 10])
@pytest.mark.parametrize("start", [0.94, 0.82])
def test_times_are_spread_over_m_as_the_official_code_spreads_them(steps, start):
    M = round(1000 * start)
    trailing, _ = run("StableDiffusionPipeline", DDIMScheduler(timestep_spacing="trailing"), steps, start=start)
    expected = np.flip(np.round(np.arange(M, 0, -M / steps))).astype(int)[::-1] - 1  # "uniform_trailing"
    assert trailing.scheduler.timesteps.tolist() == expected.tolist()
    leading, _ = run("StableDiffusionPipeline", DDIMScheduler(steps_offset=1), steps, start=start)
    expected = np.arange(0, steps)[::-1] * (M // steps) + 1  # "uniform"
    assert leading.scheduler.timesteps.tolist() == expected.tolist()


@pytest.mark.parametrize("kind", [LCMScheduler, TCDScheduler])
def test_lcm_and_tcd_begin_at_m_and_keep_their_own_grid(kind):
    """Their times are 19, 39, ... 999, whatever M is; spread as they spread them."""
    for start, expected in (
        (0.94, [939, 719, 479, 239]),
        (0.82, [819, 619, 419, 219]),
        (0.3, [299, 239, 159, 79]),
        (0.099, [98, 79, 59, 39]),
    ):
        pipe, _ = run("StableDiffusionPipeline", kind(), start=start)
        assert pipe.scheduler.timesteps.tolist() == expected


@pytest.mark.parametrize("steps", [1, 3, 4, 8, 50])
def test_at_m_of_t_the_spread_of_a_grid_is_the_schedulers_own(steps):
    scheduler = LCMScheduler()
    scheduler.set_timesteps(steps)
    assert spread(left(scheduler, 1.0), steps) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", [DPMSolverMultistepScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_levels_are_those_of_the_times(kind, zero_snr):
    settings = {"rescale_betas_zero_snr": True} if zero_snr and kind is not HeunDiscreteScheduler else {}
    own = kind(beta_schedule="scaled_linear", timestep_spacing="trailing", **settings)
    pipe, _ = run("StableDiffusionPipeline", own, start=0.8)
    scheduler = pipe.scheduler
    times, abar = scheduler.timesteps, scheduler.alphas_cumprod
    assert times[0] <= 800
    assert len(scheduler.sigmas) == len(times) + 1
    expected = ((1 - abar[times.long()]) / abar[times.long()]).sqrt()
    torch.testing.assert_close(scheduler.sigmas[: len(times)].double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_svd_begins_at_the_level_that_is_named_and_is_spread_as_karras_has_it():
    pipe, _ = run("StableVideoDiffusionPipeline")  # none: the authors' 100 of 700
    low, high = 0.002 ** (1 / 7), 100 ** (1 / 7)
    expected = torch.tensor([(high + i / 3 * (low - high)) ** 7 for i in range(4)])
    torch.testing.assert_close(pipe.scheduler.sigmas[:-1], expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(pipe.scheduler.timesteps, expected.log() / 4, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["WanPipeline", "LTXPipeline"])
def test_a_flows_levels_are_m_times_its_own_after_the_shift(name):
    own, _ = run(name, start=1.0)
    late, _ = run(name, start=0.8)
    torch.testing.assert_close(late.scheduler.sigmas, 0.8 * own.scheduler.sigmas)
    assert (late.scheduler.timesteps - 0.8 * own.scheduler.timesteps).abs().max() <= 1
    assert len(late.scheduler.timesteps) == 4


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "CogVideoXPipeline", "WanPipeline"])
def test_a_late_run_costs_what_the_plain_one_costs(name):
    counts = []
    for start in (1.0, 0.82):
        pipe, _ = run(name, start=start)
        counts.append(dict(pipe.plugins.report().forwards))
    assert counts[0] == counts[1]


# where a run begins -------------------------------------------------------------------------------------------------------------------


def measured(name: str, seed: int = 0) -> tuple[Any, Artefact]:
    """A tiny pipeline's artefact, with the moments of five random clips."""
    pipe, first = run(name, start=1.0, init="plain")
    unload(pipe)
    generator = torch.Generator().manual_seed(seed)
    clips = [torch.randn(first.shape[1:], generator=generator) * 0.5 + 2 for _ in range(5)]
    return pipe, measured_on(pipe, clips)


BEGUN = ["StableDiffusionPipeline", "StableVideoDiffusionPipeline", "WanPipeline", "CogVideoXPipeline", "LTXPipeline"]


@pytest.mark.parametrize("name", BEGUN)
def test_a_run_begins_where_the_equations_say(name):
    _, artefact = measured(name)
    pipe, first = run(name, start=0.8, artefact=artefact)
    scheduler, E, trace = pipe.scheduler, artefact.tensors["mean"], artefact.tensors["trace"]
    if "Video" in name and "CogVideoX" not in name:
        a, s = torch.ones(()), torch.tensor(0.8 * 700.0)
    elif name in ("WanPipeline", "LTXPipeline"):
        a, s = torch.tensor(0.2), torch.tensor(0.8)
    else:
        abar = scheduler.alphas_cumprod[int(scheduler.timesteps[0])]
        a, s = abar.sqrt(), (1 - abar).sqrt()
    expected = a * E + (s * s + a * a * trace).sqrt() * drawn(name)
    torch.testing.assert_close(first, expected.to(first.dtype), rtol=1e-4, atol=1e-3)
    assert pipe.plugins.report().plugins["cil_start"].total("analytic starts") == 1


def test_under_euler_it_is_the_same_start_in_eulers_unit():
    _, artefact = measured("StableDiffusionPipeline")
    spaced = {"beta_schedule": "scaled_linear", "timestep_spacing": "trailing"}
    _, ddim = run("StableDiffusionPipeline", DDIMScheduler(**spaced), start=0.8, artefact=artefact)
    pipe, euler = run("StableDiffusionPipeline", EulerDiscreteScheduler(**spaced), start=0.8, artefact=artefact)
    sigma = pipe.scheduler.sigmas[0]
    torch.testing.assert_close(euler / (1 + sigma * sigma).sqrt(), ddim, rtol=1e-4, atol=1e-4)


def test_where_a_flow_begins_in_pure_noise_the_analytic_start_is_that_noise_bit_for_bit():
    _, artefact = measured("LTXPipeline")
    _, plain = run("LTXPipeline", start=1.0, init="plain")
    _, analytic = run("LTXPipeline", start=1.0, artefact=artefact)
    assert analytic.equal(plain)


def test_without_an_artefact_the_data_are_taken_as_unit_and_the_report_says_so():
    pipe, first = run("StableVideoDiffusionPipeline")
    torch.testing.assert_close(first, (100.0**2 + 1) ** 0.5 * drawn("StableVideoDiffusionPipeline"))
    assert any("mean 0 and variance 1" in note for note in pipe.plugins.report().plugins["cil_start"].notes)


def test_the_officials_start_is_there_to_compare_and_no_default():
    _, artefact = measured("StableVideoDiffusionPipeline")
    _, first = run("StableVideoDiffusionPipeline", artefact=artefact, formula="official")
    E, trace = artefact.tensors["mean"], artefact.tensors["trace"]
    noise = drawn("StableVideoDiffusionPipeline")
    torch.testing.assert_close(first, noise * (100.0**2 + 1 + E).sqrt() + trace)
    assert CilStart().config.formula == "paper"
    _, unmeasured = run("StableVideoDiffusionPipeline", formula="official")
    torch.testing.assert_close(unmeasured, noise * (100.0**2 + 1) ** 0.5)
    (pipe, official), (_, paper) = [run("StableDiffusionPipeline", formula=formula) for formula in ("official", "paper")]
    assert official.equal(paper)  # their code of variance-preserving models is right
    assert "eq. 5 is taken" in str(pipe.plugins.report())


def test_the_authors_files_are_read():
    noise = drawn("StableVideoDiffusionPipeline")
    state = {"Expectation_x_0": torch.full(noise.shape[1:], 0.5).half(), "trCov_d": torch.tensor(0.7)}
    _, first = run("StableVideoDiffusionPipeline", published=Weights(state))
    torch.testing.assert_close(first, 0.5 + (100.0**2 + 0.7) ** 0.5 * noise)


# what is measured ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableVideoDiffusionPipeline"])
def test_calibration_measures_what_the_pipeline_makes(name):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    kept = []

    def call():
        for seed in (0, 1):
            generator = torch.Generator().manual_seed(seed)
            out = made.pipe(**{**made.kwargs, "num_inference_steps": 2, "generator": generator, "output_type": "latent"})
            kept[:] = [out[0]]

    artefact = calibrate_call(made.pipe, CilStart(), call)  # keeps the record of the last run
    torch.testing.assert_close(artefact.tensors["mean"], kept[0].float().mean(0))
    assert artefact.facts["clips"] == len(kept[0])


def test_an_artefact_is_kept_and_read(tmp_path):
    pipe, artefact = measured("StableDiffusionPipeline")
    artefact.save(tmp_path / "moments.safetensors")
    _, given = run("StableDiffusionPipeline", artefact=artefact)
    pipe, read = run("StableDiffusionPipeline", artefact=tmp_path / "moments.safetensors")
    assert given.equal(read)
    assert any("5 clips" in note for note in pipe.plugins.report().plugins["cil_start"].notes)


# refusals -----------------------------------------------------------------------------------------------------------------------------


def test_moments_of_another_size_are_refused():
    pipe, artefact = measured("StableDiffusionPipeline")
    side = artefact.tensors["mean"].shape[-1] * pipe.vae_scale_factor * 2
    with pytest.raises(ArtefactMismatch, match="shape of the latents"):
        run("StableDiffusionPipeline", artefact=artefact, call={"height": side, "width": side})
    state = {"Expectation_x_0": torch.zeros(2, 4, 3, 3), "trCov_d": torch.tensor(0.7)}
    with pytest.raises(ArtefactMismatch, match=r"measured on latents of.*the authors' file of the other size"):
        run("StableVideoDiffusionPipeline", published=Weights(state))
    state = {**state, "trCov_d": torch.tensor(-1.0)}
    with pytest.raises(ConfigError, match="trCov_d = -1 is no variance"):
        run("StableVideoDiffusionPipeline", published=Weights(state))


NAN = torch.full((4, 8, 8), math.nan)


@pytest.mark.parametrize("latents", [[], [torch.zeros(4, 8, 8)], [torch.zeros(4, 8, 8), torch.zeros(4, 8, 9)], [NAN, NAN]])
def test_moments_need_clips_of_one_size(latents):
    with pytest.raises(ConfigError, match=r"two clips|of one size|not finite"):
        measured_on(make("StableDiffusionPipeline").pipe, latents)


def test_schedulers_without_a_late_start_are_refused_before_anything_runs():
    with pytest.raises(Unsupported, match="PNDMScheduler follows no schedule but its own"):
        run("StableDiffusionPipeline", PNDMScheduler(skip_prk_steps=True))
    run("StableDiffusionPipeline", PNDMScheduler(skip_prk_steps=True), start=1.0)


def test_a_schedule_of_the_calls_own_is_refused():
    with pytest.raises(ConfigError, match="the call says timesteps itself"):
        run("StableDiffusionPipeline", call={"timesteps": [900, 500, 1]})
    run("StableDiffusionPipeline", DPMSolverMultistepScheduler(), call={"timesteps": [900, 500, 1], "num_inference_steps": None}, start=1.0)


def test_more_steps_than_are_left_are_refused_before_the_text():
    for scheduler, start, way in (
        (DDIMScheduler(), 0.003, "3 training steps are left, fewer than the 4 that are asked for; take start = 0.004 or more"),
        (LCMScheduler(), 0.06, "3 training steps are left of the 50 that LCMScheduler goes by, .* take start = 0.061 or more"),
    ):
        made = make("StableDiffusionPipeline")
        made.pipe.scheduler, texts = scheduler, []
        made.pipe.text_encoder.register_forward_pre_hook(lambda *_: texts.append(1))  # noqa: B023
        load_pipeline(made.pipe, plugins=[CilStart(start=start)])
        with pytest.raises(ConfigError, match=way):
            made.pipe(**{**made.kwargs, "num_inference_steps": 4})
        assert not texts
    run("StableDiffusionPipeline", LCMScheduler(), start=0.061)


def test_pipelines_that_begin_in_the_middle_are_refused():
    with pytest.raises(Unsupported, match="begins in mid-schedule"):
        load_pipeline(make("StableDiffusionImg2ImgPipeline").pipe, plugins=[CilStart])


def test_a_picture_in_the_latents_is_not_drawn_over():
    pipe = make("WanImageToVideoPipeline").pipe
    pipe.register_to_config(expand_timesteps=True)
    with pytest.raises(Unsupported, match="puts its picture into the latents"):
        load_pipeline(pipe, plugins=[CilStart])
    load_pipeline(pipe, plugins=[CilStart(init="plain")])


def test_knobs_are_refused_with_their_range():
    for knobs in ({"start": 0}, {"start": 1.5}, {"start": math.nan}, {"init": "analytical"}):
        with pytest.raises(ConfigError, match=next(iter(knobs))):
            CilStart(**knobs)
    with pytest.raises(ConfigError, match="give one of them"):
        CilStart(artefact="a.safetensors", published="b.pt")


def test_effects_follow_the_knobs():
    assert CilStart().effects.edits == {"latents", "schedule"}
    assert CilStart(start=1.0).effects.edits == {"latents"}
    assert CilStart(init="plain").effects.edits == {"schedule"}
