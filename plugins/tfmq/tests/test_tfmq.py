"""TFMQ against its equations, and what must not happen."""

from __future__ import annotations

import copy
import importlib
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, NotFinite, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample
from diffgraft.methods.quant.affine import Scale, UniformAffine, nearest_scale, searched_scale
from diffgraft.methods.quant.kept import unpacked
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, quantised_in
from diffgraft_tfmq import TFMQ
from diffgraft_tfmq import method as m
from diffgraft_tfmq.calibration import Measure, Pairs, by_timestep
from diffgraft_tfmq.path import TimePath

CLASSES = {
    "sd": "StableDiffusionPipeline",
    "sdxl": "StableDiffusionXLPipeline",
    "pixel": "DDPMPipeline",
    "latent_diffusion": "LDMTextToImagePipeline",
}


def tiny(family="sd"):
    module, function = registry.families()[family].tiny.split(":")
    return getattr(importlib.import_module(module), function)(CLASSES[family], 0)


def picture(made, seed=0, **kwargs):
    """The result as an array, from equal noise."""
    out = made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(seed), **kwargs})[0]
    return out.float().numpy() if isinstance(out, torch.Tensor) else np.stack([np.asarray(each) for each in out])


def artefact_for(made, path, steps=4, prompts=1, **knobs):
    """A calibration on this very pipeline."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    samples = [Sample(i, prompt=made.kwargs.get("prompt")) for i in range(prompts)]
    settings = CallSettings(steps=steps, extra=extra)
    return calibrate(made.pipe, TFMQ(**{"iterations": 10, **knobs}), samples, settings, path / "a.safetensors")


@pytest.fixture(autouse=True)
def no_search(request, monkeypatch):
    """Eighty grids for each weight take most of a calibration's time on models as small as these; one test has them."""
    if "searched" not in request.node.name:
        monkeypatch.setattr("diffgraft_tfmq.calibration.searched_scale", nearest_scale)


@pytest.fixture(scope="module")
def made_for_sd(tmp_path_factory):
    """An artefact in w4a8 for the tiny Stable Diffusion."""
    return artefact_for(tiny(), tmp_path_factory.mktemp("sd"), bits="w4a8", prompts=1)


def error(found, plain):
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def part(made):
    return made.pipe.plugins.report().plugins["tfmq"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the equations ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_the_step_of_a_timestep_is_never_longer_than_that_of_all_and_bounds_its_error(bits):
    inputs = [seeded(64, seed=i) * 3.0**i + i for i in range(-3, 3)]
    low, high = (torch.stack([getattr(x, end)() for x in inputs]) for end in ("amin", "amax"))
    grid = UniformAffine(bits)
    own, one = m.finite_set(low, high, grid), m.finite_set(low, high, grid, one=True)
    assert own.delta.shape == one.zero.shape == (6, 1)
    assert bool((own.delta <= one.delta).all())
    assert bool((own.delta < one.delta / 10).any())
    for i, x in enumerate(inputs):
        rounded = grid.rounded(x, Scale(own.delta[i], own.zero[i]))
        # z is rounded too, so an end may lie half a step outside of the grid
        assert float((rounded - x).abs().max()) <= float(own.delta[i]) * 1.001
        inside = (x > low[i] + own.delta[i]) & (x < high[i] - own.delta[i])
        assert bool(((rounded - x).abs() <= own.delta[i] / 2 * 1.001)[inside].all())


def test_the_objective_is_the_sum_of_all_features_squared_distances():
    from diffgraft.methods.quant.rounding import distance

    ours, theirs = ([seeded(7, c, seed=c + s) for c in (3, 5, 8)] for s in (0, 100))
    written_out = sum(float((g - h).pow(2).sum(1).mean()) for g, h in zip(ours, theirs, strict=True))
    assert float(distance(m.features(ours), m.features(theirs))) == pytest.approx(written_out, rel=1e-5)


def test_the_nearest_calibrated_timestep():
    times = torch.tensor([751.0, 501.0, 251.0, 1.0])
    assert [int(m.nearest_time(torch.tensor(t), times)) for t in (999, 751, 620, 260, 1, 0)] == [0, 0, 1, 2, 3, 3]
    assert int(m.nearest_time(torch.tensor([251]), times)) == 2
    assert m.nearest_time(torch.tensor([240, 999, 1]), times).tolist() == [2, 0, 3]  # of several each one's


def test_what_is_kept_and_what_is_temporal():
    kept = ("conv_in", "conv_out", "up_blocks.1.resnets.0.conv_shortcut", "down_blocks.0.downsamplers.0.conv", "add_embedding.linear_1")
    assert all(map(m.is_kept, kept))
    taken = ("up_blocks.0.upsamplers.0.conv", "mid_block.resnets.0.conv1", "time_embedding.linear_1", "down_blocks.0.attentions.0.proj_in")
    assert not any(map(m.is_kept, taken))
    assert m.is_temporal("mid_block.resnets.0.time_emb_proj")
    assert m.is_temporal("time_embedding.linear_2")
    assert not m.is_temporal("add_embedding.linear_1")


def test_pairs_are_each_timestep_with_each_vector():
    pairs = Pairs(torch.tensor([5.0, 3.0]), torch.tensor([[1.0], [2.0], [3.0]]))
    assert len(pairs) == 6
    t, add = pairs.of([0, 2, 3, 5])
    assert t.tolist() == [5, 5, 3, 3]
    assert add[:, 0].tolist() == [1, 3, 1, 3]


def test_ranges_of_a_timestep_that_was_asked_twice_and_of_one_that_was_not_reached():
    calls, nan = torch.tensor([9.0, 9.0, 4.0]), [torch.nan, torch.nan]
    records = [
        {"times": calls, "ends.a": torch.tensor([[-1.0, 1.0], [-3.0, 0.5], [0.0, 2.0]]), "ends.b": torch.tensor([[-1.0, 1.0], nan, nan])},
        {"times": calls, "ends.a": torch.tensor([[-2.0, 2.0], [-1.0, 3.0], [0.0, 4.0]]), "ends.b": torch.tensor([[-3.0, 5.0], nan, nan])},
    ]
    times, low, high = by_timestep(records)
    assert times.tolist() == [9, 4]
    assert low["a"].tolist() == [-3, 0]
    assert high["a"].tolist() == [3, 4]
    assert (low["b"].tolist(), high["b"].tolist()) == ([-3, -3], [5, 5])
    with pytest.raises(ConfigError, match="different timesteps"):
        by_timestep([records[0], {**records[1], "times": calls + 1}])


# reconstruction ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_loss_falls_and_what_was_learned_beats_the_nearest(family, tmp_path):
    artefact = artefact_for(tiny(family), tmp_path, bits="w4a32", iterations=150)
    (before, after), (near, learned) = artefact.facts["distance"], artefact.facts["cosine"]
    assert after < 0.9 * before
    assert learned > near
    if family == "sd":  # there all of the features' inputs are the timesteps
        made, times, none = tiny(), artefact.tensors["times"], torch.zeros(4, 0)
        exact = TimePath(made.pipe.unet)(times, none)
        load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": artefact})])
        assert float(m.similarity(TimePath(made.pipe.unet)(times, none), exact)) == pytest.approx(learned, abs=1e-6)


def test_without_steps_the_rounding_is_the_nearest_on_the_searched_grid(tmp_path):
    artefact = artefact_for(tiny("pixel"), tmp_path, bits="w4a32", iterations=0)
    made = tiny("pixel")
    layer = made.pipe.unet.mid_block.resnets[0].time_emb_proj
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": artefact})])
    grid = UniformAffine(4, "channel")
    wanted = grid.rounded(layer.weight.detach(), searched_scale(layer.weight.detach(), grid))
    assert torch.equal(made.pipe.unet.mid_block.resnets[0].time_emb_proj.weights[0].value, wanted)


def test_reconstruction_looks_at_no_picture(tmp_path):
    """Other prompts and noise give other ranges of the convolutions' inputs, and the very same rounding of the time path."""
    artefacts = []
    for i, prompt in enumerate(("a red apple", "two small dogs at the sea")):
        made = tiny()
        made.kwargs["prompt"] = prompt
        folder = tmp_path / str(i)
        folder.mkdir()
        artefacts.append(artefact_for(made, folder, bits="w4a8"))
    ups, scales = ([unpacked(a.tensors[kind], a.facts[kind]) for a in artefacts] for kind in ("up", "scales"))
    assert ups[0]
    assert all(m.is_temporal(name.partition("/")[0].partition(".")[2]) for name in ups[0])
    assert all(torch.equal(ups[0][name], ups[1][name]) for name in ups[0])
    inputs = {name for name in scales[0] if "/inputs." in name}
    temporal = {name for name in inputs if m.is_temporal(name.partition("/")[0].partition(".")[2])}
    assert all(torch.equal(scales[0][name], scales[1][name]) for name in temporal)
    assert any(not torch.equal(scales[0][name], scales[1][name]) for name in inputs - temporal)


def test_the_scales_of_the_time_path_are_those_of_its_own_inputs(made_for_sd):
    """Each is the range of what comes in at its timestep, so a run at it needs no other."""
    made = tiny()
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": made_for_sd})])
    layer = made.pipe.unet.mid_block.resnets[0].time_emb_proj
    seen = []
    layer.see = lambda x: seen.append((x.amin(), x.amax()))
    picture(made, num_inference_steps=4)
    grid, rounder = layer.inputs[0].grid, layer.inputs[0]
    wanted = [grid.scale(*each) for each in dict.fromkeys(seen)]
    assert len(wanted) == len(rounder.delta) == 4
    assert torch.allclose(torch.stack([each.delta for each in wanted]), rounder.delta[:, 0], rtol=1e-4)


def test_one_scale_is_the_longest(tmp_path):
    (tmp_path / "one").mkdir()
    own, one = (
        artefact_for(tiny(), tmp_path / folder, bits="w4a8", iterations=0, **knobs)
        for folder, knobs in ((".", {}), ("one", {"scales": "one"}))
    )
    deltas = [unpacked(a.tensors["scales"], a.facts["scales"]) for a in (own, one)]
    several = 0
    for name in (n for n in deltas[0] if n.endswith("inputs.0.delta")):
        if not m.is_temporal(name.partition("/")[0].partition(".")[2]):  # those depend on the roundings before them
            assert bool((deltas[0][name] <= deltas[1][name] * 1.0001).all())
        assert len(deltas[1][name].unique()) == 1
        several += len(deltas[0][name].unique()) > 1
    assert several > 5


# on pipelines -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
def test_more_bits_are_nearer_and_off_is_the_plain_pipeline(family):
    made = tiny(family)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("tfmq", {"bits": "w16a16"})])
    errors = []
    for bits in ("w16a16", "w8a8", "w4a8", "w2a8"):
        made.pipe.plugins.configure("tfmq", bits=bits)
        errors.append(error(picture(made), plain))
    assert errors[0] < 1e-3
    assert all(a < b for a, b in pairwise(errors))
    names = {name for name, module in made.pipe.unet.named_modules() if isinstance(module, (QuantLinear, QuantConv2d))}
    plain_names = {name for name, module in made.pipe.unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)}
    assert names
    assert all(m.is_kept(name) for name in plain_names)
    assert not any(m.is_kept(name) for name in names)
    made.pipe.plugins.configure("tfmq", bits="w32a32")
    assert np.array_equal(picture(made), plain)
    unload(made.pipe)
    assert np.array_equal(picture(made), plain)


def test_at_many_bits_a_calibration_costs_nothing_and_cuts_off_nothing_that_it_was_made_of(tmp_path):
    """Ranges are the extremes of all prompts: their mean would cut off what most of them hold."""
    made = tiny()
    plain = [picture(made, seed, num_inference_steps=4) for seed in range(3)]
    artefact = artefact_for(made, tmp_path, prompts=3, bits="w16a16", iterations=0)
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": artefact})])
    layers = quantised_in({"unet": made.pipe.unet}).values()
    beyond = []

    def seeing(rounder):
        def see(x):
            (delta, zero), highest = rounder.now(), rounder.grid.highest
            beyond.append(float(torch.maximum(-zero * delta - x.amin(), x.amax() - (highest - zero) * delta) / (delta * highest)))

        return see

    for layer in layers:
        layer.show(seeing(layer.inputs[0]))
    found = [picture(made, seed, num_inference_steps=4) for seed in range(3)]
    assert max(error(*each) for each in zip(found, plain, strict=True)) < 1e-3
    assert max(beyond) < 1e-3  # of a layer's range


@pytest.mark.parametrize("family", ["sd", "pixel"])
def test_calibration_leaves_the_pipeline_as_it_was_and_its_file_says_all(family, tmp_path):
    made = tiny(family)
    plain = picture(made)
    gradients = [parameter.requires_grad_(True).grad for parameter in made.pipe.unet.parameters()]
    artefact = artefact_for(made, tmp_path, prompts=2)
    assert gradients == [parameter.grad for parameter in made.pipe.unet.parameters()]  # none
    assert np.array_equal(picture(made), plain)
    read = Artefact.load(tmp_path / "a.safetensors", "tfmq")
    assert all(torch.equal(read.tensors[name], artefact.tensors[name]) for name in artefact.tensors)
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": tmp_path / "a.safetensors"})])
    from_file = picture(made)
    made.pipe.plugins.configure("tfmq", artefact=artefact)
    assert np.array_equal(picture(made), from_file)
    before, after = artefact.facts["distance"]
    assert ("the time path as learned" if after < before else "to the nearest, calibrated") in part(made).notes[0]
    assert family == "pixel" or after < before
    assert error(from_file, plain) < 0.5
    twin = copy.deepcopy(made.pipe)
    assert np.array_equal(picture(type(made)(twin, made.kwargs)), from_file)
    assert np.array_equal(picture(made, num_inference_steps=3), picture(type(made)(twin, made.kwargs), num_inference_steps=3))


def test_each_step_takes_the_scale_of_its_timestep(made_for_sd):
    made = tiny()
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": made_for_sd})])
    rounder = next(iter(quantised_in({"unet": made.pipe.unet}).values())).inputs[0]
    at, pick = [], rounder.pick
    rounder.pick = lambda: at.append(int(pick())) or pick()
    picture(made, num_inference_steps=4)
    assert at == sorted(at)
    assert set(at) == {0, 1, 2, 3}
    with pytest.raises(Unsupported, match="ask through the pipeline"):
        rounder(torch.zeros(1, 3))


def test_beside_one_that_edits_the_timestep_the_scale_is_that_of_what_the_denoiser_is_given(made_for_sd):
    pytest.importorskip("diffgraft_time_shift")
    shift = ("time_shift", {"window": 300, "cutoff": 0, "data_variance": 0.0})
    for plugins in ([("tfmq", {"artefact": made_for_sd}), shift], [shift, ("tfmq", {"artefact": made_for_sd})]):
        made = tiny()
        load_pipeline(made.pipe, plugins=plugins)
        rounder, times = next(iter(quantised_in({"unet": made.pipe.unet}).values())).inputs[0], made_for_sd.tensors["times"]
        given, pick = [], rounder.pick
        made.pipe.unet.time_proj.register_forward_pre_hook(lambda module, args, given=given: given.append(args[0].reshape(-1)[0]))
        rounder.pick = lambda pick=pick, given=given, times=times: (
            given.append((int(pick().reshape(-1)[0]), int(m.nearest_time(next(g for g in reversed(given) if torch.is_tensor(g)), times))))
            or pick()
        )
        picture(made, num_inference_steps=4)
        at = [each for each in given if isinstance(each, tuple)]
        assert all(taken == wanted for taken, wanted in at)
        assert [taken for taken, _ in dict.fromkeys(at)] != [0, 1, 2, 3]  # the times were edited by more than a step


def test_rows_at_timesteps_of_their_own_have_scales_of_their_own(made_for_sd):
    made = tiny()
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": made_for_sd})])
    rounder = next(iter(quantised_in({"unet": made.pipe.unet}).values())).inputs[0]
    x, times = seeded(3, 4, 5), made_for_sd.tensors["times"]
    rounder.pick = lambda: m.nearest_time(times[[2, 0, 1]], times)
    together = rounder(x)
    alone = []
    for row, at in zip(x, (2, 0, 1), strict=True):
        rounder.pick = lambda at=at: at
        alone.append(rounder(row[None]))
    assert torch.equal(together, torch.cat(alone))
    rounder.pick = lambda: torch.tensor([2, 0])
    with pytest.raises(Unsupported, match="the timestep has 2 values, and a layer gets 3 rows"):
        rounder(x)


# what must not happen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"bits": "w1a8"}, "bits = 'w1a8': write wXaY with X and Y from 2 to 16, or 32"),
        ({"bits": "int8"}, "write wXaY"),
        ({"keep": ("mid_blokc",)}, r"keep = 'mid_blokc': the model has no such layer; did you mean 'mid_block'"),
        ({"iterations": -1}, "iterations = -1"),
    ],
)
def test_knobs_that_are_refused(knobs, why):
    made = tiny()
    with pytest.raises(ConfigError, match=why):
        load_pipeline(made.pipe, plugins=[("tfmq", knobs)])
    assert not hasattr(made.pipe, "plugins")


def test_artefacts_of_others_are_refused(tmp_path):
    artefact = artefact_for(tiny(), tmp_path, iterations=0, keep=("mid_block",))
    with pytest.raises(ArtefactMismatch):
        load_pipeline(tiny("pixel").pipe, plugins=[("tfmq", {"artefact": artefact})])
    with pytest.raises(ArtefactMismatch, match=r"bits = 'w8a8', and it was made for 'w4a8'; .*-o tfmq.bits=w8a8"):
        load_pipeline(tiny().pipe, plugins=[("tfmq", {"artefact": artefact, "bits": "w8a8"})])
    with pytest.raises(ArtefactMismatch, match=r"scales = 'one', and it was made for 'timesteps'; .*-o tfmq.scales=one"):
        load_pipeline(tiny().pipe, plugins=[("tfmq", {"artefact": artefact, "keep": ("mid_block",), "scales": "one"})])
    with pytest.raises(ArtefactMismatch, match=r"keep = \['mid_block', 'time_embedding'\], and it was made for \['mid_block'\]"):
        load_pipeline(tiny().pipe, plugins=[("tfmq", {"artefact": artefact, "keep": ("mid_block", "time_embedding")})])
    made = tiny()
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": artefact, "keep": ("mid_block",), "scales": "timesteps", "bits": "w4a8"})])
    picture(made)
    assert "to the nearest, calibrated" in part(made).notes[0]  # no iterations: nothing was learned


def test_a_time_path_that_is_another_one_is_refused():
    module, function = registry.families()["latent_consistency"].tiny.split(":")
    unet = getattr(importlib.import_module(module), function)("LatentConsistencyModelPipeline", 0).pipe.unet
    made = tiny()
    made.pipe.unet = unet
    with pytest.raises(Unsupported, match=r"has time_embedding.cond_proj, and its temporal features are not"):
        load_pipeline(made.pipe, plugins=["tfmq"])
    with pytest.raises(Unsupported, match=r"has time_embedding.cond_proj"):  # before the runs of a calibration, not after its iterations
        load_pipeline(made.pipe, plugins=[Measure()])


def test_what_was_not_kept_is_not_told(monkeypatch, tmp_path):
    learn = importlib.import_module("diffgraft_tfmq.calibration").learn_rounding
    monkeypatch.setattr("diffgraft_tfmq.calibration.learn_rounding", lambda *a: learn(*a)._replace(after=1e9, kept=False))
    before, after = artefact_for(tiny(), tmp_path, bits="w4a32").facts["distance"]
    assert after == before


def test_numbers_that_are_none_name_their_layer(tmp_path):
    made = tiny()
    with torch.no_grad():
        made.pipe.unet.mid_block.resnets[0].conv1.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match=r"the inputs of unet\.\S+ hold values"):
        artefact_for(made, tmp_path)


def test_a_lora_loaded_later_is_refused_and_an_earlier_one_stays_in_floats(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "time_emb_proj"])
    made = tiny()
    load_pipeline(made.pipe, plugins=["tfmq"])
    made.pipe.unet.add_adapter(config)
    with pytest.raises(Unsupported, match=r"a LoRA was loaded over unet\.\S+"):
        picture(made)
    made = tiny()
    made.pipe.unet.add_adapter(config)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("tfmq", {"bits": "w16a16"})])
    assert error(picture(made), plain) < 1e-3
    unload(made.pipe)
    assert artefact_for(made, tmp_path, bits="w4a32").facts["cosine"][1] > 0.9  # reconstructed with the LoRA in it


def test_half_precision(made_for_sd):
    made = tiny()
    load_pipeline(made.pipe, plugins=[("tfmq", {"artefact": made_for_sd})])
    made.pipe.to(torch.bfloat16)
    assert bool(np.isfinite(picture(made)).all())
    assert next(iter(quantised_in({"unet": made.pipe.unet}).values())).inputs[0].delta.dtype == torch.float32
