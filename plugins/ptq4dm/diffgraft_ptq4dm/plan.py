"""Which layers of a U-Net lie on which grids."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from diffgraft.methods.quant.knobs import inputs_of, weights_of
from diffgraft.methods.quant.layers import Layer, QuantLayer, chosen, layers_of, quantised
from torch import nn

from diffgraft_ptq4dm.knobs import PTQ4DMConfig
from diffgraft_ptq4dm.method import searched

ENDS = ("conv_in", "conv_out")


def wanted(denoisers: Mapping[str, nn.Module], config: PTQ4DMConfig, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> list[Layer]:
    """All linears and convolutions of the denoisers, but those that are kept.

    Raises:
        ConfigError: ``keep`` names a layer that the model does not have.
    """
    layers = list(layers_of(denoisers, kinds))
    out = {layer.key for layer in chosen(layers, config.keep, "plugin 'ptq4dm': keep")}
    return [layer for layer in layers if layer.key not in out]


def made(layer: Layer, config: PTQ4DMConfig, scale_of: Any = None) -> QuantLayer:
    """The layer on its grids; its inputs' range is that of each tensor until it is measured."""
    at_end = layer.path in ENDS
    weight, inputs = (bits(config.bits_of(n, at_end)) for bits, n in ((weights_of, config.weight_bits), (inputs_of, config.input_bits)))
    return quantised(layer.module, weight, inputs, scale_of=scale_of or partial(searched, p=config.p))
