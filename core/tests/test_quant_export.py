"""Quantised layers beside torchao's: the same numbers (`pip install 'diffgraft[torchao]'`)."""

from __future__ import annotations

import sys

import pytest
import torch
from diffgraft import Unsupported, load_pipeline, unload
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale, searched_scale
from diffgraft.methods.quant.export import bytes_in, exported
from diffgraft.methods.quant.layers import QuantLinear, layers_of, put, quantised
from probes import Probe, generate, tiny
from torch import nn

pytest.importorskip("torchao")

from torchao.quantization import Int8DynamicActivationInt8WeightConfig, Int8WeightOnlyConfig, quantize_
from torchao.quantization.quant_primitives import MappingType, choose_qparams_affine, dequantize_affine, quantize_affine


def seeded(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("over", "block"), [("tensor", (6, 32)), ("channel", (1, 32)), ("token", (1, 32))])
@pytest.mark.parametrize("bits", [4, 8])
def test_the_grids_are_torchaos(symmetric, over, block, bits):
    x, grid = seeded(6, 32) + 0.3, UniformAffine(bits, over, symmetric)
    mapping = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    ends = {"quant_min": grid.lowest, "quant_max": grid.highest}
    delta, zero = choose_qparams_affine(x, mapping, block, torch.int32, **ends, scale_dtype=torch.float32, zero_point_dtype=torch.int32)
    scale = nearest_scale(x, grid)
    assert torch.allclose(scale.delta.flatten(), delta.flatten(), rtol=1e-6)
    assert torch.equal(scale.zero.flatten().int(), zero.flatten())
    codes = quantize_affine(x, block, delta, zero, torch.int32, **ends)
    assert torch.equal(grid.quantise(x, scale).int(), codes)
    back = dequantize_affine(codes, block, delta, zero, torch.int32, **ends)
    assert torch.allclose(grid.rounded(x, scale), back, atol=1e-6)


def net():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 64, bias=False))


def on_grids(model, weight, inputs=None, **more):
    for layer in list(layers_of({"net": model})):
        made = {key: value(layer.module) if callable(value) and key == "balance" else value for key, value in more.items()}
        setattr(layer.parent, layer.name, quantised(layer.module, weight, inputs, **made))
    return model


SYM8 = UniformAffine(8, "channel", symmetric=True)
X = seeded(2, 7, 64)
PLANS = {
    "w8": (SYM8, None, {}),
    "w8 searched": (SYM8, None, {"scale_of": searched_scale}),
    "w8 asymmetric": (UniformAffine(8, "channel"), None, {}),
    "w4": (UniformAffine(4, "channel", symmetric=True), None, {}),
    "w4 asymmetric": (UniformAffine(4, "channel"), None, {}),
    "w8a8 dynamic": (SYM8, UniformAffine(8, "token", symmetric=True), {}),
    "w8a8 dynamic, asymmetric inputs": (SYM8, UniformAffine(8, "token"), {}),
    "w8a8 dynamic, balanced": (SYM8, UniformAffine(8, "token", symmetric=True), {"balance": lambda m: seeded(1, m.in_features).exp()}),
    "w8a8 static": (SYM8, UniformAffine(8, symmetric=True), {"ranges": [nearest_scale(3 * X, UniformAffine(8, symmetric=True))]}),
    "w4a8": (UniformAffine(4, "channel"), UniformAffine(8, "token"), {}),
}


@pytest.mark.parametrize("plan", PLANS)
def test_what_is_exported_computes_what_was_simulated(plan):
    weight, inputs, more = PLANS[plan]
    exact, model = net(), on_grids(net(), weight, inputs, **more)
    simulated = model(X)
    fast = exported(model)
    assert torch.equal(model(X), simulated)  # the original is untouched
    assert bytes_in(fast) < 0.4 * bytes_in(exact)
    x = X
    for own, ours, theirs in zip(exact, model, fast, strict=True):
        y = ours(x)
        if isinstance(ours, QuantLinear):
            assert type(theirs.weight.data) is not torch.Tensor
            assert float((theirs(x) - y).norm()) < 1e-5 * float(y.norm()) < 1e-2 * float((own(x) - y).norm())
        x = y


def test_one_layer_is_torchaos_own_int8_to_rounding():
    for config, inputs in (
        (Int8WeightOnlyConfig(), None),
        (Int8DynamicActivationInt8WeightConfig(), UniformAffine(8, "token", symmetric=True)),
    ):
        theirs, ours = nn.Sequential(net()[0]), on_grids(nn.Sequential(net()[0]), SYM8, inputs)
        quantize_(theirs, config)
        assert torch.allclose(ours(X), theirs(X), atol=1e-5)
        weight = exported(ours)[0].weight
        assert torch.equal(weight.qdata, theirs[0].weight.qdata)


@pytest.mark.parametrize(
    ("weight", "inputs", "more", "why"),
    [
        (UniformAffine(12, "channel"), None, {}, "no kernel takes weights of 12 bits"),
        (SYM8, UniformAffine(6, "token", symmetric=True), {}, "with inputs of 6 bits"),
        (UniformAffine(4, "channel"), UniformAffine(8, "token", symmetric=True), {}, "weights of 4 bits, asymmetric, have a kernel only"),
        (SYM8, UniformAffine(8), {"ranges": [nearest_scale(X, UniformAffine(8))]}, "takes symmetric ones"),
        (SYM8, None, {"balance": lambda m: torch.ones(2, m.in_features), "pick": lambda: 0}, "several ranges of timesteps"),
        (SYM8, None, {"split": 8}, "a split"),
    ],
)
def test_what_no_kernel_does_is_refused_by_the_layers_name(weight, inputs, more, why):
    model = on_grids(net(), weight, inputs, **more)
    with pytest.raises(Unsupported, match=rf"^0.*{why}"):
        exported(model)


def test_nothing_to_export_and_no_torchao(monkeypatch):
    with pytest.raises(Unsupported, match="Sequential has no quantised layer to export"):
        exported(net())
    monkeypatch.setitem(sys.modules, "torchao", None)
    with pytest.raises(Unsupported, match=r"pip install 'diffgraft\[torchao\]'"):
        exported(on_grids(net(), SYM8))


class Quantising(Probe):
    """All linears in w8a8. With symmetric inputs each token's end would lie between two levels, and the last bit decide."""

    name = "quantising"
    neutral = {}  # noqa: RUF012

    def modules(self, call, next):
        for layer in layers_of(call.denoisers, (nn.Linear,)):
            put(call.swap, layer, quantised(layer.module, SYM8, UniformAffine(8, "token")))
        next(call)


def test_a_pipeline_runs_on_what_was_exported():
    pipe, kwargs = tiny("FluxPipeline")
    plain = generate(pipe, kwargs)
    load_pipeline(pipe, plugins=[Quantising])
    simulated = generate(pipe, kwargs)
    fast = exported(pipe.transformer)
    unload(pipe)
    own, pipe.transformer = pipe.transformer, fast
    assert float((generate(pipe, kwargs) - simulated).norm()) < 0.1 * float((simulated - plain).norm())
    pipe.transformer = own
    assert torch.equal(generate(pipe, kwargs), plain)
