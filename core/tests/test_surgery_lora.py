"""Modules that plugins exchange, and a LoRA that comes, goes, is fused or switched meanwhile: what is left is the pipeline, or refused."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from diffgraft import Conflict, load_pipeline, unload
from diffgraft.methods.standing_in import stand_in
from probes import Probe, generate, tiny

peft = pytest.importorskip("peft")


class Shares(torch.nn.Linear):
    """Computes twice what the layer in whose place it is does, with its weights."""

    def __init__(self, layer):
        super().__init__(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        stand_in(self, layer)

    def forward(self, input):
        return 2 * super().forward(input)


class Owns(Shares):
    """The same, with weights of its own."""

    def __init__(self, layer):
        super().__init__(copy.deepcopy(layer))


class Exchanges(Probe):
    name = "exchanges"
    kind: type = Shares

    def modules(self, call, next):
        for path, layer in list(call.denoisers["unet"].named_modules()):
            if re.search(r"\.to_q(\.base_layer)?$", path) and type(layer) is torch.nn.Linear:
                parent, _, name = path.rpartition(".")
                call.swap(call.denoisers["unet"].get_submodule(parent), name, self.kind(layer))
        next(call)


class ExchangesOwn(Exchanges):
    kind = Owns


class ExchangesWeights(Exchanges):
    """Weights alone, without a module around them."""

    def modules(self, call, next):
        for path, layer in list(call.denoisers["unet"].named_modules()):
            if re.search(r"\.to_q(\.base_layer)?$", path) and type(layer) is torch.nn.Linear:
                call.swap(layer, "weight", torch.nn.Parameter(2 * layer.weight.detach(), requires_grad=False))
        next(call)


class ExchangesParts(Exchanges):
    """A whole part of the model, LoRA layers or not."""

    def modules(self, call, next):
        call.swap(call.denoisers["unet"], "mid_block", copy.deepcopy(call.denoisers["unet"].mid_block))
        next(call)


def lora(pipe, name="x"):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        config = peft.LoraConfig(r=2, lora_alpha=8, init_lora_weights=False, target_modules=["to_q", "to_k"])
        pipe.unet.add_adapter(config, adapter_name=name)


DEEDS = {
    "load": lora,
    "other": lambda pipe: lora(pipe, "y"),
    "unload": lambda pipe: pipe.unload_lora_weights(),
    "delete": lambda pipe: pipe.unet.delete_adapters("x"),
    "fuse": lambda pipe: pipe.fuse_lora(),
    "unfuse": lambda pipe: pipe.unfuse_lora(),
    "weaken": lambda pipe: pipe.set_adapters("x", 0.5),
    "off": lambda pipe: pipe.disable_lora(),
    "plugin": lambda pipe: None,
}
ORDERS = [
    "load plugin unload",
    "load plugin unload other",
    "load plugin unload load unload",
    "load plugin delete",
    "load plugin delete unload",
    "load plugin fuse",
    "load plugin fuse unload",
    "load plugin fuse unfuse",
    "load fuse plugin unfuse",
    "load fuse unload plugin",
    "load plugin other unload",
    "load plugin weaken off",
    "plugin load",
    "plugin load unload",
    "plugin load fuse",
    "plugin load fuse unload",
    "plugin load fuse unfuse unload",
]
PICTURES = {"load plugin unload", "load plugin fuse", "plugin load"}
"""Orders after which pictures are compared too: classes and weights tell the rest."""


def told(pipe):
    """Classes and weights of all modules, by path."""
    return {path: type(module) for path, module in pipe.unet.named_modules()}, {k: v.clone() for k, v in pipe.unet.state_dict().items()}


def after(order, plugin):
    """(pipeline after these deeds with the plugin on it, one after the same without it, arguments of a call)."""
    pipes = []
    for put in (lambda pipe: load_pipeline(pipe, plugins=[plugin]), lambda pipe: None):
        pipe, kwargs = tiny("StableDiffusionPipeline")
        for deed in order.split():
            (put if deed == "plugin" else DEEDS[deed])(pipe)
        pipes.append(pipe)
    return *pipes, kwargs


def ensure_same(pipe, twin, kwargs=None, near=0.0):
    """``kwargs``: of a call whose pictures are compared too; ``near``: how far weights may be from the twin's."""
    assert not hasattr(pipe, "plugins")
    assert not any(isinstance(module, Shares) for module in pipe.unet.modules())
    (found, weights), (classes, values) = told(pipe), told(twin)
    assert found == classes
    assert all(torch.allclose(weights[name], values[name], rtol=0, atol=near) for name in values)
    assert kwargs is None or torch.equal(generate(pipe, kwargs), generate(twin, kwargs))


@pytest.mark.parametrize("order", ORDERS)
def test_layers_that_share_weights_go_whatever_came_over_them_or_went(order):
    pipe, twin, kwargs = after(order, Exchanges)
    copied = copy.deepcopy(pipe) if "plugin load" not in order else None
    assert any(isinstance(module, Shares) for module in pipe.unet.modules())
    pipe.plugins.disable()
    assert not any(isinstance(module, Shares) for module in pipe.unet.modules())
    pipe.plugins.enable()
    pipe.plugins.clear()
    ensure_same(pipe, twin, kwargs if order in PICTURES else None)
    if copied is not None:
        ensure_same(unload(copied), twin)


@pytest.mark.parametrize("plugin", [ExchangesOwn, ExchangesWeights, ExchangesParts])
@pytest.mark.parametrize("order", [order for order in ORDERS if "fuse" in order or order.startswith("plugin")])
def test_what_has_weights_of_its_own_goes_or_is_refused_before_anything_is_touched(order, plugin):
    pipe, twin, _ = after(order, plugin)
    before = told(pipe)
    error = None
    try:
        pipe.plugins.clear()
    except Conflict as refused:
        error = str(refused)
    if error is None:
        if not order.endswith("fuse unload"):  # fused into what goes, and nobody can tell
            ensure_same(pipe, twin, near=1e-6 if order.endswith("unfuse") else 0.0)  # what is added and taken away again leaves roundings
        return
    assert re.search(r"exchanges cannot be taken off: a LoRA .*(unload_lora_weights|unfuse_lora)", error)
    assert "fuse" in order or plugin is ExchangesParts
    now = told(pipe)
    assert now[0] == before[0]
    assert all(torch.equal(now[1][name], before[1][name]) for name in before[1])
    assert pipe.plugins.list() == ("exchanges",)


def test_clear_refuses_before_the_first_plugin_is_off():
    class First(Exchanges):
        name = "first"

        def modules(self, call, next):
            call.swap(call.denoisers["unet"], "conv_in", copy.deepcopy(call.denoisers["unet"].conv_in))
            next(call)

    pipe, _ = tiny("StableDiffusionPipeline")
    load_pipeline(pipe, plugins=[First, ExchangesParts])
    lora(pipe)
    before = told(pipe)[0]
    for refused in (pipe.plugins.clear, pipe.plugins.disable):
        with pytest.raises(Conflict, match=r"exchanges cannot be taken off: a LoRA lies in its 'mid_block'.*unload_lora_weights"):
            refused()
        assert told(pipe)[0] == before
        assert pipe.plugins.list() == ("first", "exchanges")
    pipe.unload_lora_weights()
    unload(pipe)
