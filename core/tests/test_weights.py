"""Weights of every class: fingerprints, what may cross, and gradients, with 8-bit dtypes and a tensor class like a quantiser's."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffgraft import ArtefactMismatch, Need, Unsupported, load_pipeline
from diffgraft.kernel.weights import kept_by
from diffgraft.methods.artefacts import Artefact, Fingerprint, MadeFor
from diffgraft.methods.gradients import explained
from diffgraft.methods.weights import middle_value, shape_of
from probes import PluginConfig, Probe, generate, tiny
from pydantic import Field
from torch import nn


class Quantised(torch.Tensor):
    """Whole numbers and a scale; like torchao's and quanto's classes it knows ``dequantize`` and linear layers, and refuses views."""

    @staticmethod
    def __new__(cls, whole: Any, scale: Any, dtype: Any) -> Any:
        return torch.Tensor._make_wrapper_subclass(cls, whole.shape, dtype=dtype, requires_grad=False)

    def __init__(self, whole: Any, scale: Any, dtype: Any) -> None:
        self.whole, self.scale = whole, scale

    def dequantize(self) -> torch.Tensor:
        return self.whole.to(self.dtype) * self.scale

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(args[0].whole, args[0].scale, args[0].dtype)
        raise NotImplementedError(f"{func} is not there for {cls.__name__}")

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is nn.functional.linear:
            return func(args[0].detach(), args[1].dequantize(), *args[2:], **(kwargs or {}))  # no way back, as in some
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))


def quantise(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Linear):
            scale = module.weight.detach().abs().max() / 127
            whole = (module.weight.detach() / scale).round().to(torch.int8)
            module.weight = nn.Parameter(Quantised(whole, scale, module.weight.dtype), requires_grad=False)
    return model


class Mute(Quantised):
    """Does not say what it holds."""

    dequantize = None  # type: ignore[assignment]


def eight_bit(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float8_e4m3fn)
    return model


def unet(seed: int = 0) -> nn.Module:
    model = tiny("StableDiffusionPipeline")[0].unet
    if seed:
        for parameter in model.parameters():
            parameter.data.mul_(1 + seed)
    return model


def test_fingerprints_of_every_class():
    plain, quantised, small = (Fingerprint.of(model) for model in (unet(), quantise(unet()), eight_bit(unet())))
    assert plain.layout == quantised.layout == small.layout
    assert (plain.kept, quantised.kept, small.kept) == ("", "Quantised", "float8_e4m3fn")
    assert not any(map(math.isnan, quantised.weights))
    assert quantised.difference(Fingerprint.of(quantise(unet()))) is None
    assert plain.difference(quantised) == "UNet2DConditionModel with weights kept as Quantised instead of plain numbers"
    assert small.difference(plain) == "UNet2DConditionModel with weights kept as plain numbers instead of float8_e4m3fn"
    for other in (quantised, small):
        assert plain.difference(other, crosses=True) is None
        assert other.difference(plain, crosses=True) is None
        assert plain.difference(Fingerprint.of(unet(seed=1)), crosses=True) == "UNet2DConditionModel with other weights"
    assert plain.difference(Fingerprint.of(quantise(unet(seed=1))), crosses=True) == "UNet2DConditionModel with other weights"


def test_a_class_that_does_not_say_what_it_holds():
    model = nn.Linear(2, 3)
    model.weight = nn.Parameter(Mute(torch.ones(3, 2, dtype=torch.int8), 1.0, torch.float32), requires_grad=False)
    found = Fingerprint.of(model)
    assert [math.isnan(value) for value in found.weights] == [False, True]  # the bias says it
    assert found.difference(Fingerprint.of(model)) is None


def test_two_4_bit_numbers_in_a_byte():
    packed = nn.Parameter(torch.zeros(6, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=torch.Size((4, 3)))  # type: ignore[attr-defined]
    assert shape_of(packed) == (4, 3)


def test_middle_values_are_read_without_copies():
    weight = nn.Parameter(torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last))
    assert middle_value(weight) == 12.0
    assert middle_value(nn.Parameter(torch.arange(6.0).reshape(2, 3).T)) == float(torch.arange(6.0).reshape(2, 3).T.reshape(-1)[3])


class Knobs(PluginConfig):
    artefact: Any = Field(None, description="made for one model")


class Fitted(Probe):
    name = "fitted"
    Config = Knobs
    needs = (Need("artefact", "artefact", fits=frozenset()),)

    def denoise(self, call, next):
        return next(call)


class Crossing(Fitted):
    needs = (Need("artefact", "artefact", fits=frozenset(), crosses="measured: 2 % of the statistic on 8-bit weights"),)


def test_whether_an_artefact_crosses_is_declared(caplog):
    pipe, kwargs = tiny("StableDiffusionPipeline")
    made = Artefact(MadeFor.describe("fitted", pipe, pipe.scheduler, {"unet": pipe.unet}, 1, (4, 8, 8)), {})
    load_pipeline(pipe, plugins=[Fitted(artefact=made)])
    quantise(pipe.unet)  # after it was put on
    with pytest.raises(ArtefactMismatch, match="unet: found UNet2DConditionModel with weights kept as Quantised instead of plain numbers"):
        generate(pipe, kwargs, num_inference_steps=1)
    pipe.plugins.remove("fitted")
    load_pipeline(pipe, plugins=[Crossing(artefact=made)])
    generate(pipe, kwargs, num_inference_steps=1, output_type="latent")
    assert "made for weights kept as plain numbers, used with Quantised: measured: 2 %" in caplog.text


def test_gradients_through_such_weights_are_refused_in_our_words(sd):
    model = quantise(unet())
    call: Any = SimpleNamespace(entry=SimpleNamespace(name="a_method"))
    assert kept_by(model) == "Quantised"
    with pytest.raises(Unsupported, match="a_method needs gradients, and the weights of this UNet2DConditionModel are kept as Quantised"):
        with explained(call, model):
            torch.autograd.grad(nn.functional.linear(torch.ones(1, 4, requires_grad=True), torch.ones(2, 4)).detach().sum(), [])
    with pytest.raises(RuntimeError, match="mine"):
        with explained(call, unet()):
            raise RuntimeError("mine")
