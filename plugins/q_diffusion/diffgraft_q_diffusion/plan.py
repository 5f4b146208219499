"""Which layers of a U-Net lie on which grids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffgraft import Unsupported, root_of
from diffgraft.methods.quant.affine import nearest_scale
from diffgraft.methods.quant.attention import OPERANDS, QUERIES
from diffgraft.methods.quant.knobs import inputs_of, weights_of
from diffgraft.methods.quant.layers import Layer, QuantLayer, QuantLinear, chosen, layers_of, quantised
from torch import nn

from diffgraft_q_diffusion.knobs import QDiffusionConfig
from diffgraft_q_diffusion.method import skip_channels, split_at

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
    """The shortcuts of the up blocks by key -> channels of their inputs that come from below.

    Raises:
        Unsupported: it cannot be told which come across.
    """
    found: dict[str, int] = {}
    for model, denoiser in denoisers.items():
        root: Any = root_of(denoiser)
        try:
            down = [([channels_of(x) for x in block.resnets], sampler_channels(block)) for block in root.down_blocks]
            skips = skip_channels(root.config["block_out_channels"][0], down, [len(block.resnets) for block in root.up_blocks])
            for i, block in enumerate(root.up_blocks):
                for j, resnet in enumerate(block.resnets):
                    for path, module in resnet.named_modules():
                        if (name := path.removesuffix(".base_layer")).endswith("conv_shortcut") and isinstance(module, nn.Conv2d):
                            found[f"{model}.up_blocks.{i}.resnets.{j}.{name}"] = split_at(module.in_channels, skips[i][j])
        except (AttributeError, ValueError) as error:
            raise Unsupported(
                f"q_diffusion: which channels of {type(root).__name__}'s shortcuts come across cannot be told ({error}); set split=False"
            ) from error
    return found


def channels_of(resnet: Any) -> int:
    """Channels that a residual block gives; one of video has one for pictures inside."""
    return int(getattr(resnet, "spatial_res_block", resnet).out_channels)


def sampler_channels(block: Any) -> int | None:
    """Channels that a down block's sampler gives."""
    samplers = getattr(block, "downsamplers", None)
    return int(samplers[-1].out_channels) if samplers else None


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
