"""CacheQuant against its equations, against deepcache, and what must not happen."""

from __future__ import annotations

import copy
import importlib
import itertools
import shlex
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, NotFinite, Unsupported, load_pipeline, unload
from diffgraft.cli import app
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments
from diffgraft.methods.quant.kept import unpacked
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear
from diffgraft.methods.quant.shortcuts import from_below
from diffgraft_cachequant import CacheQuant
from diffgraft_cachequant import method as m
from diffgraft_cachequant.knobs import CacheQuantConfig
from diffgraft_cachequant.layers import CorrectedConv2d, Layer, splits, wanted
from diffusers import EulerDiscreteScheduler, HeunDiscreteScheduler, PNDMScheduler
from typer.testing import CliRunner

CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "svd": "StableVideoDiffusionPipeline",
    "animatediff": "AnimateDiffPipeline",
    "pixel": "DDIMPipeline",
}
FLOATS = {"bits": "w32a32"}


def tiny(family="sd"):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(CLASSES[family], 0)
    if family != "pixel":
        made.kwargs["output_type"] = "latent"
    return made


def picture(made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), **kwargs})[0])


MADE = {}
"""Calibrations of tiny pipelines as they come; they are the same each time."""


def artefact_for(made, path, steps=6, prompts=1, anew=False, **knobs):
    """A calibration on this very pipeline; ``anew`` where something was done to it."""
    key = type(made.pipe).__name__, steps, prompts, tuple(sorted(knobs.items()))
    if anew or key not in MADE:
        found = calibration(made, path, steps, prompts, knobs)
        if anew:
            return found
        MADE[key] = found
    made.kwargs["num_inference_steps"] = steps
    return MADE[key]


def calibration(made, path, steps, prompts, knobs):
    """What ``diffgraft calibrate`` does."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type", "image")}
    samples = [Sample(i, prompt=made.kwargs.get("prompt")) for i in range(prompts)]
    image = made.kwargs.get("image")
    settings = CallSettings(steps=steps, extra=extra, image=image)
    made.kwargs["num_inference_steps"] = steps
    return calibrate(made.pipe, CacheQuant(**knobs), samples, settings, path / "a.safetensors")


def grafted(made, **knobs):
    load_pipeline(made.pipe, plugins=[CacheQuant(**knobs)])
    return made


def part(made):
    return made.pipe.plugins.report().plugins["cachequant"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative(found, wanted):
    return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))


# the schedule -----------------------------------------------------------------------------------------------------------------------


def distances(features):
    """[T, T - 1] of features [T, ...]."""
    T = len(features)
    found = torch.full((T, max(T - 1, 1)), torch.inf)
    for i in range(T):
        for k in range(1, i + 1):
            found[i, k - 1] = (features[i] - features[i - k]).abs().sum()
    return found


def cost(features, keys):
    """What a schedule loses, written out."""
    ends = [*keys[1:], len(features)]
    return sum(float((features[i] - features[key]).abs().sum()) for key, end in zip(keys, ends, strict=True) for i in range(key, end))


def brute_force(features, interval):
    """The least cost of all schedules that are allowed."""
    T = len(features)
    K, allowed = -(-T // interval), m.lengths(T, interval)
    every = ((0, *rest) for rest in itertools.combinations(range(1, T), K - 1))
    fits = [keys for keys in every if all(b - a in allowed for a, b in pairwise([*keys, T]))]
    return min(cost(features, keys) for keys in fits)


@pytest.mark.parametrize("T", range(1, 11))
@pytest.mark.parametrize("interval", [2, 3, 4, 5, 12])
def test_the_schedule_is_the_best_of_all(T, interval):
    for seed in range(4):
        features = seeded(T, 3, seed=seed).cumsum(0)
        keys = m.best_schedule(distances(features), interval)
        assert len(keys) == -(-T // interval)
        assert keys[0] == 0
        assert cost(features, keys) == pytest.approx(brute_force(features, interval), rel=1e-5)


def test_equal_features_cost_nothing_and_a_jump_begins_a_group():
    assert m.group_cost(distances(torch.ones(6, 2)), 0, 6) == 0
    features = torch.tensor([0.0, 0, 0, 0, 9, 9, 9, 20, 20])[:, None]
    assert m.best_schedule(distances(features), 3) == (0, 4, 7)


# the correction ---------------------------------------------------------------------------------------------------------------------


def test_an_affine_map_is_recovered():
    F = seeded(2, 4, 5, 5) * 3 + 1
    a, b = torch.tensor([1.5, -0.3, 0.0, 1.0]), torch.tensor([0.2, -4.0, 3.0, 0.0])
    y = m.corrected(F, a, b)
    found = m.affine(m.moments(F, y))
    assert torch.allclose(found[0], a, atol=1e-5)
    assert torch.allclose(found[1], b, atol=1e-5)
    assert torch.allclose(m.corrected(F, *found), y, atol=1e-5)


def test_moments_of_parts_merge_to_those_of_the_whole():
    x, y = seeded(6, 3, 4, 4) + 100, seeded(6, 3, 4, 4, seed=1)
    whole = m.moments(x.double(), y.double())
    parts = [m.moments(x[i : i + 2], y[i : i + 2]).double() for i in (0, 2, 4)]
    found = m.merged(torch.zeros(5, 3).double(), m.merged(m.merged(parts[0], parts[1]), parts[2]))
    assert torch.allclose(found, whole.double(), rtol=1e-3)
    n, mx, _, sxx, sxy = found
    flat = x.movedim(1, 0).flatten(1).double(), y.movedim(1, 0).flatten(1).double()
    assert torch.allclose(sxx / n, flat[0].var(1, correction=0), rtol=1e-3)
    assert torch.allclose(sxy / sxx, ((flat[0] - mx[:, None]) * flat[1]).sum(1) / ((flat[0] - mx[:, None]) ** 2).sum(1), rtol=1e-3)


def test_the_fit_is_never_worse_than_none_on_what_it_was_fitted_to():
    F, y = seeded(2, 4, 5, 5), seeded(2, 4, 5, 5, seed=1)
    fitted = m.corrected(F, *m.affine(m.moments(F, y)))
    assert bool(((fitted - y).pow(2).mean((0, 2, 3)) <= (F - y).pow(2).mean((0, 2, 3))).all())


def test_what_has_no_variance_is_moved_only():
    F, y = torch.full((1, 2, 3, 3), 2.0), seeded(1, 2, 3, 3) + 5
    a, b = m.affine(m.moments(F, y))
    assert torch.equal(a, torch.ones(2))
    assert torch.allclose(b, y.mean((0, 2, 3)) - 2)
    nothing = m.affine(torch.zeros(5, 7))
    assert torch.equal(nothing[0], torch.ones(7))
    assert torch.equal(nothing[1], torch.zeros(7))


# on pipelines -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
def test_uniform_and_uncorrected_is_deepcache_bit_for_bit(family, tmp_path):
    pytest.importorskip("diffgraft_deepcache")
    made = tiny(family)
    plain = picture(made, num_inference_steps=6)
    for interval, branch in ((2, 0), (3, 1)) if family in ("sd", "pixel") else ((3, 1),):
        load_pipeline(made.pipe, plugins=[("deepcache", {"interval": interval, "branch": branch})])
        theirs = picture(made, num_inference_steps=6)
        unload(made.pipe)
        knobs = {"interval": interval, "branch": branch, "schedule": "uniform", **FLOATS}
        grafted(made, correct="off", **knobs)
        assert np.array_equal(picture(made, num_inference_steps=6), theirs)
        assert not np.array_equal(theirs, plain)
        unload(made.pipe)
        artefact = artefact_for(made, tmp_path, **knobs)
        same = {"gain": torch.ones_like(artefact.tensors["gain"]), "offset": torch.zeros_like(artefact.tensors["offset"])}
        one = Artefact(artefact.made_for, {**artefact.tensors, **same}, artefact.facts)
        grafted(made, artefact=one, **knobs)  # a = 1, b = 0
        assert np.array_equal(picture(made, num_inference_steps=6), theirs)
        made.pipe.plugins.configure("cachequant", interval=1)
        assert np.array_equal(picture(made, num_inference_steps=6), plain)
        unload(made.pipe)


@pytest.mark.parametrize("family", ["sd", "pixel"])
def test_the_whole_calls_are_those_of_the_schedule(family, tmp_path):
    made = tiny(family)
    artefact = artefact_for(made, tmp_path, steps=10, interval=3, **FLOATS)
    expected = m.best_schedule(artefact.tensors["distance"], 3)
    grafted(made, artefact=artefact, interval=3, **FLOATS)
    calls = []
    made.pipe.unet.register_forward_pre_hook(lambda *_: calls.append(False))
    leaf = next(x for x in made.pipe.unet.mid_block.modules() if isinstance(x, torch.nn.Conv2d))
    leaf.register_forward_hook(lambda *_: calls.__setitem__(-1, True))
    picture(made)
    assert tuple(i for i, ran in enumerate(calls) if ran) == expected
    assert (part(made).total("computed"), part(made).total("skipped")) == (4, 6)


def test_the_calibration_finds_the_features_distances_and_their_affine_maps(tmp_path):
    made = tiny("pixel")
    plain = picture(made, num_inference_steps=6)
    features = []
    feeder = made.pipe.unet.up_blocks[-1].attentions[-2] if hasattr(made.pipe.unet.up_blocks[-1], "attentions") else None
    feeder = feeder or made.pipe.unet.up_blocks[-1].resnets[-2]
    hook = feeder.register_forward_hook(lambda _, args, out: features.append(out.clone()))
    extra = {k: v for k, v in made.kwargs.items() if k not in ("num_inference_steps", "output_type")}
    for seed in range(2):
        made.pipe(**call_arguments(made.pipe, [Sample(seed)], CallSettings(steps=6, extra=extra)))
    hook.remove()
    artefact = artefact_for(made, tmp_path, prompts=2, interval=3, **FLOATS)
    assert np.array_equal(picture(made), plain)
    T, W = artefact.tensors["distance"].shape
    assert (T, W) == (6, 5)
    for i, k in ((1, 1), (5, 2), (5, 5)):
        pairs = [(features[6 * run + i - k], features[6 * run + i]) for run in range(2)]
        l1 = sum(float((new - old).abs().sum()) for old, new in pairs) / 2
        assert float(artefact.tensors["distance"][i, k - 1]) == pytest.approx(l1, rel=1e-4)
        old, new = (torch.cat(x) for x in zip(*pairs, strict=True))
        a, b = m.affine(m.moments(old, new))
        assert torch.allclose(artefact.tensors["gain"][i, k - 1], a, rtol=1e-3, atol=1e-5)
        assert torch.allclose(artefact.tensors["offset"][i, k - 1], b, rtol=1e-3, atol=1e-5)


def test_correcting_brings_the_cached_run_nearer(tmp_path):
    """On random weights, of the run that was calibrated on."""
    made = tiny("pixel")
    plain = picture(made, num_inference_steps=8)
    artefact = artefact_for(made, tmp_path, steps=8, interval=4, **FLOATS)
    found = {}
    for correct in ("off", "cache"):
        grafted(made, artefact=artefact, interval=4, correct=correct, **FLOATS)
        found[correct] = relative(picture(made), plain)
        unload(made.pipe)
    assert found["cache"] < found["off"]


@pytest.mark.parametrize("family", ["sd", "pixel"])
def test_more_bits_are_nearer_and_none_is_none(family, tmp_path):
    made = tiny(family)
    plain = picture(made, num_inference_steps=4)
    errors = []
    for bits in ("w16a16", "w8a8", "w4a8"):
        knobs = {"bits": bits, "interval": 2}
        artefact = artefact_for(made, tmp_path, steps=4, **knobs)
        knobs["interval"] = 1
        grafted(made, artefact=artefact, **knobs)
        errors.append(relative(picture(made), plain))
        unload(made.pipe)
    assert errors[0] < 1e-3
    assert all(a < b for a, b in pairwise(errors))
    grafted(made, artefact=artefact, interval=1, **FLOATS)  # no PTQ is no PTQ
    assert not any(isinstance(x, (QuantLinear, QuantConv2d)) for x in made.pipe.unet.modules())
    assert np.array_equal(picture(made), plain)
    assert np.array_equal(picture(type(made)(unload(made.pipe), made.kwargs)), plain)


def test_no_ptq_is_the_cache_alone(tmp_path):
    made = tiny()
    knobs = {"interval": 2}
    artefact = artefact_for(made, tmp_path, **knobs)
    alone = artefact_for(made, tmp_path, **FLOATS, **knobs)
    assert torch.equal(artefact.tensors["gain"], alone.tensors["gain"])
    found = []
    for one in (artefact, alone):
        grafted(made, artefact=one, **FLOATS, **knobs)
        found.append(picture(made))
        unload(made.pipe)
    assert np.array_equal(*found)


def test_every_layer_is_on_a_grid_within_half_a_step_and_the_ends_have_eight_bits(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, steps=4, bits="w4a8", interval=2)
    grafted(made, artefact=artefact, bits="w4a8", interval=2)
    taken = {name: x for name, x in made.pipe.unet.named_modules() if isinstance(x, (QuantLinear, QuantConv2d))}
    plain = [name for name, x in made.pipe.unet.named_modules() if type(x) in (torch.nn.Linear, torch.nn.Conv2d)]
    assert not plain
    for name, layer in taken.items():
        [weights] = layer.weights
        assert weights.grid.bits == (8 if name in ("conv_in", "conv_out") else 4)
        for (w, scale), (q, _) in zip(weights.parts(layer.weight), weights.parts(weights.value), strict=True):
            low, high = (scale.delta * (end - scale.zero) for end in (weights.grid.lowest, weights.grid.highest))
            inside = (w >= low) & (w <= high)
            assert bool(((w - q).abs()[inside] <= (scale.delta / 2 * 1.001 + 1e-7).expand_as(w)[inside]).all())
        for rounder in layer.inputs:
            assert rounder.delta.shape == (4, 1)


def test_the_split_is_where_the_halves_meet_and_the_reader_is_corrected(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, interval=2)
    grafted(made, artefact=artefact, interval=2)
    sizes = from_below(made.pipe.unet, "cachequant")
    assert len(sizes) == 9
    for path, size in sizes.items():
        conv = made.pipe.unet.get_submodule(path).conv1
        assert conv.sizes == (size, conv.in_channels - size)
    corrected = [name for name, x in made.pipe.unet.named_modules() if isinstance(x, CorrectedConv2d)]
    assert corrected == ["up_blocks.2.resnets.2.conv1", "up_blocks.2.resnets.2.conv_shortcut"]
    seen = []
    hook = made.pipe.unet.up_blocks[2].resnets[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    picture(made)
    hook.remove()
    assert set(seen) == {sum(made.pipe.unet.up_blocks[2].resnets[2].conv1.sizes)}


def test_a_corrected_layer_is_its_formula(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, steps=4, bits="w4a8", interval=2)
    grafted(made, artefact=artefact, interval=2, bits="w4a8")
    layer = made.pipe.unet.up_blocks[2].resnets[2].conv1
    pairs = []
    hook = layer.register_forward_hook(lambda _, args, out: pairs.append((args[0], out)))
    picture(made)
    hook.remove()
    key = "unet.up_blocks.2.resnets.2.conv1"
    for i, (x, out) in enumerate(pairs):
        size, w = layer.sizes[0], layer.weights[0].value
        parts = [
            r.grid.rounded(p, type(r.fixed)(r.delta[i], r.zero[i])) for r, p in zip(layer.inputs, x.split(layer.sizes, 1), strict=True)
        ]
        a, b = (artefact.tensors[f"{name}.{key}"][i].view(1, -1, 1, 1) for name in ("gain", "offset"))
        conv = torch.nn.functional.conv2d
        wanted = a * conv(parts[0], w[:, :size], padding=1) + b + conv(parts[1], w[:, size:], layer.bias, padding=1)
        assert torch.allclose(out, wanted, atol=1e-5)


@pytest.mark.parametrize("seed", range(4))
def test_correcting_the_reader_is_nearer_on_what_it_was_fitted_to(seed):
    """A least-squares fit that could have chosen a = 1, b = 0, so it is nearer whatever the weights; by how much is a matter of them."""
    from diffgraft.methods.quant.affine import UniformAffine, nearest_scale
    from diffgraft.methods.quant.layers import quantised
    from diffgraft_cachequant.calibration import read_half

    conv, x = torch.nn.Conv2d(8, 6, 3, padding=1), seeded(4, 5, 6, 6) + 0.5
    conv.weight.data = seeded(6, 8, 3, 3, seed=1 + seed) / 8
    layer = quantised(conv, UniformAffine(3, "channel"), split=5)
    a, b = m.affine(read_half(layer, x, 8))
    grid = UniformAffine(8)
    q = torch.nn.functional.conv2d(grid.rounded(x, nearest_scale(x, grid)), layer.weights[0].value[:, :5], padding=1)
    y = torch.nn.functional.conv2d(x, conv.weight[:, :5], padding=1)
    before, after = (z.detach() - y.detach() for z in (q, m.corrected(q, a, b)))
    assert float(after.norm()) < 0.95 * float(before.norm())


def test_artefacts_are_read_as_they_were_written(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, anew=True, interval=3)
    read = Artefact.load(tmp_path / "a.safetensors", "cachequant")
    assert all(torch.equal(read.tensors[name], artefact.tensors[name]) for name in artefact.tensors)
    load_pipeline(made.pipe, plugins=[("cachequant", {"artefact": tmp_path / "a.safetensors", "interval": 3})])
    from_file = picture(made)
    made.pipe.plugins.configure("cachequant", artefact=artefact)
    assert np.array_equal(picture(made), from_file)
    twin = copy.deepcopy(made.pipe)
    assert np.array_equal(picture(type(made)(twin, made.kwargs)), from_file)
    made.pipe.plugins.configure("cachequant", interval=2)  # less than was calibrated
    assert not np.array_equal(picture(made), from_file)


def test_records_do_not_grow_with_the_number_of_prompts(tmp_path):
    from diffgraft.methods.calibration import calibrate_call

    made = tiny()
    sizes = []
    for rows in (1, 3):
        artefact = calibrate_call(
            made.pipe, CacheQuant(interval=2), lambda rows=rows: picture(made, num_images_per_prompt=rows, num_inference_steps=2)
        )
        sizes.append({name: tuple(value.shape) for name, value in artefact.tensors.items()})
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("scheduler", [HeunDiscreteScheduler, PNDMScheduler])
def test_schedulers_with_several_calls_a_step(scheduler, tmp_path):
    made = tiny()
    made.pipe.scheduler = scheduler.from_config(made.pipe.scheduler.config)
    artefact = artefact_for(made, tmp_path, interval=3, anew=True, **FLOATS)
    calls = len(artefact.tensors["distance"])
    assert calls > 6
    grafted(made, artefact=artefact, interval=3, **FLOATS)
    assert np.isfinite(picture(made)).all()
    assert part(made).total("computed") == -(-calls // 3)


def test_the_report_says_what_is_simulated(tmp_path):
    made = tiny()
    grafted(made, artefact=artefact_for(made, tmp_path, interval=2), interval=2)
    picture(made)
    assert part(made).notes[0].startswith("quantisation is simulated, no speed: w8a8")


# what must not happen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"bits": "w1a8"}, "bits = 'w1a8': write wXaY with X and Y from 2 to 16, or 32"),
        ({"bits": "int8"}, "write wXaY"),
        ({"interval": 0}, "interval = 0"),
        ({"branch": 99, **FLOATS}, "branch = 99: this unet allows 0 to 8"),
        ({"keep": ("conv_outt",), **FLOATS}, r"keep = 'conv_outt': the model has no such layer; did you mean 'conv_out'"),
    ],
)
def test_knobs_that_are_refused(knobs, why):
    made = tiny()
    with pytest.raises(ConfigError, match=why):
        grafted(made, **knobs)
    assert not hasattr(made.pipe, "plugins")
    assert not any(isinstance(x, (QuantLinear, QuantConv2d)) for x in made.pipe.unet.modules())


@pytest.mark.parametrize(
    ("knobs", "without"),
    [
        ({"bits": "w8a8", "interval": 1}, "bits='w32a32'"),
        ({"schedule": "dps", "correct": "off", **FLOATS}, "schedule='uniform'"),
        ({**FLOATS}, "schedule='uniform', correct='off'"),
        ({}, "schedule='uniform', correct='off', bits='w32a32'"),
    ],
)
def test_a_run_without_what_was_to_be_measured_is_refused(knobs, without):
    made = grafted(tiny(), **knobs)
    with pytest.raises(ConfigError, match=rf"artefact = None: best steps, corrections and scales are measured; .* do without: {without}\n"):
        picture(made)


def test_artefacts_of_others_are_refused(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, interval=3, keep=("conv_out",))
    for knobs, why in (
        ({"interval": 4}, r"interval = 4: the artefact was made for up to 3; take interval=3, or .* -o cachequant.interval=4"),
        ({"branch": 2}, r"branch = 2: the artefact was made for 0; take branch=0, or"),
        ({"bits": "w4a8"}, r"bits = 'w4a8': the artefact was made for 'w8a8'; take bits='w8a8', or"),
        ({"keep": ()}, r"keep = \[\]: the artefact was made with 'conv_out' among them, .* take keep=\['conv_out'\], or"),
    ):
        with pytest.raises(ArtefactMismatch, match=why):
            grafted(made, artefact=artefact, **knobs)
    with pytest.raises(ArtefactMismatch):
        grafted(tiny("sdxl"), artefact=artefact, interval=3, keep=("conv_out",))
    uncorrected = artefact_for(made, tmp_path, interval=3, correct="cache")
    with pytest.raises(ArtefactMismatch, match=r"correct = 'both': the artefact was made for 'cache', .*cachequant.correct=both"):
        grafted(made, artefact=uncorrected, correct="both")
    grafted(made, artefact=uncorrected, interval=3, correct="cache", keep=("conv_in",))  # more may stay floats
    unload(made.pipe)
    grafted(made, artefact=artefact, interval=3, keep=("conv_out",))
    with pytest.raises(ArtefactMismatch, match="steps: made for 6, found 5"):
        picture(made, num_inference_steps=5)
    assert type(made.pipe.unet.conv_out) is torch.nn.Conv2d
    bent = Artefact(artefact.made_for, {**artefact.tensors, "scales": -artefact.tensors["scales"]}, artefact.facts)
    with pytest.raises(ArtefactMismatch, match="not above 0"):
        made.pipe.plugins.configure("cachequant", artefact=bent)


def test_the_commands_last_line_runs_where_a_file_fits_one_number_of_steps(tmp_path):
    out = tmp_path / "c.safetensors"
    words = ["quantise", "emoji-pixel", "-p", "cachequant", "--bits", "w32a32", "--samples", "1", "--steps", "2", "--out", str(out)]
    done = CliRunner().invoke(app, [*words, "-o", "cachequant.interval=2"])
    assert done.exit_code == 0, done.output
    assert "w32a32: no layer is quantised; a run with it:" in done.output
    line = shlex.split(done.output.strip().splitlines()[-1])
    made = CliRunner().invoke(app, [*line[1:], "--out", str(tmp_path / "x.png")])
    assert made.exit_code == 0, made.output
    made = CliRunner().invoke(
        app, [*[word for word in line[1:] if word not in ("--steps", "2")], "--steps", "3", "--out", str(tmp_path / "x.png")]
    )
    told = " ".join(made.output.split())
    assert "--pipeline NAME --steps 3 -o cachequant.bits=w32a32 -o cachequant.interval=2`" in told


def test_another_scheduler_is_told_how_to_be_calibrated(tmp_path):
    made = tiny()
    grafted(made, artefact=artefact_for(made, tmp_path, interval=2, **FLOATS))
    made.pipe.scheduler = EulerDiscreteScheduler.from_config(made.pipe.scheduler.config)
    with pytest.raises(
        ArtefactMismatch, match=r"found EulerDiscreteScheduler; .*save_pretrained\('model'\)\) and make one .*--pipeline model"
    ):
        picture(made)


def test_numbers_that_are_none_name_their_layer(tmp_path):
    made = tiny()
    with torch.no_grad():
        made.pipe.unet.down_blocks[0].resnets[0].conv1.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match=r"the inputs of unet\.\S+ hold values"):
        artefact_for(made, tmp_path, anew=True, interval=2)


def test_a_lora_loaded_later_is_refused_and_an_earlier_one_stays_in_floats(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q"])
    made = tiny()
    artefact = artefact_for(made, tmp_path, interval=2)
    grafted(made, artefact=artefact, interval=2)
    made.pipe.unet.add_adapter(config)
    with pytest.raises(Unsupported, match=r"a LoRA was loaded over unet\.\S+to_q"):
        picture(made)
    made = tiny()
    made.pipe.unet.add_adapter(config)
    plain = picture(made, num_inference_steps=4)
    knobs = {"bits": "w16a16", "interval": 1}
    grafted(made, artefact=artefact_for(made, tmp_path, steps=4, anew=True, **knobs), **knobs)
    assert relative(picture(made), plain) < 1e-3


def test_dynamic_inputs_take_their_own_range(tmp_path):
    made = tiny()
    plain = picture(made, num_inference_steps=4)
    knobs = {"interval": 2, "inputs": "dynamic"}
    artefact = artefact_for(made, tmp_path, steps=4, **knobs)
    grafted(made, artefact=artefact, **{**knobs, "interval": 1})
    assert 0 < relative(picture(made), plain) < 0.1
    assert all(rounder.fixed is None for x in made.pipe.unet.modules() if isinstance(x, (QuantLinear, QuantConv2d)) for rounder in x.inputs)
    with pytest.raises(ArtefactMismatch, match="inputs = 'fixed': the artefact was made for 'dynamic'"):
        made.pipe.plugins.configure("cachequant", inputs="fixed")


def test_ranges_are_those_of_all_prompts():
    from diffgraft_cachequant.calibration import Measure

    record = {"distance": torch.zeros(1, 1), "feature": torch.zeros(5, 1, 1, 2)}
    ends = [(-1.0, 2.0), (-3.0, 1.0)]
    seen = {}
    calibrator = Measure(interval=1)
    calibrator.scales = lambda sums, target, calls: seen.update(sums) or (None, {})
    calibrator.summarise([{**record, "low.x": torch.full((1, 1), a), "high.x": torch.full((1, 1), b)} for a, b in ends], None)
    assert (float(seen["low.x"]), float(seen["high.x"])) == (-3, 2)


def test_outside_of_a_run_nobody_says_which_call_it_is(tmp_path):
    made = tiny()
    grafted(made, artefact=artefact_for(made, tmp_path, interval=2), interval=2)
    with pytest.raises(Unsupported, match="ask through the pipeline"):
        made.pipe.unet.conv_in(torch.zeros(1, 4, 8, 8))


def test_half_precision_keeps_the_scales(tmp_path):
    made = tiny()
    grafted(made, artefact=artefact_for(made, tmp_path, interval=2), interval=2)
    made.pipe.to(torch.bfloat16)
    assert bool(made.pipe(**made.kwargs)[0].float().isfinite().all())
    layer = made.pipe.unet.up_blocks[2].resnets[2].conv1
    assert layer.inputs[0].delta.dtype == layer.affine.gain.dtype == torch.float32


def test_all_of_the_split_convolutions_read_a_shortcut():
    made = tiny("svd")
    layers = wanted({"unet": made.pipe.unet}, CacheQuantConfig())
    found = splits(layers, {"unet": made.pipe.unet})
    assert found
    assert all(isinstance(layer, Layer) for layer in layers)
    assert all(".spatial_res_block.conv" in key for key in found)
    assert unpacked(torch.zeros(0), {}) == {}
