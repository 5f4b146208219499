"""Where a U-Net joins what comes from below with what comes across, and quantised layers whose weights are written to."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from diffgraft import Conflict, Unsupported, load_pipeline, unload
from diffgraft.lab.nearest import Nearest
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale
from diffgraft.methods.quant.knobs import BitsConfig
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, ensure_current, layers_of, put, quantised, quantised_in
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


def test_a_lora_over_a_quantised_convolution_is_refused_in_our_words():
    """peft makes its own layers of the class that they lie over."""
    peft = pytest.importorskip("peft")
    pipe, _ = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[Nearest("w8a8")])
    with pytest.raises(Unsupported, match="a LoRA is loaded over a quantised convolution: take the plugin off"):
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"]))


def test_one_plugin_quantises_a_model():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain = generate(pipe, kwargs)
    for stack in ([Coarse(), Nearest("w4a8")], ["ptq4dm", ("q_diffusion", {"bits": "w4a8"})], ["q_diffusion", "tfmq"], ["tfmq", "ptq4dm"]):
        with pytest.raises(Conflict, match=r"unet\.\S+ is quantised by another plugin already: one quantises a model"):
            load_pipeline(pipe, plugins=stack)
        assert not any(isinstance(module, (QuantLinear, QuantConv2d)) for module in pipe.unet.modules())
    assert torch.equal(generate(unload(pipe), kwargs), plain)


def test_weights_that_were_no_numbers_before_were_not_written_to():
    pipe, _ = tiny("StableDiffusionPipeline")
    with torch.no_grad():
        pipe.unet.mid_block.attentions[0].proj_in.weight.fill_(torch.nan)
    load_pipeline(pipe, plugins=[Nearest("w8a8")])
    ensure_current({"unet": pipe.unet}, "me")


def test_hooks_and_parameters_of_a_layer_outlive_its_exchange():
    pipe, kwargs = tiny("StableDiffusionPipeline")
    layer, seen = pipe.unet.mid_block.attentions[0].proj_in, []
    layer.register_forward_hook(lambda *_: seen.append("before"))
    load_pipeline(pipe, plugins=[Nearest("w8a8")])
    now = pipe.unet.mid_block.attentions[0].proj_in
    now.register_forward_pre_hook(lambda *_: seen.append("during"))
    generate(pipe, kwargs)
    assert set(seen) == {"before", "during"}
    now.weight = nn.Parameter(torch.zeros_like(layer.weight))
    unload(pipe)
    assert pipe.unet.mid_block.attentions[0].proj_in is layer
    assert not layer.weight.any()


def test_a_layer_that_something_else_answers_for_is_not_exchanged():
    pipe, _ = tiny("StableDiffusionPipeline")
    layer = pipe.unet.mid_block.attentions[0].proj_in
    layer.forward = type(layer).forward.__get__(layer)
    with pytest.raises(Unsupported, match=r"unet\.mid_block\.attentions\.0\.proj_in has a forward of its own .*: put the plugin on before"):
        load_pipeline(pipe, plugins=[Nearest("w8a8")])


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


@pytest.mark.parametrize("plan", ["w08a8", "w8a08", "w1a8", "w17a8", "w8", "a8w8", "W8A8", "w8a8 ", "w100a8", ""])
def test_bits_are_written_in_one_way(plan):
    with pytest.raises(ValueError, match="write wXaY with X and Y from 2 to 16, or 32"):
        BitsConfig(bits=plan)
    assert BitsConfig(bits="w10a32").weight_bits == 10
