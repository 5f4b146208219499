"""Which layers of a U-Net lie on which grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffgraft import Unsupported, root_of
from diffgraft.methods.quant.affine import nearest_scale
from diffgraft.methods.quant.attention import OPERANDS, QUERIES
from diffgraft.methods.quant.knobs import inputs_of, weights_of
from diffgraft.methods.quant.layers import Layer, QuantLayer, QuantLinear, chosen, layers_of, quantised
from diffgraft.methods.quant.shortcuts import from_below
from torch import nn

from diffgraft_q_diffusion.knobs import QDiffusionConfig

BLOCKS = ("down_blocks.", "mid_block.", "up_blocks.")


def wanted(denoisers: Mapping[str, nn.Module], config: QDiffusionConfig, kinds: tuple[type, ...] = (nn.Linear, nn.Conv2d)) -> list[Layer]:
    """All linears and convolutions of the denoisers, but those that are kept.

    Raises:
        ConfigError: ``keep`` names a layer that the model does not have.
    """
    layers = list(layers_of(denoisers, kinds))
    out = {layer.key for layer in chosen(layers, config.keep, "plugin 'q_diffusion': keep")}
    return [layer for layer in layers if layer.key not in out]


def splits_of(denoisers: Mapping[str, nn.Module]) -> dict[str, int]:
    """The shortcuts of the up blocks by key -> channels of their inputs that come from below (section 4.2, equation 7).

    Raises:
        Unsupported: it cannot be told which come across.
    """
    found: dict[str, int] = {}
    for model, denoiser in denoisers.items():
        try:
            below = from_below(denoiser, "q_diffusion")
        except Unsupported as error:
            raise Unsupported(f"{error}; set split=False") from error
        for place, channels in below.items():
            for path, module in root_of(denoiser).get_submodule(place).named_modules():
                if (name := path.removesuffix(".base_layer")).endswith("conv_shortcut") and isinstance(module, nn.Conv2d):
                    found[f"{model}.{place}.{name}"] = channels
    return found


def is_inside(layer: Layer) -> bool:
    """Whether a layer is in a block."""
    return layer.path.startswith(BLOCKS)


def made(layer: Layer, config: QDiffusionConfig, splits: Mapping[str, int], scale_of: Any = nearest_scale) -> QuantLayer:
    """The layer with its weights on their grids, and its activations in floats."""
    bits = config.weight_bits_of(is_inside(layer))
    return quantised(layer.module, weights_of(bits), split=splits.get(layer.key, 0) if config.split else 0, scale_of=scale_of)


def round_activations(layer: QuantLayer, config: QDiffusionConfig, splits: Mapping[str, int]) -> None:
    """Put a layer's inputs on grids: two where it is split; and what an attention multiplies: queries, keys, values, softmax."""
    _, _, path = layer.key.partition(".")
    grid = inputs_of(config.input_bits_of(path.startswith(BLOCKS)))
    if grid is None:
        return
    name = path.rpartition(".")[2] if isinstance(layer, QuantLinear) else ""
    softmax = inputs_of(config.softmax) if name in QUERIES else None
    split = splits.get(layer.key, 0) if config.split else 0
    layer.round_activations(grid, split, grid if name in OPERANDS else None, softmax)
