"""Single weights that plugins exchange, and layers beside a LoRA that another one brings."""

from __future__ import annotations

import copy

import pytest
import torch
from diffgraft import Conflict, load_pipeline, unload
from peft.utils import get_peft_model_state_dict
from probes import Probe, generate, tiny, trace
from safetensors.torch import save_file
from test_adapters import Brings, looks, with_lora


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


class Exchanges(Probe):
    """Puts another layer of the same numbers in the place of each to_q, under a LoRA where there is one."""

    name = "exchanges"

    def modules(self, call, next):
        for module in list(call.denoisers["unet"].modules()):
            parent, name = (module.to_q, "base_layer") if hasattr(getattr(module, "to_q", None), "base_layer") else (module, "to_q")
            if isinstance(old := getattr(parent, name, None), torch.nn.Linear):
                call.swap(parent, name, copy.deepcopy(old))
        next(call)


@pytest.mark.parametrize("lora_first", [True, False])
def test_a_lora_and_exchanged_layers_of_two_plugins_are_refused_and_leave_nothing(lora_first, tmp_path):
    """Taken off in the other order, one would put back what lay over the other's, or lose it."""
    _, _, model, _ = with_lora()
    file = tmp_path / "lora.safetensors"
    save_file({f"unet.{key}": value for key, value in get_peft_model_state_dict(model).items()}, file)
    pipe, kwargs = tiny("StableDiffusionPipeline")
    plain, before = generate(pipe, kwargs), looks(pipe)
    pair = [Brings(lora=str(file)), Exchanges()] if lora_first else [Exchanges(), Brings(lora=str(file))]
    with pytest.raises(Conflict, match=r"brings brings a LoRA for layers that exchanges exchanges.*take one off"):
        load_pipeline(pipe, plugins=pair)
    assert looks(pipe) == before
    load_pipeline(pipe, plugins=pair[:1])
    with pytest.raises(Conflict, match="take one off"):
        pipe.plugins.add(pair[1])
    unload(pipe)
    assert looks(pipe) == before
    assert torch.equal(generate(pipe, kwargs), plain)
