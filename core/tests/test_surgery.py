"""Single weights that plugins exchange."""

from __future__ import annotations

import copy

import torch
from diffgraft import load_pipeline
from probes import Probe, generate, tiny, trace


def test_a_single_weight_is_exchanged_like_a_module():
    class Quiet(Probe):
        name = "quiet"

        def modules(self, call, next):
            out = call.denoisers["unet"].conv_out
            call.swap(out, "bias", torch.nn.Parameter(torch.full_like(out.bias, 5.0), requires_grad=False))
            next(call)

    pipe, kwargs = tiny("StableDiffusionPipeline")
    before, own = generate(pipe, kwargs), pipe.unet.conv_out.bias
    seen = trace(pipe)
    load_pipeline(pipe, plugins=[Quiet])
    assert pipe.unet.conv_out.bias is not own
    assert not torch.equal(generate(pipe, kwargs), before)
    twin = copy.deepcopy(pipe)
    assert torch.equal(generate(twin, kwargs), generate(pipe, kwargs))
    twin.plugins.clear()
    assert torch.equal(twin.unet.conv_out.bias, own)
    pipe.plugins.clear()
    assert pipe.unet.conv_out.bias is own
    assert trace(pipe) == seen
    assert torch.equal(generate(pipe, kwargs), before)
