"""Forecasts: the maths against closed forms, the control of the error against a loop of its own, and what must not change."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from diffgraft import ConfigError, Unsupported, load_pipeline
from diffgraft.lab.metrics import psnr
from diffgraft.methods.inputs import as_array
from diffgraft_forecast import FORGET, Forecast
from diffgraft_forecast.method import distance, extrapolated, lagrange, relative_error
from diffgraft_pipelines.tiny import make
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    UniPCMultistepScheduler,
)

STEPS = 16
ALL = {"tolerance": 100.0, "order": 0}


def tiny(name="FluxPipeline", **knobs):
    made = make(name)
    made.pipe.set_progress_bar_config(disable=True)
    if knobs:
        made.pipe = load_pipeline(made.pipe, {"forecast": knobs})
    return made


def run(made, seed=0, **kwargs):
    generator = torch.Generator().manual_seed(seed)
    return as_array(made.pipe(**{**made.kwargs, "num_inference_steps": STEPS, "generator": generator, "output_type": "np", **kwargs}), 1)


def counted(made):
    report = made.pipe.plugins.report().plugins["forecast"]
    return report.total("steps skipped"), report.total("steps computed")


# the maths -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0, 1, 2, 3, 4])
def test_polynomials_up_to_the_order_are_forecast_exactly_and_the_next_has_the_remainder(order):
    draws = torch.Generator().manual_seed(order)
    nodes, at = (torch.rand(order + 1, generator=draws) + torch.arange(order + 1)).tolist(), -0.7
    assert sum(lagrange(nodes, at)) == pytest.approx(1, abs=1e-12)
    for degree in range(order + 1):
        values = [torch.tensor([node**degree], dtype=torch.float64) for node in nodes]
        weights = lagrange(nodes, at)
        assert sum(w * float(v) for w, v in zip(weights, values, strict=True)) == pytest.approx(at**degree, abs=1e-9)
    missed = at ** (order + 1) - sum(w * node ** (order + 1) for w, node in zip(lagrange(nodes, at), nodes, strict=True))
    assert abs(missed) == pytest.approx(distance(nodes, at), rel=1e-9)  # its (n + 1)th derivative is (n + 1)!


def test_bfloat16_is_summed_in_float32():
    nodes, values = [0.0, 1.0, 2.0, 3.0], [torch.full((4,), 1.0, dtype=torch.bfloat16)] * 4
    assert extrapolated(nodes, values, 9.0).dtype == torch.bfloat16
    assert torch.equal(extrapolated(nodes, values, 9.0), values[0])  # weights of -56 to 162


def test_the_error_is_the_worst_samples_and_no_number_where_there_is_nothing():
    v = torch.tensor([[3.0, 4.0], [30.0, 40.0]])
    assert float(relative_error(v + torch.tensor([[0.5, 0.0], [0.0, 0.0]]), v)) == pytest.approx(0.1)
    assert math.isnan(float(relative_error(0 * v, 0 * v)))


# the control of the error --------------------------------------------------------------------------------------------------------------


def speaking(pipe, f):
    """The denoiser says f(sigma) of one fixed tensor."""
    asked = []

    def forward(hidden_states, timestep, **_):
        sigma = float(timestep.flatten()[0])
        asked.append(sigma)
        return (torch.full_like(hidden_states, f(sigma)),)

    pipe.transformer.forward = forward
    return asked


@pytest.mark.parametrize("order", [0, 1, 2])
def test_what_is_a_polynomial_of_the_order_is_asked_until_that_is_known(order):
    plain, made = tiny(), tiny()
    for each in (plain, made):
        each.asked = speaking(each.pipe, lambda s: 1 + 2 * order * s + order * (order - 1) * s * s)
    wanted = run(plain, output_type="latent", true_cfg_scale=1.0)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 1e-3, "order": order}})
    found = run(made, output_type="latent", true_cfg_scale=1.0)
    assert len(made.asked) == order + 2  # so many points, and one that says that the forecast is right
    assert np.abs(found - wanted).max() < 1e-4


@pytest.mark.parametrize(("tolerance", "order", "max_skip"), [(0.02, 1, 0), (0.1, 1, 0), (0.1, 2, 0), (0.3, 0, 0), (0.1, 1, 2)])
def test_which_steps_are_asked_is_what_a_loop_of_its_own_says(tolerance, order, max_skip):
    f = lambda s: 1 + math.exp(2 * s)  # noqa: E731
    made = tiny()
    asked = speaking(made.pipe, f)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": tolerance, "order": order, "max_skip": max_skip}})
    run(made, true_cfg_scale=1.0)
    sigmas = made.pipe.scheduler.sigmas.tolist()[:STEPS]

    nodes, constant, wanted, in_a_row = [], None, [], 0
    for s in sigmas:
        through = np.polynomial.Polynomial.fit(nodes, [f(n) for n in nodes], order) if len(nodes) == order + 1 else None
        away = math.prod(abs(s - n) for n in nodes)
        if through is not None and constant is not None and constant * away <= tolerance and (not max_skip or in_a_row < max_skip):
            in_a_row += 1
            continue
        in_a_row = 0
        wanted.append(s)
        if through is not None:
            measured = abs(through(s) - f(s)) / f(s) / away
            constant = measured if constant is None else max(measured, FORGET * constant)
        nodes = [*nodes, s][-order - 1 :]
    assert asked == pytest.approx(wanted, abs=1e-6)
    assert order + 1 < len(wanted) < STEPS


def test_the_report_has_the_errors_that_were_measured():
    made = tiny()
    speaking(made.pipe, lambda s: 1 + s)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 1e-9, "order": 0}})
    run(made, num_inference_steps=4, true_cfg_scale=1.0)
    sigmas = made.pipe.scheduler.sigmas.tolist()[:4]
    wanted = [abs(before - s) / (1 + s) for before, s in itertools.pairwise(sigmas)]
    assert made.pipe.plugins.report().plugins["forecast"].records["error"].tolist() == pytest.approx(wanted, abs=1e-5)


def test_a_denoiser_that_says_nothing_at_all_is_asked_every_time():
    made = tiny()
    asked = speaking(made.pipe, lambda s: 0.0)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 1.0}})
    with pytest.warns(UserWarning, match="nothing was saved"):
        run(made, true_cfg_scale=1.0)
    assert len(asked) == STEPS


# runs ----------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline", "WanPipeline", "DiTPipeline", "DDPMPipeline"])
@pytest.mark.parametrize("tolerance", [0.0, 1e-12])
def test_without_tolerance_nothing_changes_by_a_bit(name, tolerance):
    plain, made = tiny(name), tiny(name, tolerance=tolerance)
    assert np.array_equal(run(plain), run(made))


@pytest.mark.parametrize(
    ("name", "scheduler"),
    [
        ("StableDiffusionPipeline", DDIMScheduler),
        ("StableDiffusionPipeline", EulerDiscreteScheduler),
        ("StableDiffusionPipeline", EulerAncestralDiscreteScheduler),
        ("StableDiffusionPipeline", DPMSolverMultistepScheduler),
        ("StableDiffusionPipeline", UniPCMultistepScheduler),
        ("StableDiffusionPipeline", PNDMScheduler),
        ("StableDiffusionXLPipeline", EulerDiscreteScheduler),
    ],
)
def test_schedulers(name, scheduler):
    made = tiny(name)
    made.pipe.scheduler = scheduler.from_config(
        made.pipe.scheduler.config, **({"skip_prk_steps": True} if scheduler is PNDMScheduler else {})
    )
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 0.5}})
    first, again = run(made), run(made)
    skipped, computed = counted(made)
    assert np.isfinite(first).all()
    assert np.array_equal(first, again)  # a run begins anew
    assert skipped > 0
    assert computed + skipped in (STEPS, STEPS + 1)


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, lambda c: PNDMScheduler.from_config(c, skip_prk_steps=False)])
def test_schedulers_that_ask_twice_are_refused_before_the_denoiser_runs(scheduler):
    made = tiny("StableDiffusionPipeline")
    config = made.pipe.scheduler.config
    made.pipe.scheduler = scheduler.from_config(config) if isinstance(scheduler, type) else scheduler(config)
    asked = []
    own = made.pipe.unet.forward
    made.pipe.unet.forward = lambda *args, **kwargs: asked.append(1) or own(*args, **kwargs)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 0.1}})
    with pytest.raises(Unsupported, match=r"forecast: .*asks the denoiser more than once.*use"):
        run(made)
    assert not asked


def test_branches_that_are_asked_one_by_one_are_forecast_together():
    made = tiny("WanPipeline", tolerance=0.3)
    run(made)
    calls = made.pipe.plugins.report().plugins["forecast"].counts
    by_branch = {name: value for name, value in calls.items() if "skipped" in str(name)}
    skipped, computed = counted(made)
    assert skipped > 0
    assert skipped + computed == 2 * STEPS
    assert skipped % 2 == 0, by_branch


def test_a_branch_that_was_away_is_not_forecast_from_where_it_was():
    made = tiny("WanPipeline", tolerance=0.3)
    asked: dict[bool, list[int]] = {True: [], False: []}
    at = 0
    forward = made.pipe.transformer.forward

    def watched(*args, **kwargs):
        given = kwargs.get("encoder_hidden_states", args[2] if len(args) > 2 else None)
        asked[torch.equal(given, made.kwargs["negative_prompt_embeds"].to(given))].append(at)
        return forward(*args, **kwargs)

    def cut(pipe, i, t, kwargs):
        nonlocal at
        at, pipe._guidance_scale = i + 1, 1.0 if 5 <= i < 11 else 5.0
        return kwargs

    made.pipe.transformer.forward = watched
    if "negative_prompt_embeds" not in made.kwargs:
        texts = made.pipe.encode_prompt(made.kwargs.pop("prompt"), made.kwargs.pop("negative_prompt", ""), max_sequence_length=8)
        made.kwargs |= {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1]}
    run(made, callback_on_step_end=cut)
    back = [i for i in asked[True] if i >= 12]
    assert back[:2] == [12, 13], f"its nodes are those of step 5 and before: {asked}"


def test_beside_a_plugin_that_reuses_features_the_picture_is_made():
    """Forecasts answer from inside what it meant for its own features: then the U-Net runs whole."""
    made = make("StableDiffusionPipeline")
    made.pipe.set_progress_bar_config(disable=True)
    pytest.importorskip("diffgraft_faster_diffusion")
    made.pipe = load_pipeline(made.pipe, {"faster_diffusion": {"parallel": 1}, "forecast": {"tolerance": 0.2}})
    assert np.isfinite(run(made, num_inference_steps=30)).all()
    assert counted(made)[0] > 0


def test_another_denoiser_in_mid_run_begins_anew():
    made = tiny("WanPipeline")
    pipe = made.pipe
    if getattr(pipe, "transformer_2", None) is None:
        pipe.register_modules(transformer_2=make("WanPipeline").pipe.transformer)
        pipe.register_to_config(boundary_ratio=0.5)
    asked = {"transformer": 0, "transformer_2": 0}
    for name in asked:
        model = getattr(pipe, name)

        def forward(*args, _own=model.forward, _name=name, **kwargs):
            asked[_name] += 1
            return _own(*args, **kwargs)

        model.forward = forward
    made.pipe = load_pipeline(pipe, {"forecast": ALL})
    run(made)
    assert asked["transformer"] >= 4  # two points of two branches
    assert asked["transformer_2"] >= 2


def test_a_batch_and_its_forecasts_are_finite_in_bfloat16():
    made = tiny("StableDiffusionPipeline")
    made.pipe.to(torch.bfloat16)
    made.pipe = load_pipeline(made.pipe, {"forecast": {"tolerance": 0.5, "order": 2}})
    draws = [torch.Generator().manual_seed(i) for i in range(4)]
    call = {**made.kwargs, "prompt": ["a", "b"], "negative_prompt": None, "num_images_per_prompt": 2, "generator": draws}
    found = made.pipe(**{**call, "num_inference_steps": STEPS, "output_type": "np"}).images
    assert len(found) == 4
    assert np.isfinite(found).all()
    assert counted(made)[0] > 0


def test_beside_fewer_steps_on_a_trained_model():
    """At as many denoiser forwards, nearer to the picture of all steps."""
    pipe = load_pipeline("emoji-flux")
    pipe.set_progress_bar_config(disable=True)

    def call(steps):
        generator = torch.Generator().manual_seed(3)
        return as_array(pipe("a big pizza on a green background", num_inference_steps=steps, generator=generator, output_type="np"), 1)

    wanted = call(30)
    load_pipeline(pipe, {"forecast": {"tolerance": 0.05}})
    found = call(30)
    forwards = sum(pipe.plugins.report().forwards.values())
    pipe.plugins.clear()
    fewer = call(math.ceil(forwards / 2))
    assert forwards < 50
    assert psnr(found, wanted)[0] > psnr(fewer, wanted)[0] + 2


# bad input -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "knobs", [{"tolerance": -0.1}, {"tolerance": 101}, {"tolerance": math.nan}, {"order": 5}, {"order": -1}, {"max_skip": -1}]
)
def test_bad_knobs(knobs):
    with pytest.raises(ConfigError, match=next(iter(knobs))):
        Forecast(**knobs)


def test_a_sound_is_forecast_as_its_picture_is():
    def both(made, **kwargs):
        kwargs = {**made.kwargs, "num_inference_steps": 8, "output_type": "latent", **kwargs}
        out = made.pipe(**kwargs, generator=torch.Generator().manual_seed(0))
        return out.frames, out.audio

    made, other = tiny("LTX2Pipeline", tolerance=1.0, order=0), tiny("LTX2Pipeline")
    ran, after = [], []
    handle = made.pipe.transformer.proj_in.register_forward_hook(lambda *_: ran.append(1))
    found = both(made, callback_on_step_end=lambda pipe, step, t, tensors: after.append(len(ran)) or tensors)
    handle.remove()
    computed = [b > a for a, b in itertools.pairwise([0, *after])]
    assert 0 < computed.count(False) < 7
    forward, kept, steps = other.pipe.transformer.forward, [], iter(computed)

    def answer(**kwargs):
        kept.append(forward(**kwargs) if next(steps) else kept[-1])
        return kept[-1]

    other.pipe.transformer.forward = answer
    for ours, expected in zip(found, both(other), strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=0)
