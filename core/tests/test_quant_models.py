"""Where a U-Net joins what comes from below with what comes across, and quantised layers whose weights are written to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffgraft import Unsupported, load_pipeline
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale
from diffgraft.methods.quant.layers import ensure_current, layers_of, put, quantised, quantised_in
from diffgraft.methods.quant.shortcuts import from_below, skip_channels
from probes import Probe, generate, tiny
from torch import nn


def test_what_is_left_behind_last_is_taken_first() -> None:
    down = [([32, 32], 32), ([64, 64], None)]
    assert skip_channels(16, down, [3, 3]) == [[64, 64, 32], [32, 32, 16]]
    with pytest.raises(ValueError, match="leave 6 tensors, the up blocks take 5"):
        skip_channels(16, down, [3, 2])


def test_what_comes_from_below_must_be_something() -> None:
    unet = copy.deepcopy(tiny("StableDiffusionPipeline")[0].unet)
    below = from_below(unet, "me")
    assert all(0 < channels < unet.get_submodule(path).in_channels for path, channels in below.items())
    unet.up_blocks[0].resnets[0].in_channels = 1
    with pytest.raises(Unsupported, match=r"me: .*nothing comes from below in up_blocks\.0\.resnets\.0"):
        from_below(unet, "me")


class Coarse(Probe):
    """All linears on 8 bits."""

    def modules(self, call, next):
        for layer in layers_of(call.denoisers, (nn.Linear,)):
            put(call.swap, layer, quantised(layer.module, UniformAffine(8, "channel")))
        next(call)


def test_a_lora_that_is_fused_under_a_quantised_layer_is_seen():
    """It is written into the weights, and those that are rounded already know nothing of it."""
    peft = pytest.importorskip("peft")
    pipe, kwargs = tiny("StableDiffusionPipeline")
    pipe.unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=1, init_lora_weights=False, target_modules=["to_v"]))
    load_pipeline(pipe, plugins=[Coarse()])
    generate(pipe, kwargs)
    ensure_current({"unet": pipe.unet}, "me")
    pipe.fuse_lora()
    with pytest.raises(Unsupported, match=r"me: the weights of unet\.\S+to_v\S*, .*were written to .*put it on again"):
        ensure_current({"unet": pipe.unet}, "me")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_cast_is_no_writing(dtype):
    pipe, _ = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Coarse()])
    for to in (dtype, torch.float32):  # and back, with what was lost
        pipe.unet.to(to)
        ensure_current({"unet": pipe.unet}, "me")
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight.mul_(1.01)
    with pytest.raises(Unsupported, match=r"mid_block\S+to_q, "):
        ensure_current({"unet": pipe.unet}, "me")


@pytest.mark.parametrize("bits", ["w8a8", "w4a8"])
def test_each_layer_of_a_run_is_its_formula(bits):
    """y = W_q x_q + b in float64, by x / delta, on the very inputs that it got: only what lies between two levels may fall to the other."""
    pipe, kwargs = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Nearest(bits)])
    asked, values, moved = [], 0, []

    def ensure_on_grid(x, found, scale, grid):
        nonlocal values
        delta, zero = scale.delta.double(), scale.zero.double()
        ratio = x.double() / delta
        exact = ((ratio.round() + zero).clamp(grid.lowest, grid.highest) - zero) * delta
        other = (exact - found.double()).abs() > delta / 2
        values += other.numel()
        moved.extend((ratio % 1 - 0.5).abs()[other].tolist())

    def after(layer, args, y):
        [x], [rounder], [weights] = args, layer.inputs, layer.weights
        found = rounder(x)
        ensure_on_grid(x, found, nearest_scale(x, rounder.grid), rounder.grid)
        ensure_on_grid(layer.weight, weights.value, weights.scales[0], weights.grid)
        operands = found.double(), weights.value.double(), None if layer.bias is None else layer.bias.double()
        wanted = F.linear(*operands) if isinstance(layer, nn.Linear) else layer._conv_forward(*operands)
        assert float((y.double() - wanted).norm() / wanted.norm()) < 1e-5
        asked.append(layer.key)

    for layer in quantised_in({"unet": pipe.unet}).values():
        layer.register_forward_hook(after)
    generate(pipe, kwargs)
    assert set(asked) == {layer.key for layer in quantised_in({"unet": pipe.unet}).values()}
    assert len(moved) < 1e-4 * values
    assert max(moved, default=0) < 1e-4
