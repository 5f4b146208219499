"""Grids, quantised layers and learned rounding, against closed forms."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from typing import ClassVar

import pytest
import torch
from diffgraft import ArtefactMismatch, ConfigError, NotFinite, Unsupported, load_pipeline, unload
from diffgraft.methods.quant.affine import Scale, UniformAffine, dequantise, nearest_scale, searched_scale
from diffgraft.methods.quant.kept import keep, misfit, packed, restore, unpacked
from diffgraft.methods.quant.layers import (
    Rounder,
    bytes_of,
    chosen,
    ensure_current,
    ensure_finite,
    in_place_of,
    layers_of,
    put,
    quantised,
)
from diffgraft.methods.quant.rounding import Recipe, Rounding, first_alpha, h, learn_rounding, learn_scales, penalty
from hypothesis import given, settings
from hypothesis import strategies as st
from probes import Probe, generate, tiny, trace
from safetensors.torch import load_file, save_file
from torch import nn

OVERS = ("tensor", "channel", "token")


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(kind, *sizes, seed=0):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return kind(*sizes)


# grids --------------------------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    bits=st.integers(2, 12),
    over=st.sampled_from(OVERS),
    symmetric=st.booleans(),
    seed=st.integers(0, 9),
    shift=st.floats(-9, 9),
    log=st.integers(-4, 4),
)
def test_no_element_is_further_from_itself_than_half_a_step(bits, over, symmetric, seed, shift, log):
    x = (seeded(3, 5, 16, seed=seed) + shift) * 10.0**log
    grid = UniformAffine(bits, over, symmetric)
    scale = nearest_scale(x, grid)
    assert bool(((grid.rounded(x, scale) - x).abs() <= 0.5 * scale.delta * (1 + 1e-4) + 1e-6 * x.abs()).all())
    q = grid.quantise(x, scale)
    assert torch.equal(q, q.round())
    assert grid.lowest <= float(q.min()) <= float(q.max()) <= grid.highest
    assert torch.equal(grid.rounded(torch.zeros(1, 1, 1), scale), torch.zeros_like(scale.delta))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("over", OVERS)
def test_more_bits_are_nearer_and_sixteen_are_near_enough(over, symmetric):
    x = seeded(4, 8, 64)
    errors = [
        float((g.rounded(x, nearest_scale(x, g)) - x).norm() / x.norm()) for g in (UniformAffine(b, over, symmetric) for b in range(2, 17))
    ]
    assert all(a > b for a, b in pairwise(errors))
    assert errors[-1] < 1e-4


def test_a_token_has_its_own_scale_wherever_it_stands():
    x, order = seeded(2, 7, 16) * torch.arange(1, 8).reshape(1, 7, 1), torch.randperm(7)
    rounder = Rounder(UniformAffine(4, "token"))
    assert torch.equal(rounder(x)[:, order], rounder(x[:, order]))
    assert torch.equal(rounder(x)[:1], rounder(x[:1]))  # whatever else is in the batch


def test_the_search_is_never_worse_than_the_whole_range_and_cuts_off_outliers():
    x = seeded(6, 4000)
    grid = UniformAffine(3, "channel")

    def error(scale):
        return (grid.rounded(x, scale) - x).abs().pow(2.4).mean(1)

    whole, found = nearest_scale(x, grid), searched_scale(x, grid)
    assert bool((error(found) <= error(whole)).all())
    assert float(error(found).sum()) < 0.7 * float(error(whole).sum())
    one = UniformAffine(3)  # each channel is searched as if it were alone
    for i in range(6):
        alone = searched_scale(x[i], one)
        assert torch.allclose(alone.delta.flatten(), found.delta[i].flatten())


def test_the_gradient_goes_straight_through_and_the_value_is_the_same():
    x, grid = seeded(4, 32), UniformAffine(4)
    scale = nearest_scale(x * 0.5, grid)  # some are cut off
    y = x.clone().requires_grad_()
    out = grid.through(y, scale)
    assert torch.equal(out, grid.rounded(x, scale))
    out.sum().backward()
    inside = (grid.quantise(x, scale) != grid.lowest) & (grid.quantise(x, scale) != grid.highest)
    assert torch.equal(y.grad[inside], torch.ones_like(y.grad[inside]))
    assert 0 < int((y.grad == 0).sum()) < x.numel()


def test_bits_that_no_grid_has():
    for bits in (1, 17):
        with pytest.raises(ValueError, match="2 to 16"):
            UniformAffine(bits)


# layers -------------------------------------------------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: made(nn.Linear, 24, 10), lambda: seeded(2, 6, 24)),
    "convolution": (lambda: made(nn.Conv2d, 8, 6, 3, 1, 1), lambda: seeded(2, 8, 9, 9)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_off_is_the_layer_itself_and_sixteen_bits_are_near(name):
    layer, x = (make() for make in LAYERS[name])
    assert torch.equal(in_place_of(layer)(x), layer(x))
    assert torch.equal(quantised(layer, None)(x), layer(x))
    fine = quantised(layer, UniformAffine(16, "channel"), UniformAffine(16))(x)
    assert 0 < float((fine - layer(x)).norm() / layer(x).norm()) < 1e-3
    errors = [float((quantised(layer, UniformAffine(b, "channel"), UniformAffine(b))(x) - layer(x)).norm()) for b in (4, 6, 8, 10, 12)]
    assert all(a > b for a, b in pairwise(errors))


@pytest.mark.parametrize("name", LAYERS)
def test_the_layer_is_its_equation(name):
    layer, x = (make() for make in LAYERS[name])
    weights, inputs = UniformAffine(4, "channel"), UniformAffine(6, "tensor", symmetric=True)
    new = quantised(layer, weights, inputs)
    assert new.weight is layer.weight
    assert new.bias is layer.bias
    assert list(new.state_dict()) == list(layer.state_dict())
    plain = copy.deepcopy(layer)
    [w] = new.weights
    plain.weight.data = dequantise(w.codes(layer.weight), *w.scales)
    assert torch.equal(new(x), plain(inputs.rounded(x, nearest_scale(x, inputs))))


def test_a_split_of_equal_ranges_is_none():
    layer, x = (make() for make in LAYERS["convolution"])
    grid = UniformAffine(4, "channel")
    one, ends = nearest_scale(layer.weight, grid), UniformAffine(8)
    fixed = nearest_scale(x, ends)
    whole = quantised(layer, grid, ends, ranges=[fixed])
    split = quantised(layer, grid, ends, ranges=[fixed, fixed], split=3, scale_of=lambda part, grid: one)
    assert torch.equal(whole(x), split(x))


def test_a_split_saves_what_is_small_beside_what_is_large():
    layer, x = made(nn.Conv2d, 8, 6, 1), seeded(2, 8, 9, 9)
    x[:, 4:] *= 100
    with torch.no_grad():
        layer.weight[:, 4:] /= 100
    exact, grids = layer(x), (UniformAffine(4, "channel"), UniformAffine(8))
    errors = {split: float((quantised(layer, *grids, split=split)(x) - exact).norm() / exact.norm()) for split in (0, 4)}
    assert errors[4] < 0.2 * errors[0]
    for split in (8, 9, -1):
        with pytest.raises(ValueError, match="split"):
            quantised(layer, *grids, split=split)


def test_balancing_changes_nothing_but_the_rounding():
    layer, x = made(nn.Linear, 24, 10), seeded(2, 6, 24)
    s, at = seeded(2, 24).exp(), [0]
    ranged = quantised(layer, UniformAffine(16, "channel"), UniformAffine(16, "token"), balance=s, pick=lambda: at[0])
    a, w = ranged.operands(x)
    assert torch.allclose(a, x / s[0], atol=1e-3)
    assert torch.allclose(w, layer.weight * s[0], atol=1e-3)
    first = ranged(x)
    assert torch.allclose(first, layer(x), atol=1e-3)
    at[0] = torch.tensor(1)
    second = ranged(x)
    assert not torch.equal(first, second)
    at[0] = 1
    assert torch.equal(ranged(x), second)
    with pytest.raises(ValueError, match="several ranges"):
        quantised(layer, UniformAffine(8, "channel"), balance=s)
    with pytest.raises(ValueError, match="balance for 2 ranges, and 0 weights"):
        quantised(layer, None, UniformAffine(8), balance=s)


def test_scales_stay_float32_where_the_model_does_not():
    layer = made(nn.Linear, 24, 10)
    new = quantised(
        layer,
        UniformAffine(8, "channel"),
        UniformAffine(8),
        ranges=[nearest_scale(seeded(2, 24), UniformAffine(8))],
        balance=torch.ones(1, 24),
    )
    before = [value.clone() for value in (*new.weights[0].scales[0], *new.inputs[0].fixed, new.balance)]
    new.to(torch.bfloat16)
    after = [*new.weights[0].scales[0], *new.inputs[0].fixed, new.balance]
    assert all(torch.equal(a, b) and b.dtype == torch.float32 for a, b in zip(before, after, strict=True))
    assert new.weights[0].value.dtype == new.weight.dtype == torch.bfloat16
    assert new(seeded(2, 24).bfloat16()).dtype == torch.bfloat16


def test_bytes_are_those_of_codes_and_scales():
    layer = made(nn.Linear, 24, 10)
    assert bytes_of([quantised(layer, UniformAffine(4, "channel"))]) == (24 * 10 // 2 + 10 * 6, 24 * 10 * 4)
    assert bytes_of([quantised(layer, UniformAffine(8, "channel", symmetric=True))])[0] == 24 * 10 + 10 * 4
    assert bytes_of([in_place_of(layer)]) == (24 * 10 * 4,) * 2


# learned rounding -----------------------------------------------------------------------------------------------------------------------


def correlated(n, channels, seed=0):
    """Inputs whose channels go together: what one weight's rounding does, another's can undo."""
    return seeded(n, 3, seed=seed) @ seeded(3, channels, seed=1) + 0.1 * seeded(n, channels, seed=seed + 2)


def test_at_first_h_is_what_is_behind_the_point_and_rounds_as_the_nearest():
    ratio = torch.tensor([0.1, 0.49, 0.51, 0.9, -0.3, -2.75, 3.0])
    assert torch.allclose(h(first_alpha(ratio)), ratio - ratio.floor(), atol=1e-6)
    layer = made(nn.Linear, 24, 10)
    new = quantised(layer, UniformAffine(4, "channel"))
    rounding = Rounding(new.weights[0], layer.weight)
    near = new.weights[0].value.clone()
    rounding.settle(rounding.alpha.detach() >= 0)
    assert torch.equal(new.weights[0].value, near)
    assert float(penalty(torch.tensor([-9.0, 9.0]), 2.0)) == 0
    assert torch.isclose(penalty(torch.tensor([0.0]), 2.0), torch.tensor(1.0))


def learned(layer, new, x, **recipe):
    with torch.no_grad():
        y = layer(x)
    return learn_rounding(lambda i: new(x[i]), lambda i: y[i], len(x), [new], Recipe(**{"steps": 400, "lr": 1e-2, **recipe}))


def test_learned_rounding_beats_the_nearest_on_what_it_learned_from_and_on_more():
    layer, x = made(nn.Linear, 24, 10), correlated(64, 24)
    new = quantised(layer, UniformAffine(3, "channel"))
    other = correlated(64, 24, seed=7)
    before = float((new(other) - layer(other)).pow(2).mean())
    losses = learned(layer, new, x)
    assert losses.kept
    assert losses.after < 0.5 * losses.before
    assert float((new(other) - layer(other)).pow(2).mean()) < before
    values = torch.cat([w.codes(layer.weight) for w in new.weights])
    assert torch.equal(values, values.round())
    assert torch.equal(new.weights[0].value, dequantise(values, *new.weights[0].scales))
    ratio = layer.weight / new.weights[0].scales[0].delta
    assert bool((values - new.weights[0].scales[0].zero - ratio).abs().max() < 1)  # down or up, no further


def test_the_models_own_parameters_collect_no_gradient():
    layer, x = made(nn.Linear, 24, 10), correlated(64, 24)
    new = quantised(layer, UniformAffine(3, "channel"), scale_of=searched_scale)
    assert layer.bias.requires_grad
    assert learned(layer, new, x).kept
    assert [parameter.grad for parameter in layer.parameters()] == [None, None]


def test_an_input_may_have_several_fixed_scales():
    class Second(Rounder):
        def now(self):
            return Scale(self.delta[1], self.zero[1])

    grid, x = UniformAffine(4), seeded(5, 7)
    scales = [nearest_scale(x, grid), nearest_scale(3 * x, grid)]
    both = Scale(*(torch.stack([each.reshape(1) for each in part]) for part in zip(*scales, strict=True)))
    assert torch.equal(Second(grid, both)(x), grid.rounded(x, scales[1]))
    assert not torch.equal(Second(grid, both)(x), Rounder(grid, scales[0])(x))


def test_what_is_worse_is_not_kept():
    layer, x = made(nn.Linear, 24, 10), correlated(64, 24)
    new = quantised(layer, UniformAffine(8, "channel"))
    near = new.weights[0].value.clone()
    losses = learned(layer, new, x, lr=30.0, steps=3, warmup=1.0)
    assert not losses.kept
    assert torch.equal(new.weights[0].value, near)
    assert losses.after > losses.before


def test_both_parts_of_a_split_are_learned():
    """The official code rounds the second part and hardly learns it."""
    layer, x = made(nn.Conv2d, 8, 6, 1), correlated(64 * 4, 8).reshape(64, 4, 8).permute(0, 2, 1).reshape(64, 8, 2, 2)
    new = quantised(layer, UniformAffine(3, "channel"), split=4)
    near = (layer.weight / torch.cat([s.delta.expand(-1, 4, 1, 1) for s in new.weights[0].scales], 1)).round()
    assert learned(layer, new, x).kept
    zero = torch.cat([s.zero.expand(-1, 4, 1, 1) for s in new.weights[0].scales], 1)
    turned = new.weights[0].codes(layer.weight) - zero != near
    assert bool(turned[:, :4].any())
    assert bool(turned[:, 4:].any())


@pytest.mark.parametrize("split", [0, 4])
def test_what_was_learned_is_kept_in_a_file_and_restored_bit_for_bit(split, tmp_path):
    layer, x = made(nn.Conv2d, 8, 6, 1), correlated(64 * 4, 8).reshape(64, 4, 8).permute(0, 2, 1).reshape(64, 8, 2, 2)
    grids = (UniformAffine(3, "channel"), UniformAffine(6))
    ranges = [nearest_scale(x, grids[1])] * (2 if split else 1)
    new = quantised(layer, *grids, ranges=ranges, split=split, scale_of=searched_scale)
    assert learned(layer, new, x).kept
    tensors, facts = keep({"net.conv": new})
    save_file(tensors, tmp_path / "kept.safetensors")
    read, facts = load_file(tmp_path / "kept.safetensors"), json.loads(json.dumps(facts, sort_keys=True))
    other = quantised(layer, *grids, ranges=[nearest_scale(2 * x, grids[1])] * len(ranges), split=split)
    assert not torch.equal(other(x), new(x))
    restore({"net.conv": other}, read, facts, "make one")
    assert torch.equal(other(x), new(x))
    again = keep({"net.conv": other})
    assert again[1] == facts
    assert all(torch.equal(again[0][name], read[name]) for name in read)
    before = other(x)
    with pytest.raises(ArtefactMismatch, match=r"net.fc: the artefact holds no weights.0.0.delta; make one"):
        restore({"net.conv": other, "net.fc": new}, read, facts, "make one")
    with pytest.raises(ArtefactMismatch, match=r"net.conv: .*(has shape|holds no)"):
        restore({"net.conv": quantised(made(nn.Conv2d, 8, 5, 1), *grids, ranges=ranges, split=split)}, read, facts, "make one")
    if split:
        with pytest.raises(ArtefactMismatch, match=r"net.conv: the artefact holds (inputs|weights.0).1.delta, and here is nothing"):
            restore({"net.conv": quantised(layer, *grids, ranges=ranges[:1])}, read, facts, "make one")
    assert torch.equal(other(x), before)


def test_learned_scales_of_inputs_are_never_worse():
    layer, x = made(nn.Linear, 24, 10), seeded(64, 24).pow(3)
    grid = UniformAffine(4)
    new = quantised(layer, None, grid, ranges=[nearest_scale(x, grid)])
    with torch.no_grad():
        y = layer(x)
    delta = new.inputs[0].delta.clone()
    losses = learn_scales(lambda i: new(x[i]), lambda i: y[i], len(x), list(new.inputs), Recipe(steps=200, lr=1e-2))
    assert losses.kept
    assert losses.after < 0.9 * losses.before
    assert not new.inputs[0].delta.requires_grad
    assert not torch.equal(new.inputs[0].delta, delta)


# on a pipeline --------------------------------------------------------------------------------------------------------------------------


class Quantising(Probe):
    """All linears and convolutions in ``bits`` and inputs of at least 8; None: as they are."""

    name = "quantising"
    bits: int | None = None
    neutral: ClassVar = {}

    def modules(self, call, next):
        for layer in layers_of(call.denoisers):
            grids = () if self.bits is None else (UniformAffine(self.bits, "channel"), UniformAffine(max(8, self.bits)))
            put(call.swap, layer, quantised(layer.module, *grids) if grids else in_place_of(layer.module))
        next(call)


def at(bits):
    return type("Bits", (Quantising,), {"bits": bits})


@pytest.mark.parametrize("cls", ["StableDiffusionPipeline", "FluxPipeline"])
def test_on_a_pipeline_off_is_bitwise_and_nothing_stays(cls):
    pipe, kwargs = tiny(cls)
    plain, seen = generate(pipe, kwargs), trace(pipe)
    load_pipeline(pipe, plugins=[at(None)])
    assert torch.equal(generate(pipe, kwargs), plain)
    unload(pipe)
    errors = []
    for bits in (16, 8, 4):
        load_pipeline(pipe, plugins=[at(bits)])
        once = generate(pipe, kwargs)
        assert torch.equal(generate(pipe, kwargs), once)
        twin = copy.deepcopy(pipe)
        assert torch.equal(generate(twin, kwargs), once)
        errors.append(float((once - plain).norm() / plain.norm()))
        unload(pipe)
        assert trace(pipe) == seen
    assert 0 < errors[0] < errors[2]
    assert torch.equal(generate(pipe, kwargs), plain)


def lora(pipe):
    peft = pytest.importorskip("peft")
    with torch.random.fork_rng():
        torch.manual_seed(3)
        pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_v"]))


def test_a_lora_stays_in_floats_beside_and_a_later_one_is_refused():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    without = generate(pipe, kwargs)
    lora(pipe)
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[at(16)])
    layers = [m for m in pipe.unet.modules() if type(m) is nn.Linear]
    assert layers
    assert all(m.weight.shape[0] == 2 or m.weight.shape[1] == 2 for m in layers)  # the LoRA's alone are plain
    assert float((generate(pipe, kwargs) - plain).norm()) < 0.01 * float((without - plain).norm())
    ensure_current({"unet": pipe.unet}, "quantising")
    unload(pipe)
    assert torch.equal(generate(pipe, kwargs), plain)

    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[at(8)])
    lora(pipe)
    with pytest.raises(Unsupported, match=r"loaded over unet\.\S+to_q.*unload_lora_weights.*put the plugin on again"):
        ensure_current({"unet": pipe.unet}, "quantising")


def test_a_layer_that_is_not_there_and_inputs_that_are_no_numbers():
    pipe, _ = tiny("StableDiffusionPipeline")
    layers = list(layers_of({"unet": pipe.unet}))
    paths = [layer.path for layer in chosen(layers, ["conv_in", "attn1.to_q", "mid_block"], "keep")]
    assert "conv_in" in paths
    assert all("attn1.to_q" in path or "mid_block" in path or path == "conv_in" for path in paths)
    with pytest.raises(ConfigError, match=r"keep = 'conv_inn': the model has no such layer; did you mean 'conv_in'"):
        chosen(layers, ["conv_inn"], "keep")
    with pytest.raises(NotFinite, match=r"probe: the inputs of unet\.conv_in hold"):
        ensure_finite({"unet.mid": torch.ones(2), "unet.conv_in": torch.tensor([1.0, torch.nan])}, "probe")


def test_a_class_that_only_inherits_is_left_alone():
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4), Own(4, 4))
    assert [layer.path for layer in layers_of({"net": model})] == ["0"]


def test_what_is_packed_comes_back_bit_for_bit():
    values = {"b": seeded(2, 3), "a": seeded(4), "c": seeded(1, 1, 5)}
    flat, shapes = packed(values)
    back = unpacked(flat, json.loads(json.dumps(shapes, sort_keys=True)))
    assert back.keys() == values.keys()
    assert all(torch.equal(back[name], values[name]) for name in values)
    assert misfit(flat, shapes) is None
    assert "holds 14 values, and its shapes say 15" in str(misfit(flat[1:], shapes))
    assert "shape of 'a' is [0]" in str(misfit(flat, {**shapes, "a": [0]}))
