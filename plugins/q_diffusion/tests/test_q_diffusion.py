"""Q-Diffusion against its equations, and what must not happen."""

from __future__ import annotations

import copy
import functools
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
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.kept import unpacked
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, quantised, quantised_in
from diffgraft_q_diffusion import QDiffusion
from diffgraft_q_diffusion import method as m
from diffgraft_q_diffusion.plan import splits_of

CLASSES = {"sd": "StableDiffusionPipeline", "pixel": "DDPMPipeline"}
WIDER = {**CLASSES, "sdxl": "StableDiffusionXLPipeline", "svd": "StableVideoDiffusionPipeline", "animatediff": "AnimateDiffPipeline"}
SHORT = {"timesteps": 2, "iterations": 8, "scale_iterations": 4, "batch": 4, "lr": 0.1, "scale_lr": 3e-3}
FINE = {"bits": "w16a16", "softmax": 16, "outside": 16}


def tiny(family="sd"):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(WIDER[family], 0)
    if family != "pixel":
        made.kwargs["output_type"] = "latent"
    return made


def picture(made, **kwargs):
    """The result as an array, from equal noise."""
    found = made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), "output_type": "np", **kwargs})[0]
    return np.asarray(found)


def artefact_for(made, path, steps=4, **knobs):
    """A calibration on this very pipeline."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    sample = Sample(0, prompt=made.kwargs.get("prompt"))
    plugin = QDiffusion(**{"bits": "w3a8", **SHORT, **knobs})
    return calibrate(made.pipe, plugin, [sample], CallSettings(steps=steps, extra=extra), path / "a.safetensors")


@pytest.fixture(scope="module")
def learned_of(tmp_path_factory):
    """family -> (artefact, its folder), made once."""
    folder = tmp_path_factory.mktemp("learned")

    @functools.cache
    def make(family):
        (folder / family).mkdir()
        return artefact_for(tiny(family), folder / family), folder / family

    return make


@pytest.fixture(scope="module")
def learned(learned_of):
    return learned_of("sd")[0]


def far(found, plain):
    return float(np.linalg.norm(found - plain) / np.linalg.norm(plain))


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the shortcuts ------------------------------------------------------------------------------------------------------------------------


def test_timesteps_are_kept_at_equal_distances():
    assert list(m.kept_steps(50, 25)) == list(range(0, 50, 2))
    assert list(m.kept_steps(8, 4)) == [0, 2, 4, 6]
    assert list(m.kept_steps(4, 25)) == [0, 1, 2, 3]


@pytest.mark.parametrize("family", WIDER)
def test_the_splits_are_where_the_model_joins(family):
    made = tiny(family)
    [(name, unet)] = [(name, getattr(made.pipe, name)) for name in registry.families()[family].denoisers]
    seen, joins = {}, []

    def before(block, args, kwargs, number):
        across = kwargs.get("res_hidden_states_tuple") or args[1]
        joins.append((number, [x.shape[1] for x in across]))

    def shortcut(module, args, key):
        seen[key] = args[0].shape[1]

    for i, block in enumerate(unet.up_blocks):
        block.register_forward_pre_hook(lambda b, a, k, i=i: before(b, a, k, i), with_kwargs=True)
    for path, module in unet.up_blocks.named_modules():
        if path.endswith("conv_shortcut"):
            module.register_forward_pre_hook(lambda mod, a, key=f"{name}.up_blocks.{path}": shortcut(mod, a, key))
    picture(made, num_inference_steps=1, output_type="pt" if family == "pixel" else "latent")
    across = dict(joins)
    found = splits_of({name: unet})
    assert found.keys() == seen.keys()
    assert found
    for key, split in found.items():
        _, _, i, _, j, *_ = key.split(".")
        assert split == seen[key] - across[int(i)][-1 - int(j)]


def test_a_hundredfold_skip_costs_the_other_half_its_levels_without_a_split():
    made = tiny()
    [key, *_] = splits = splits_of({"unet": made.pipe.unet})
    layer, split = made.pipe.unet.get_submodule(key.removeprefix("unet.")), splits[key]
    x = seeded(2, layer.in_channels, 8, 8)
    x[:, split:] *= 100
    with torch.no_grad():
        layer.weight[:, split:] /= 100
    y = layer(x)
    grids = UniformAffine(4, "channel"), UniformAffine(8)
    errors = [float((quantised(layer, *grids, split=at)(x) - y).norm() / y.norm()) for at in (0, split)]
    assert errors[1] < 0.2 * errors[0]


# on pipelines -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
def test_more_bits_are_nearer_and_off_is_the_plain_pipeline(family):
    made = tiny(family)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("q_diffusion", FINE)])
    errors = [far(picture(made), plain)]
    for bits in ("w8a8", "w4a8", "w2a8"):
        made.pipe.plugins.configure("q_diffusion", bits=bits, softmax=8, outside=2)
        errors.append(far(picture(made), plain))
    assert 0 < errors[0] < 1e-3
    assert all(a < b for a, b in pairwise(errors))
    made.pipe.plugins.configure("q_diffusion", bits="w32a32")
    assert np.array_equal(picture(made), plain)
    assert np.array_equal(picture(type(made)(unload(made.pipe), made.kwargs)), plain)


@pytest.mark.parametrize("family", CLASSES)
def test_every_layer_is_quantised_and_the_shortcuts_of_the_up_blocks_are_split(family):
    made = tiny(family)
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"bits": "w4a6"})])
    unet = made.pipe.unet
    assert not [name for name, module in unet.named_modules() if type(module) in (torch.nn.Linear, torch.nn.Conv2d)]
    layers = quantised_in({"unet": unet})
    assert {key for key, layer in layers.items() if len(layer.sizes) == 2} == set(splits_of({"unet": unet}))
    assert {len(layer.inputs) for layer in layers.values() if len(layer.sizes) == 2} == {2}
    outside = [layer.weights[0].grid.bits for key, layer in layers.items() if "blocks." not in key and "mid_block" not in key]
    assert set(outside) == {8}
    assert {layer.weights[0].grid.bits for key, layer in layers.items() if "mid_block" in key} == {4}
    rounded = {key.rpartition(".")[2] for key, layer in layers.items() if layer.outputs is not None}
    assert {"to_q", "to_k", "to_v"} <= rounded
    assert all((layer.softmax is not None) == key.endswith("to_q") for key, layer in layers.items())
    assert all(one.grid.bits == 6 for key, layer in layers.items() if (one := layer.outputs) is not None)


def test_the_softmax_has_bits_of_its_own():
    made = tiny("pixel")
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("q_diffusion", {**FINE, "softmax": 3})])
    few = far(picture(made), plain)
    made.pipe.plugins.configure("q_diffusion", softmax=8)
    some = far(picture(made), plain)
    made.pipe.plugins.configure("q_diffusion", softmax=32)
    assert far(picture(made), plain) < some < few


def test_no_block_is_worse_than_rounded_to_the_nearest_and_most_are_better(learned):
    for stage, least in (("weights", 0.5), ("inputs", 0.2)):
        losses = list(learned.facts["losses"][stage].values())
        assert all(after <= before for before, after in losses)
        assert sum(after < before for before, after in losses) > least * len(losses)


def test_both_halves_of_a_split_shortcut_are_learned(learned):
    """The official code learns the second one in blocks, not in single layers."""
    made = tiny()
    ups, scales = (unpacked(learned.tensors[name], learned.facts[name]) for name in ("up", "scales"))
    turned = {0: 0, 1: 0}
    for key, split in splits_of({"unet": made.pipe.unet}).items():
        up, weight = ups.get(f"{key}/weights.0.up"), made.pipe.unet.get_submodule(key.removeprefix("unet.")).weight
        parts = zip(weight.split([split, weight.shape[1] - split], 1), [None] * 2 if up is None else up.split(split, 1)[:2], strict=True)
        for half, (part, up_part) in enumerate(parts):
            ratio = part / scales[f"{key}/weights.0.{half}.delta"]
            turned[half] += 0 if up_part is None else int((up_part != (ratio - ratio.floor() >= 0.5)).sum())
    assert turned[0] > 0
    assert turned[1] > 0


def test_both_halves_of_guidance_and_each_chosen_step_are_calibrated_on(tmp_path, monkeypatch):
    from diffgraft_q_diffusion import calibration

    rows = []
    monkeypatch.setattr(calibration, "learned", lambda records, *_: [rows.append(record["0/1"]) for record in records] and {})
    artefact_for(tiny(), tmp_path, steps=6, timesteps=3)
    [timesteps] = [x.flatten().tolist() for x in rows[:1]]
    assert len(timesteps) == 3 * 2
    assert timesteps[::2] == timesteps[1::2]
    assert len(set(timesteps)) == 3


@pytest.mark.parametrize("family", CLASSES)
def test_learned_beats_nearest_and_its_file_is_the_same(family, learned_of):
    made = tiny(family)
    artefact, folder = learned_of(family)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"artefact": folder / "a.safetensors", "bits": "w3a8"})])
    from_file = picture(made)
    made.pipe.plugins.configure("q_diffusion", artefact=artefact)
    assert np.array_equal(picture(made), from_file)
    assert np.array_equal(picture(type(made)(copy.deepcopy(made.pipe), made.kwargs)), from_file)
    assert made.pipe.plugins.report().plugins["q_diffusion"].notes[0].startswith("simulated, no speed: w3a8, learned,")
    made.pipe.plugins.configure("q_diffusion", artefact=None)
    nearest = picture(made)
    assert "not learned: no artefact" in made.pipe.plugins.report().plugins["q_diffusion"].notes[0]
    assert far(from_file, plain) < far(nearest, plain) * (1.0 if family == "sd" else 1.2)
    layers = quantised_in({"unet": made.pipe.unet})
    assert all(one.fixed is None for layer in layers.values() for one in layer.rounders().values())


def test_weights_alone(tmp_path):
    made = tiny("pixel")
    artefact = artefact_for(made, tmp_path, bits="w3a32", iterations=2)
    assert set(artefact.facts["losses"]) == {"weights"}
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"artefact": artefact, "bits": "w3a32"})])
    assert np.isfinite(picture(made)).all()
    assert not [1 for layer in quantised_in({"unet": made.pipe.unet}).values() if layer.rounders()]


# what must not happen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"bits": "w1a8"}, "bits = 'w1a8': write wXaY with X and Y from 2 to 16, or 32"),
        ({"softmax": 1}, "softmax = 1: bits from 2 to 16, or 32 for floats"),
        ({"outside": 20}, "outside = 20: bits from 2 to 16"),
        ({"keep": ("conv_outt",)}, r"keep = 'conv_outt': the model has no such layer; did you mean 'conv_out'"),
        ({"iterations": 0}, "iterations = 0"),
    ],
)
def test_knobs_that_are_refused(knobs, why):
    made = tiny()
    with pytest.raises(ConfigError, match=why):
        load_pipeline(made.pipe, plugins=[("q_diffusion", knobs)])
    assert not hasattr(made.pipe, "plugins")


def test_artefacts_of_others_are_refused(learned, tmp_path):
    fits = {"artefact": learned, "bits": "w3a8"}
    with pytest.raises(ArtefactMismatch, match=r"bits = 'w4a8', and it was made for 'w3a8'.*-o q_diffusion.bits=w4a8"):
        load_pipeline(tiny().pipe, plugins=[("q_diffusion", {**fits, "bits": "w4a8"})])
    for knobs in ({"softmax": 16}, {"split": False}, {"outside": 4}, {"keep": ("conv_out",)}):
        [name] = knobs
        with pytest.raises(ArtefactMismatch, match=f"{name} = "):
            load_pipeline(tiny().pipe, plugins=[("q_diffusion", {**fits, **knobs})])
    with pytest.raises(ArtefactMismatch):
        load_pipeline(tiny("pixel").pipe, plugins=[("q_diffusion", fits)])
    facts = {**learned.facts, "scales": {k: v for k, v in learned.facts["scales"].items() if "conv_in/" not in k}}
    lost = sum(int(np.prod(v)) for k, v in learned.facts["scales"].items() if "conv_in/" in k)
    less = Artefact(learned.made_for, {**learned.tensors, "scales": learned.tensors["scales"][lost:]}, facts)
    with pytest.raises(ArtefactMismatch, match=r"says nothing of the layer unet\.conv_in"):
        load_pipeline(tiny().pipe, plugins=[("q_diffusion", {**fits, "artefact": less})])
    short = Artefact(learned.made_for, {**learned.tensors, "scales": learned.tensors["scales"][1:]}, learned.facts)
    with pytest.raises(ArtefactMismatch, match="its shapes say"):
        load_pipeline(tiny().pipe, plugins=[("q_diffusion", {**fits, "artefact": short})])


def test_numbers_that_are_none_name_their_block(tmp_path):
    made = tiny()
    with torch.no_grad():
        made.pipe.unet.down_blocks[0].resnets[0].conv1.bias[0] = torch.nan
    with pytest.raises(NotFinite, match=r"unet\.down_blocks\.0\.resnets\.0"):
        artefact_for(made, tmp_path)


def test_a_lora_loaded_later_is_refused_and_an_earlier_one_stays_in_floats():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q"])
    made = tiny()
    load_pipeline(made.pipe, plugins=["q_diffusion"])
    made.pipe.unet.add_adapter(config)
    with pytest.raises(Unsupported, match=r"a LoRA was loaded over unet\.\S+to_q"):
        picture(made)
    made = tiny()
    made.pipe.unet.add_adapter(config)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("q_diffusion", FINE)])
    assert far(picture(made), plain) < 1e-3


def test_half_precision(learned):
    made = tiny()
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"artefact": learned, "bits": "w3a8"})])
    made.pipe.to(torch.bfloat16)
    assert bool(made.pipe(**made.kwargs)[0].float().isfinite().all())
    layer = next(x for x in quantised_in({"unet": made.pipe.unet}).values() if isinstance(x, (QuantLinear, QuantConv2d)) and x.inputs)
    assert layer.inputs[0].fixed.delta.dtype == torch.float32


def test_a_lora_that_is_unloaded_meanwhile_leaves_no_quantised_layer_behind():
    """peft puts what lay under its layer, ours, in that layer's place."""
    peft = pytest.importorskip("peft")
    made = tiny()
    plain = picture(made)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_v"]))
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"bits": "w4a8"})])
    picture(made)
    made.pipe.unload_lora_weights()
    assert not np.array_equal(picture(made), plain)
    made.pipe.plugins.clear()
    assert not quantised_in({"unet": made.pipe.unet})
    assert np.array_equal(picture(made), plain)
    load_pipeline(made.pipe, plugins=[("q_diffusion", {"bits": "w4a8"})])
