"""ViDiT-Q against its equations, and what must not happen. Against torchao's int8 layers: test_against_torchao.py."""

from __future__ import annotations

import copy
import importlib
import re
from itertools import pairwise

import numpy as np
import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, NotFinite, Unsupported, load_pipeline, unload
from diffgraft.installed import registry
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.calibration import calibrate
from diffgraft.methods.inputs import CallSettings, Sample, call_arguments
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.export import ensure_kernel
from diffgraft.methods.quant.kept import unpacked
from diffgraft.methods.quant.layers import QuantLinear, quantised
from diffgraft.methods.quant.rotation import Rotation
from diffgraft_vidit_q import ViDiTQ
from diffgraft_vidit_q import method as m
from diffgraft_vidit_q.calibration import wanted
from diffgraft_vidit_q.knobs import ViDiTQConfig

CLASSES = {
    "flux": "FluxPipeline",
    "wan": "WanPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "pixart": "PixArtAlphaPipeline",
    "dit": "DiTPipeline",
}


def tiny(family="flux"):
    module, function = registry.families()[family].tiny.split(":")
    made = getattr(importlib.import_module(module), function)(CLASSES[family], 0)
    if family != "dit":
        made.kwargs["output_type"] = "latent"
    return made


def picture(made, **kwargs):
    """The result as an array, from equal noise."""
    return np.asarray(made.pipe(**{**made.kwargs, "generator": torch.Generator().manual_seed(0), **kwargs})[0])


def artefact_for(made, path, steps=4, prompts=1, **knobs):
    """A calibration on this very pipeline."""
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "class_labels", "num_inference_steps", "output_type")}
    prompt = made.kwargs.get("prompt")
    samples = [Sample(i, prompt=prompt, class_label=None if prompt else 3) for i in range(prompts)]
    return calibrate(made.pipe, ViDiTQ(**knobs), samples, CallSettings(steps=steps, extra=extra), path / "a.safetensors")


def part(pipe):
    return pipe.plugins.report().plugins["vidit_q"]


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# the equations ------------------------------------------------------------------------------------------------------------------------


def test_channel_size_is_the_batch_mean_of_the_largest_token():
    x = torch.tensor([[[1.0, -4.0], [-3.0, 2.0]], [[5.0, 0.0], [0.0, -6.0]]])
    assert torch.equal(m.channel_size(x), torch.tensor([4.0, 5.0]))
    assert torch.equal(m.channel_size(x[:, 0]), torch.tensor([3.0, 2.0]))  # a vector a sample, as adaLN gets


def test_balance_is_its_formula_and_an_identity():
    layer = torch.nn.Linear(12, 5).double()
    a, x = seeded(2, 12).abs().double() * 10, seeded(3, 4, 12).double()
    s = m.balance(a, layer.weight, 0.11)
    wanted = a**0.11 / layer.weight.abs().amax(0) ** 0.89
    assert torch.allclose(s.double(), wanted, rtol=1e-5)
    s = s.double()
    for i in range(2):
        y = (x / s[i]) @ (layer.weight * s[i]).T + layer.bias
        assert float((y - layer(x)).abs().max()) < 1e-13
    silent = m.balance(torch.tensor([[0.0, 1.0, 2.0], [0.0, 0.0, 0.0]]), torch.zeros(5, 3), 0.3)
    assert bool(silent.isfinite().all())
    assert bool((silent > 0).all())
    assert torch.equal(silent[1], torch.ones(3))  # a layer that got nothing


def test_the_range_changes_between_500_and_501():
    assert [int(m.range_of(torch.tensor(t), (500,))) for t in (0, 1, 499, 500, 500.5, 501, 1000)] == [0, 0, 0, 0, 1, 1, 1]
    assert int(m.range_of(torch.tensor(3.0), ())) == 0
    assert [int(m.range_of(torch.tensor(t), (250, 500, 750))) for t in (250, 251, 750, 999)] == [0, 1, 2, 3]


def test_layers_are_known_by_their_paths():
    assert m.kind_of("transformer.blocks.0.attn2.to_q") == "cross"
    assert m.kind_of("transformer.blocks.0.attn1.to_out.0") == "attention"
    assert m.kind_of("transformer.single_transformer_blocks.3.norm.linear") == "modulation"
    assert m.kind_of("transformer.blocks.0.ffn.net.2") == "mlp"
    assert m.group_of("transformer.blocks.11.ffn.net.2") == "transformer.blocks.11:mlp"


def test_the_most_sensitive_of_each_kind_are_raised_up_to_the_share():
    sizes = {"t.b.0:mlp": 10, "t.b.1:mlp": 10, "t.b.2:mlp": 10, "t.b.0:cross": 4, "t.b.1:cross": 4}
    hurt = {"t.b.0:mlp": 0.1, "t.b.1:mlp": 0.9, "t.b.2:mlp": 0.5, "t.b.0:cross": 1e-9, "t.b.1:cross": 1e-6}
    assert m.raised(hurt, sizes, 0) == set()
    assert m.raised(hurt, sizes, 0.34) == {"t.b.1:mlp"}
    assert m.raised(hurt, sizes, 0.5) == {"t.b.1:mlp", "t.b.1:cross"}  # cross is not held against mlp
    assert m.raised(hurt, sizes, 1) == set(sizes)


# on pipelines -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", CLASSES)
def test_more_bits_are_nearer_and_off_is_the_plain_pipeline(family):
    made = tiny(family)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w16a16"})])
    errors = []
    for bits in ("w16a16", "w8a8", "w4a8", "w2a8"):
        made.pipe.plugins.configure("vidit_q", bits=bits)
        errors.append(float(np.linalg.norm(picture(made) - plain) / np.linalg.norm(plain)))
    assert errors[0] < 1e-3
    assert all(a < b for a, b in pairwise(errors))
    made.pipe.plugins.configure("vidit_q", bits="w32a32")
    assert np.array_equal(picture(made), plain)
    made.pipe.plugins.configure("vidit_q", bits="w8a32")
    assert 0 < float(np.linalg.norm(picture(made) - plain) / np.linalg.norm(plain)) < errors[2]
    assert np.array_equal(picture(type(made)(unload(made.pipe), made.kwargs)), plain)


@pytest.mark.parametrize("family", CLASSES)
def test_what_is_outside_of_the_blocks_stays_floats(family):
    made = tiny(family)
    load_pipeline(made.pipe, plugins=["vidit_q"])
    plain = [name for name, module in made.pipe.transformer.named_modules() if type(module) is torch.nn.Linear]
    taken = [name for name, module in made.pipe.transformer.named_modules() if isinstance(module, QuantLinear)]
    assert taken
    assert all("blocks." in name and "emb" not in name for name in taken)
    assert all("blocks." not in name or "emb" in name for name in plain)
    weights = {
        n: sum(made.pipe.transformer.get_submodule(x).weight.numel() for x in names) for n, names in (("plain", plain), ("taken", taken))
    }
    assert weights["taken"] > weights["plain"] or family in ("dit", "wan", "pixart")  # tiny models are mostly embedders


def test_calibration_leaves_the_pipeline_as_it_was_and_finds_what_comes_in(tmp_path):
    made = tiny()
    plain = picture(made)
    layers = wanted({"transformer": made.pipe.transformer}, ViDiTQConfig())
    seen = {layer.key: [] for layer in layers}
    hooks = [x.module.register_forward_pre_hook(lambda _, args, key=x.key: seen[key].append(m.channel_size(args[0]))) for x in layers]
    extra = {k: v for k, v in made.kwargs.items() if k not in ("prompt", "num_inference_steps", "output_type")}
    for seed in range(2):
        made.pipe(**call_arguments(made.pipe, [Sample(seed, made.kwargs["prompt"])], CallSettings(steps=3, extra=extra)))
    for hook in hooks:
        hook.remove()
    artefact = artefact_for(made, tmp_path, steps=3, prompts=2)
    assert np.array_equal(picture(made), plain)
    found = unpacked(artefact.tensors["size"], artefact.facts["shapes"])
    assert found.keys() == seen.keys()
    for key, sizes in seen.items():
        weights = torch.tensor([m.MOMENTUM ** (len(sizes) - 1 - i) for i in range(len(sizes))])
        assert len(sizes) >= 6
        assert torch.allclose(found[key][0], (torch.stack(sizes) * weights[:, None]).sum(0) / weights.sum(), rtol=1e-3, atol=1e-6)


def test_the_mean_is_that_of_all_calls_in_order():
    """Two records, folded, are one mean with momentum over both runs' calls, its first value not weighted more."""
    from diffgraft_vidit_q.calibration import Measure, Seen

    calls = [seeded(2, 3, 4, seed=i) for i in range(7)]
    records = []
    for some in (calls[:3], calls[3:]):
        seen = Seen(at=torch.tensor([[True]]))
        for x in some:
            seen.add("t.blocks.0.ff", x)
        records.append({"sum.t.blocks.0.ff": seen.sums["t.blocks.0.ff"], "count.t.blocks.0.ff": seen.counts["t.blocks.0.ff"]})
    tensors, facts = Measure().summarise(records)
    weights = torch.tensor([m.MOMENTUM ** (6 - i) for i in range(7)])
    wanted = sum(w * m.channel_size(x) for w, x in zip(weights, calls, strict=True)) / weights.sum()
    assert torch.allclose(unpacked(tensors["size"], facts["shapes"])["t.blocks.0.ff"][0], wanted, rtol=1e-4)


def test_a_layer_that_gets_no_tokens_is_neither_measured_nor_in_the_way():
    from diffgraft_vidit_q.calibration import Measure, Seen

    seen = Seen(at=torch.tensor([[True]]))
    seen.add("t.blocks.0.add_k_proj", torch.zeros(2, 0, 4))
    seen.add("t.blocks.0.to_k", torch.ones(2, 3, 4))
    records = {f"sum.{key}": value for key, value in seen.sums.items()} | {f"count.{key}": value for key, value in seen.counts.items()}
    tensors, facts = Measure().summarise([records])
    found = unpacked(tensors["size"], facts["shapes"])
    assert torch.equal(found["t.blocks.0.add_k_proj"], torch.zeros(1, 4))
    assert torch.allclose(found["t.blocks.0.to_k"], torch.ones(1, 4))
    layer = quantised(torch.nn.Linear(4, 3), UniformAffine(8, "channel"), UniformAffine(8, "token"))
    assert layer(torch.zeros(2, 0, 4)).shape == (2, 0, 3)


def test_balanced_runs_and_their_files(tmp_path):
    made = tiny()
    plain = picture(made)
    artefact = artefact_for(made, tmp_path, ranges=(500,))
    read = Artefact.load(tmp_path / "a.safetensors", "vidit_q")
    assert all(torch.equal(read.tensors[name], artefact.tensors[name]) for name in artefact.tensors)
    load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": tmp_path / "a.safetensors", "bits": "w4a8"})])
    from_file = picture(made)
    made.pipe.plugins.configure("vidit_q", artefact=artefact)
    assert np.array_equal(picture(made), from_file)
    assert not np.array_equal(from_file, plain)
    twin = copy.deepcopy(made.pipe)
    assert np.array_equal(picture(type(made)(twin, made.kwargs)), from_file)
    made.pipe.plugins.configure("vidit_q", artefact=None)
    assert not np.array_equal(picture(made), from_file)
    assert "not balanced" in part(made.pipe).notes[0]


def test_each_step_takes_the_weights_of_its_range(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path, ranges=(500,))
    load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": artefact})])
    layer = next(module for module in made.pipe.transformer.modules() if isinstance(module, QuantLinear))
    at, pick = [], layer.pick
    layer.pick = lambda: at.append(int(pick())) or pick()
    times = []
    picture(made, callback_on_step_end=lambda pipe, i, t, kw: times.append(float(t)) or {})
    calls = len(at) // len(times)  # guidance asks twice a step
    assert at == [int(t > 500) for t in times for _ in range(calls)]
    assert set(at) == {0, 1}
    with pytest.raises(Unsupported, match="ask through the pipeline"):
        layer(torch.zeros(1, layer.in_features))


def test_a_planted_channel_is_saved_by_balancing():
    """One channel of the activations x100: per-token grids lose the others, and the weights have room for it."""
    layer, x = torch.nn.Linear(32, 16, bias=False), seeded(4, 10, 32)
    layer.weight.data = seeded(16, 32, seed=1) / 6
    x[..., 5] *= 100
    s = m.balance(m.channel_size(x)[None], layer.weight, 0.5)
    grids = UniformAffine(8, "channel"), UniformAffine(8, "token")
    y = layer(x)
    errors = [float((quantised(layer, *grids, balance=b)(x) - y).norm()) for b in (None, s)]
    assert errors[1] < 0.5 * errors[0]


def test_mixed_precision_raises_what_the_calibration_found_to_hurt(tmp_path):
    made = tiny("wan")
    knobs = {"bits": "w4a8", "mixed": 0.5}
    artefact = artefact_for(made, tmp_path, **knobs)
    assert len(artefact.facts["groups"]) == len(artefact.tensors["damage"])
    assert bool((artefact.tensors["damage"] > 0).all())
    load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": artefact, **knobs})])
    bits = {name: module.weights[0].grid.bits for name, module in made.pipe.transformer.named_modules() if isinstance(module, QuantLinear)}
    assert set(bits.values()) == {4, 8}
    damage = dict(zip(artefact.facts["groups"], artefact.tensors["damage"].tolist(), strict=True))
    for kind in {m.kind_of(name) for name in bits}:
        groups = {m.group_of(f"transformer.{name}"): b for name, b in bits.items() if m.kind_of(name) == kind}
        high, low = [damage[g] for g, b in groups.items() if b == 8], [damage[g] for g, b in groups.items() if b == 4]
        assert not high or not low or min(high) >= max(low)
    with pytest.raises(ArtefactMismatch, match=r"mixed = 0.5: the artefact says nothing of .*-o vidit_q.mixed=0.5"):
        load_pipeline(tiny("wan").pipe, plugins=[("vidit_q", {"artefact": artefact_for(tiny("wan"), tmp_path), "mixed": 0.5})])
    with pytest.raises(ArtefactMismatch, match="which layers suffer is measured"):
        load_pipeline(tiny("wan").pipe, plugins=[("vidit_q", {"mixed": 0.5})])


def test_mixed_precision_is_for_the_bits_that_were_measured(tmp_path):
    made = tiny("wan")
    artefact = artefact_for(made, tmp_path, bits="w4a8", mixed=0.5)
    with pytest.raises(ArtefactMismatch, match=r"mixed = 0.5: what suffers was measured at w4, and these are w3; .*-o vidit_q.bits=w3a8"):
        load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": artefact, "bits": "w3a8", "mixed": 0.5})])
    load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": artefact, "bits": "w3a8"})])  # balancing is for all bits


@pytest.mark.parametrize("family", ["flux", "wan", "dit"])
def test_a_rotation_changes_nothing_but_roundings(family, tmp_path):
    """(X / s R)(W s R)^T = X W^T; an artefact fits with it and without."""
    made = tiny(family)
    plain = picture(made)
    artefact = artefact_for(made, tmp_path)
    load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w16a16", "rotate": True, "artefact": artefact})])
    found = picture(made)
    assert 0 < np.linalg.norm(found - plain) < 1e-3 * np.linalg.norm(plain)
    assert "balanced, rotated" in part(made.pipe).notes[0]
    assert all(m.rotation is not None for m in made.pipe.transformer.modules() if isinstance(m, QuantLinear))


def test_a_rotated_layer_is_its_formula_and_is_not_exported(tmp_path):
    made = tiny()
    load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w8a8", "rotate": True, "artefact": artefact_for(made, tmp_path)})])
    layer = next(m for m in made.pipe.transformer.modules() if isinstance(m, QuantLinear))
    x, s, [weights] = seeded(2, 5, layer.in_features), layer.balance[0], layer.weights
    turned = layer.rotation(x / s)
    wanted = torch.nn.functional.linear(layer.inputs[0](turned), weights.rounded(layer.rotation(layer.weight * s)), layer.bias)
    assert torch.equal(layer(x), wanted)


@pytest.mark.parametrize(
    ("knobs", "balanced", "told"),
    [
        ({"bits": "w8a8", "symmetric": True}, True, "makes a model that has kernels"),
        ({"bits": "w4a8"}, False, "makes a model that has kernels"),
        ({"bits": "w4a8"}, True, "no kernel to export to: .*asymmetric"),
        ({"bits": "w8a8", "rotate": True, "symmetric": True}, False, "no kernel to export to: .*rotates its inputs"),
        ({"bits": "w8a16", "symmetric": True}, False, "no kernel to export to: .*inputs of 16 bits"),
        ({"bits": "w32a8", "rotate": True}, False, "not balanced or rotated: weights are floats.*no kernel to export to: the weights are"),
    ],
)
def test_the_report_says_of_kernels_what_the_export_does(knobs, balanced, told, tmp_path):
    made = tiny()
    given = {"artefact": artefact_for(made, tmp_path)} if balanced else {}
    load_pipeline(made.pipe, plugins=[("vidit_q", {**knobs, **given})])
    picture(made)
    assert re.search(told, part(made.pipe).notes[0])
    layers = [(path, m) for path, m in made.pipe.transformer.named_modules() if isinstance(m, QuantLinear) and m.weights]
    if "no kernel" not in told:
        for path, layer in layers:
            ensure_kernel(path, layer)
    elif layers:
        with pytest.raises(Unsupported):
            ensure_kernel(*layers[0])


def test_the_report_counts_what_is_rotated_and_raised(tmp_path):
    """Of an odd width nothing is mixed; a small share may hold no group."""
    made = tiny()
    artefact = artefact_for(made, tmp_path, bits="w4a8", mixed=0.5)
    for mixed, told in ((0.5, r"mixed 0\.5: [1-9]\d* layers in 8 bits"), (1e-6, "mixed 1e-06: no layers in 8 bits, each group is")):
        load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w4a8", "mixed": mixed, "artefact": artefact})])
        picture(made)
        assert re.search(told, part(made.pipe).notes[0])
        unload(made.pipe)
    odd = quantised(torch.nn.Linear(7, 4), UniformAffine(8, "channel"))
    even = quantised(torch.nn.Linear(8, 4), UniformAffine(8, "channel"), rotation=Rotation(8))
    assert ViDiTQ(rotate=True).how(None, [odd, even]) == "not balanced: no artefact, 1 of 2 rotated (the others have odd widths)"


def test_a_lora_that_is_fused_meanwhile_is_named_and_not_the_artefact(tmp_path):
    peft = pytest.importorskip("peft")
    made = tiny()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        made.pipe.transformer.add_adapter(peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_out.0"]))
    load_pipeline(made.pipe, plugins=[("vidit_q", {"artefact": artefact_for(made, tmp_path)})])
    picture(made)
    made.pipe.fuse_lora()
    with pytest.raises(Unsupported, match=r"vidit_q: the weights of \S+, .* were written to .*unfuse_lora.*put it on again"):
        picture(made)


def test_weights_in_floats_are_not_balanced_and_the_report_says_so(tmp_path):
    made = tiny()
    artefact = artefact_for(made, tmp_path)
    load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w32a8", "artefact": artefact})])
    balanced = picture(made)
    assert "not balanced: weights are floats" in part(made.pipe).notes[0]
    made.pipe.plugins.configure("vidit_q", artefact=None)
    assert np.array_equal(picture(made), balanced)


def test_the_report_says_that_nothing_is_faster():
    made = tiny()
    load_pipeline(made.pipe, plugins=["vidit_q"])
    picture(made)
    assert part(made.pipe).notes[0].startswith("simulated, no speed: w8a8")


# what must not happen -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "why"),
    [
        ({"bits": "w1a8"}, "bits = 'w1a8': write wXaY with X and Y from 2 to 16, or 32"),
        ({"bits": "w8a20"}, "write wXaY"),
        ({"bits": "int8"}, "write wXaY"),
        ({"ranges": (500, 250)}, "timesteps rise"),
        ({"keep": ("proj_outt",)}, r"keep = 'proj_outt': the model has no such layer; did you mean 'proj_out'"),
        ({"alpha": 1.5}, "alpha = 1.5"),
    ],
)
def test_knobs_that_are_refused(knobs, why):
    made = tiny()
    with pytest.raises(ConfigError, match=why):
        load_pipeline(made.pipe, plugins=[("vidit_q", knobs)])
    assert not hasattr(made.pipe, "plugins")


def test_artefacts_of_others_are_refused(tmp_path):
    artefact = artefact_for(tiny(), tmp_path)
    with pytest.raises(ArtefactMismatch):
        load_pipeline(tiny("sd3").pipe, plugins=[("vidit_q", {"artefact": artefact})])
    with pytest.raises(ArtefactMismatch, match=r"ranges = \[500\]: the artefact was made for \[\]; .* -o 'vidit_q.ranges=\[500\]'"):
        load_pipeline(tiny().pipe, plugins=[("vidit_q", {"artefact": artefact, "ranges": (500,)})])
    some = artefact_for(tiny(), tmp_path, keep=("transformer_blocks.0",))
    with pytest.raises(ArtefactMismatch, match=r"transformer.transformer_blocks.0.* the artefact none of its name"):
        load_pipeline(tiny().pipe, plugins=[("vidit_q", {"artefact": some})])
    with pytest.raises(ConfigError, match="no step of the calibration is in the range up to 0"):
        artefact_for(tiny(), tmp_path, ranges=(0,))


def test_numbers_that_are_none_name_their_layer(tmp_path):
    made = tiny()
    with torch.no_grad():
        made.pipe.transformer.transformer_blocks[0].attn.to_q.weight[0, 0] = torch.inf
    with pytest.raises(NotFinite, match=r"the inputs of transformer\.\S+ hold values"):
        artefact_for(made, tmp_path)


def test_a_lora_loaded_later_is_refused_and_an_earlier_one_stays_in_floats():
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q"])
    made = tiny()
    load_pipeline(made.pipe, plugins=["vidit_q"])
    made.pipe.transformer.add_adapter(config)
    with pytest.raises(Unsupported, match=r"a LoRA was loaded over transformer\.\S+to_q"):
        picture(made)
    made = tiny()
    made.pipe.transformer.add_adapter(config)
    plain = picture(made)
    load_pipeline(made.pipe, plugins=[("vidit_q", {"bits": "w16a16"})])
    assert float(np.linalg.norm(picture(made) - plain) / np.linalg.norm(plain)) < 1e-3


def test_half_precision_and_gradients():
    made = tiny()
    load_pipeline(made.pipe, plugins=["vidit_q"])
    made.pipe.to(torch.bfloat16)
    assert bool(made.pipe(**made.kwargs)[0].float().isfinite().all())
    layer = next(module for module in made.pipe.transformer.modules() if isinstance(module, QuantLinear)).float()
    x = seeded(2, layer.in_features).requires_grad_()
    layer(x).sum().backward()
    assert bool((x.grad != 0).any())
