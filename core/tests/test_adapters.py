"""A denoiser without its LoRA, and the LoRA back as it was."""

from __future__ import annotations

import pytest
import torch
from diffgraft import Unsupported
from diffgraft.methods.adapters import without_adapters
from diffgraft.testing.tiny import has_peft
from peft import LoraConfig
from probes import generate, tiny

pytestmark = pytest.mark.skipif(not has_peft(), reason="needs peft")


def with_lora(name="StableDiffusionPipeline"):
    pipe, kwargs = tiny(name)
    plain = generate(pipe, kwargs)
    model = getattr(pipe, "unet", None) or pipe.transformer
    torch.manual_seed(1)
    model.add_adapter(LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, target_modules=["to_q", "to_k", "to_v"]))
    model.eval()
    return pipe, kwargs, model, plain


@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "FluxPipeline"])
def test_off_is_the_base_model_and_on_again_is_the_lora(name):
    pipe, kwargs, model, plain = with_lora(name)
    tuned = generate(pipe, kwargs)
    assert not torch.equal(tuned, plain)
    before = {key: dict(module.__dict__) for key, module in model.named_modules()}
    grads = [p.requires_grad for p in model.parameters()]
    with without_adapters(model):
        assert torch.equal(generate(pipe, kwargs), plain)
    assert {key: dict(module.__dict__) for key, module in model.named_modules()} == before
    assert [p.requires_grad for p in model.parameters()] == grads
    assert torch.equal(generate(pipe, kwargs), tuned)


def test_an_exception_inside_leaves_it_on():
    pipe, kwargs, model, _ = with_lora()
    tuned = generate(pipe, kwargs)
    with pytest.raises(KeyboardInterrupt), without_adapters(model):
        raise KeyboardInterrupt
    assert torch.equal(generate(pipe, kwargs), tuned)


def test_what_the_user_switched_off_stays_off():
    pipe, kwargs, model, plain = with_lora()
    model.disable_adapters()
    with without_adapters(model), without_adapters(model):
        assert torch.equal(generate(pipe, kwargs), plain)
    assert torch.equal(generate(pipe, kwargs), plain)
    model.enable_adapters()
    assert not torch.equal(generate(pipe, kwargs), plain)


def test_no_lora_and_a_fused_one_are_refused():
    pipe, _ = tiny("StableDiffusionPipeline")
    with pytest.raises(Unsupported, match="carries no LoRA"), without_adapters(pipe.unet):
        pass
    _, _, model, _ = with_lora()
    model.fuse_lora()
    with pytest.raises(Unsupported, match="unfuse_lora"), without_adapters(model):
        pass
