"""Where a U-Net joins what comes from below with what comes across, and quantised layers whose weights are written to."""

from __future__ import annotations

import copy

import pytest
import torch
from diffgraft import Unsupported, load_pipeline
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.layers import ensure_current, layers_of, put, quantised
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
