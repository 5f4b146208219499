"""A denoiser with simulated layers -> the same with torchao's, which have kernels: ``pip install 'diffgraft[torchao]'``.

    pipe = load_pipeline("emoji-flux", plugins={"vidit_q": {"symmetric": True}})
    fast = exported(pipe.transformer)
    unload(pipe).transformer = fast

The codes and scales are carried over as they are, so both compute the same up to the rounding of float sums. What has a kernel:

    inputs            weights                               torchao
    floats            8 bits, symmetric                     Int8Tensor, products in floats
    floats            2 to 8 bits                           IntxUnpackedToInt8Tensor: a byte for each weight, no kernel of its own
    8 bits, token     8 bits, symmetric                     Int8Tensor, products in int8
    8 bits, tensor    8 bits, symmetric; fixed, symmetric   Int8Tensor, products in int8
    8 bits, token     2 to 8 bits                           IntxUnpackedToInt8Tensor, inputs asymmetric

Convolutions have none there: they stay simulated. The same list for users: docs/howto/quantise.md.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from diffgraft.installed.anatomy import root_of
from diffgraft.installed.errors import Unsupported
from diffgraft.methods.extras import imported
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, Weights
from diffgraft.methods.quant.rounding import balanced


def exported(denoiser: nn.Module) -> nn.Module:
    """A copy of the denoiser with torchao's weights in the place of its quantised linears; the original stays as it is.

    Raises:
        Unsupported: torchao is missing; nothing in it is quantised; or a layer has no kernel, named with what it would need.
    """
    imported("torchao", "the export of a quantised model")
    root = root_of(denoiser)
    layers = {path: module for path, module in root.named_modules() if isinstance(module, QuantLinear)}
    if not any(layer.weights for layer in layers.values()) and not any(isinstance(module, QuantConv2d) for module in root.modules()):
        why = "the weights of its quantised layers are floats" if layers else "put the plugin on first"
        raise Unsupported(f"{type(root).__name__} has no quantised layer to export: {why}")
    made = {path: kernel_weight(path, layer) for path, layer in layers.items() if layer.weights}
    memo: dict[int, Any] = {}
    for path, layer in layers.items():
        new = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        new.weight = nn.Parameter(made.get(path, layer.weight.detach()), requires_grad=False)
        new.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().clone(), requires_grad=False)  # type: ignore[assignment]
        memo[id(layer)] = new.train(layer.training)
    return copy.deepcopy(root, memo)


def kernels_of(denoisers: Mapping[str, nn.Module]) -> str:
    """What a report says of kernels for the quantised layers as they are: that :func:`exported` makes them, or why it would not."""
    named = [(path, module) for denoiser in denoisers.values() for path, module in root_of(denoiser).named_modules()]
    layers = [(path, module) for path, module in named if isinstance(module, QuantLinear) and module.weights]
    if not layers:
        return "no kernel to export to: the weights are floats"
    try:
        for path, layer in layers:
            ensure_kernel(path, layer)
    except Unsupported as error:
        return f"no kernel to export to: {error}"
    return "`diffgraft.methods.quant.export.exported` makes a model that has kernels"


def ensure_kernel(path: str, layer: QuantLinear) -> None:
    """Raises Unsupported where torchao has no kernel for a layer's grids."""
    weights: Weights = layer.weights[0]  # type: ignore[assignment]
    grid, rounder = weights.grid, layer.inputs[0] if layer.inputs else None
    if layer.outputs is not None:
        raise Unsupported(f"{path} rounds what comes out of it too (quantised attention), which no kernel does: quantise without")
    if len(layer.weights) > 1 or len(weights.sizes) > 1:
        what = "several ranges of timesteps" if len(layer.weights) > 1 else "a split"
        raise Unsupported(f"{path} has a weight for each of {what}, and a kernel takes one: quantise without")
    if layer.rotation is not None:
        raise Unsupported(f"{path} rotates its inputs, which no kernel does: quantise without")
    if grid.bits > 8 or (rounder is not None and rounder.grid.bits != 8):
        inputs = "floats" if rounder is None else f"{rounder.grid.bits} bits"  # type: ignore[union-attr]
        raise Unsupported(
            f"{path}: no kernel takes weights of {grid.bits} bits with inputs of {inputs}; weights 2 to 8, inputs 8 or floats"
        )
    if grid.bits == 8 and grid.symmetric:
        if rounder is not None and rounder.fixed is not None and not rounder.grid.symmetric:  # type: ignore[union-attr, operator]
            raise Unsupported(f"{path}: the kernel for inputs of one fixed scale takes symmetric ones: give them so, or by token")
    elif rounder is not None and (rounder.grid.over != "token" or rounder.grid.symmetric or layer.balance is not None):
        raise Unsupported(
            f"{path}: weights of {grid.bits} bits{'' if grid.symmetric else ', asymmetric,'} have a kernel only with inputs in floats, or "
            "asymmetric for each token and not balanced; symmetric weights of 8 bits have one with all inputs of 8"
        )


def kernel_weight(path: str, layer: QuantLinear) -> Tensor:
    """The weight of a layer as torchao keeps it.

    Raises:
        Unsupported: there is no kernel for its grids.
    """
    ensure_kernel(path, layer)
    weights: Weights = layer.weights[0]  # type: ignore[assignment]
    make = int8_weight if weights.grid.bits == 8 and weights.grid.symmetric else intx_weight
    return make(layer, weights, layer.inputs[0] if layer.inputs else None)


def int8_weight(layer: QuantLinear, weights: Weights, rounder: Any) -> Tensor:
    """``Int8Tensor`` with these codes and scales."""
    from torchao.quantization import PerRow, PerTensor
    from torchao.quantization.quant_primitives import MappingType
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import Int8Tensor, QuantizeTensorToInt8Kwargs

    [scale] = weights.scales
    inputs, fixed = None, None
    if rounder is not None:
        if rounder.fixed is not None:
            fixed = rounder.delta.detach().clone()
        mapping = MappingType.SYMMETRIC if rounder.grid.symmetric else MappingType.ASYMMETRIC
        inputs = QuantizeTensorToInt8Kwargs(PerRow() if rounder.grid.over == "token" else PerTensor(), mapping)
    return Int8Tensor(  # type: ignore[no-any-return]
        weights.codes(balanced(layer, 0)).to(torch.int8),
        scale.delta.detach().clone(),
        [1, layer.in_features],
        layer.weight.dtype,
        zero_point=scale.zero.to(torch.int8),
        act_quant_scale=fixed,
        act_pre_scale=None if layer.balance is None else (1 / layer.balance[0]).to(layer.weight.dtype),
        act_quant_kwargs=inputs,
    )


def intx_weight(layer: QuantLinear, weights: Weights, rounder: Any) -> Tensor:
    """``IntxUnpackedToInt8Tensor`` with these codes and scales, moved from 0 .. 2^b - 1 to where int8 keeps them."""
    from torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor import (
        IntxUnpackedToInt8Tensor,
        IntxUnpackedToInt8TensorActivationQuantization,
    )

    [scale] = weights.scales
    moved = 0 if weights.grid.symmetric else 2 ** (weights.grid.bits - 1)
    inputs = None if rounder is None else IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN
    return IntxUnpackedToInt8Tensor(  # type: ignore[no-any-return]
        (weights.codes(balanced(layer, 0)) - moved).to(torch.int8),
        scale.delta.detach().clone().to(layer.weight.dtype),
        (scale.zero - moved).to(torch.int8),
        getattr(torch, f"int{weights.grid.bits}"),
        (1, layer.in_features),
        layer.weight.dtype,
        inputs,
    )


def bytes_in(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers as they lie in memory, torchao's inner tensors counted for what they hold."""
    total = 0
    for value in [*model.parameters(), *model.buffers()]:
        inner = getattr(value, "__tensor_flatten__", None)
        parts = [getattr(value, name) for name in inner()[0]] if inner is not None else [value]
        total += sum(part.numel() * part.element_size() for part in parts)
    return total
