"""The published student: a whole U-Net of Stable Diffusion XL, under diffusers' own keys (SYZhang0805/DisBack, ``SDXL_DisBack.bin``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffgraft.methods.axes import Axes
from diffgraft.methods.layouts import Layout
from torch import Tensor, nn


def wide(factor: int) -> str:
    """So many times the width."""
    return "w" if factor == 1 else f"{factor}*w"


def affine(name: str, out: str, *into: int | str) -> dict[str, Axes]:
    """A weight and a bias; without ``into`` those of a norm."""
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def resnet(name: str, out: int, into: int) -> dict[str, Axes]:
    """A residual block from ``into`` times the width to ``out`` times."""
    found = affine(f"{name}.norm1", wide(into)) | affine(f"{name}.conv1", wide(out), wide(into), 3, 3)
    found |= affine(f"{name}.time_emb_proj", wide(out), "4*w")
    found |= affine(f"{name}.norm2", wide(out)) | affine(f"{name}.conv2", wide(out), wide(out), 3, 3)
    return found if out == into else found | affine(f"{name}.conv_shortcut", wide(out), wide(into), 1, 1)


def transformer(name: str, factor: int, depth: str) -> dict[str, Axes]:
    """As many blocks as the letter ``depth`` counts."""
    c, block = wide(factor), f"{name}.transformer_blocks.{{{depth}}}"
    found = affine(f"{name}.norm", c) | affine(f"{name}.proj_in", c, c) | affine(f"{name}.proj_out", c, c)
    for number, text in ((1, c), (2, "d")):
        found |= {f"{block}.attn{number}.to_q.weight": (c, c)}
        found |= {f"{block}.attn{number}.to_{part}.weight": (c, text) for part in "kv"}
        found |= affine(f"{block}.attn{number}.to_out.0", c, c)
    found |= affine(f"{block}.ff.net.0.proj", wide(8 * factor), c) | affine(f"{block}.ff.net.2", c, wide(4 * factor))
    return {**found, **{key: axes for number in (1, 2, 3) for key, axes in affine(f"{block}.norm{number}", c).items()}}


def keys() -> dict[str, Axes]:
    """Letters: w width, c latent channels, d text, p pooled text with the six numbers of size and crop; {m} and {n} blocks."""
    found = affine("conv_in", "w", "c", 3, 3) | affine("conv_norm_out", "w") | affine("conv_out", "c", "w", 3, 3)
    for name, into in (("time_embedding", "w"), ("add_embedding", "p")):
        found |= affine(f"{name}.linear_1", "4*w", into) | affine(f"{name}.linear_2", "4*w", "4*w")
    depths = {1: "m", 2: "n"}
    into = 1
    for level, width in enumerate((1, 2, 4)):
        for number in (0, 1):
            found |= resnet(f"down_blocks.{level}.resnets.{number}", width, width if number else into)
            found |= transformer(f"down_blocks.{level}.attentions.{number}", width, depths[level]) if level else {}
        found |= affine(f"down_blocks.{level}.downsamplers.0.conv", wide(width), wide(width), 3, 3) if level < 2 else {}
        into = width
    found |= resnet("mid_block.resnets.0", 4, 4) | transformer("mid_block.attentions.0", 4, "n") | resnet("mid_block.resnets.1", 4, 4)
    for block, (width, inputs) in enumerate(((4, (8, 8, 6)), (2, (6, 4, 3)), (1, (3, 2, 2)))):  # with what the way down had kept
        for number, each in enumerate(inputs):
            found |= resnet(f"up_blocks.{block}.resnets.{number}", width, each)
            found |= transformer(f"up_blocks.{block}.attentions.{number}", width, depths[2 - block]) if block < 2 else {}
        found |= affine(f"up_blocks.{block}.upsamplers.0.conv", wide(width), wide(width), 3, 3) if block < 2 else {}
    return found


LAYOUT = Layout(keys(), small={"w": 8, "c": 4, "d": 64, "p": 80, "m": 1, "n": 2})


def misfits(state: Mapping[str, Tensor], model: nn.Module) -> list[str]:
    """What of a file has no place in ``model``, and what of it would be left without."""
    here = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    wrong = [f"{name} is {list(state[name].shape)}, here {list(here[name])}" for name in here.keys() & state.keys()
             if tuple(state[name].shape) != here[name]]  # fmt: skip
    wrong += [f"{name} has no place here" for name in state.keys() - here.keys()]
    return sorted(wrong + [f"{name} is missing" for name in here.keys() - state.keys()])


def filled(model: Any, state: Mapping[str, Tensor]) -> nn.Module:
    """A U-Net like ``model`` with these weights, in its dtypes and on its device; ``model`` is not touched."""
    with torch.device("meta"):
        new = type(model).from_config(model.config)
    own = model.state_dict()
    new.load_state_dict({name: value.to(own[name].device, own[name].dtype, copy=True) for name, value in state.items()}, assign=True)
    return new.requires_grad_(False).train(model.training)  # type: ignore[no-any-return]
