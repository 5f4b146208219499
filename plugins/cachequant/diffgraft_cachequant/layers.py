"""Layers whose inputs have a grid for each U-Net call of a run, and those that read the cached feature, corrected for each call too."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffgraft import PluginNotFound, Unsupported, now
from diffgraft.methods.quant.affine import Scale, UniformAffine, nearest_scale
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import (
    Layer,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    Rounder,
    SeveralScales,
    at_index,
    chosen,
    layers_of,
    moved,
    quantised,
)
from diffgraft.methods.quant.shortcuts import from_below
from torch import Tensor, nn

from diffgraft_cachequant.knobs import CacheQuantConfig
from diffgraft_cachequant.method import corrected

ENDS = ("conv_in", "conv_out")
"""Layers whose weights get 8 bits at least, as in the official code."""
READERS = (".conv1", ".conv_shortcut")
"""Of a layer with a skip connection: what reads the two halves of its input."""


def current() -> Tensor | int | None:
    """The number of the U-Net call that is in progress, 0-dim; a plain number where another plugin asks the U-Net before the call's turn;
    None in a run that cachequant is no part of.

    Raises:
        Unsupported: none is in progress.
    """
    run = now()
    if run is None:
        raise Unsupported(
            "cachequant: each call of a run has its own scales, and outside of a run nobody says which; ask through the pipeline"
        )
    try:
        told, number = run.shared("cachequant").at, run.step.call
    except PluginNotFound:
        return None
    return told[1] if told is not None and told[0] == number else number  # type: ignore[no-any-return]


class Affine(nn.Module):
    """a y + b of the U-Net call that is in progress; gain and offset are [T, C], float32."""

    gain: Tensor
    offset: Tensor

    def __init__(self, gain: Tensor, offset: Tensor) -> None:
        super().__init__()
        self.register_buffer("gain", gain, persistent=False)
        self.register_buffer("offset", offset, persistent=False)

    def forward(self, y: Tensor) -> Tensor:
        at = current()
        return y if at is None else corrected(y, at_index(self.gain, at), at_index(self.offset, at))

    def _apply(self, fn: Any, recurse: bool = True) -> Affine:
        return moved(self, fn)


class CorrectedConv2d(QuantConv2d):
    """y = a Q(x_1) * Q(W_1) + b + Q(x_2) * Q(W_2) + bias: what comes of the first half of the channels, the cached one, is corrected."""

    affine: Affine

    def forward(self, input: Tensor) -> Tensor:
        if not self.active:
            return super().forward(input)
        x, weight = self.operands(input)
        size = self.sizes[0]
        cached = self._conv_forward(x[:, :size], weight[:, :size], None)
        return self.affine(cached) + self._conv_forward(x[:, size:], weight[:, size:], self.bias)  # type: ignore[no-any-return]


KINDS = (nn.Linear, nn.Conv2d)
OURS = (*KINDS, QuantLinear, QuantConv2d, CorrectedConv2d)


def wanted(denoisers: Mapping[str, nn.Module], config: CacheQuantConfig, kinds: tuple[type, ...] = KINDS) -> list[Layer]:
    """All linears and convolutions of the U-Net but those that are kept.

    Raises:
        ConfigError: ``keep`` names a layer that the model does not have.
    """
    layers = list(layers_of(denoisers, kinds))
    out = {layer.key for layer in chosen(layers, config.keep, "plugin 'cachequant': keep")}
    return [layer for layer in layers if layer.key not in out]


def splits(layers: Sequence[Layer], denoisers: Mapping[str, nn.Module]) -> dict[str, int]:
    """By key of a convolution that reads a skip connection: the channels of the first half of its input."""
    found = {}
    for model, unet in denoisers.items():
        for path, size in from_below(unet, "cachequant").items():
            for layer in layers:
                inside = layer.model == model and layer.path.startswith(f"{path}.") and layer.path.endswith(READERS)
                if inside and isinstance(layer.module, nn.Conv2d) and layer.module.in_channels > size and layer.module.groups == 1:
                    found[layer.key] = size
    return found


def readers(keys: Sequence[str], denoisers: Mapping[str, nn.Module], branch: int) -> list[str]:
    """Those of these convolutions that read the feature which is cached at ``branch``."""
    places = [f"{model}.{list(from_below(unet, 'cachequant'))[-1 - branch]}." for model, unet in denoisers.items()]
    return [key for key in keys if any(key.startswith(place) for place in places)]


def on_grids(layer: Layer, config: CacheQuantConfig, split: int, calls: int, scale_of: Any = nearest_scale) -> QuantLayer:
    """The quantised layer; its inputs' scales for each of ``calls`` U-Net calls are to be filled in."""
    bits = max(config.weight_bits, 8) if layer.path in ENDS else config.weight_bits
    grid = None if bits == FLOAT else UniformAffine(bits, "channel")
    new = quantised(layer.module, grid, split=split if grid is not None else 0, scale_of=scale_of)
    if config.input_bits != FLOAT and config.inputs == "dynamic":
        new.inputs = nn.ModuleList(Rounder(UniformAffine(config.input_bits)) for _ in new.sizes)
    elif config.input_bits != FLOAT:
        device = layer.module.weight.device
        empty = [Scale(torch.ones(calls, 1, device=device), torch.zeros(calls, 1, device=device)) for _ in new.sizes]
        new.inputs = nn.ModuleList(SeveralScales(UniformAffine(config.input_bits), scale, current) for scale in empty)
    return new


def with_correction(layer: Layer, new: QuantLayer, gain: Tensor, offset: Tensor) -> CorrectedConv2d:
    """The same layer, what comes of the cached half corrected."""
    made = CorrectedConv2d(layer.module, weights=list(new.weights), inputs=list(new.inputs))  # type: ignore[arg-type]
    device = layer.module.weight.device
    made.affine = Affine(gain.to(device), offset.to(device))
    return made
