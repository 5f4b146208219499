"""The network psi: diffusers' U-Net with cross-attention, without a time. What its files hold, and a module from that.

A file has the keys of a ``UNet2DConditionModel`` of three levels, but for those of the time embedding. With that embedding at zero the
stock class computes the same at every t.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffgraft.methods.axes import Axes
from diffgraft.methods.layouts import Layout
from diffgraft.methods.published import spec_of
from diffgraft.methods.schema import Holds
from diffusers import UNet2DConditionModel
from torch import Tensor

TIME = re.compile(r"time_embedding\.|.*\.time_emb_proj\.")
"""Keys of the stock class that no file has."""
PUBLISHED = 160
"""Widths of the published networks are multiples of this one; they have 5, 10 and 20 heads and norms of 32 groups, others 1, 2 and 4."""
GROUPS = 4
"""Of the norms of all others."""


def axis(factor: int, letter: str = "w") -> str:
    """So many times the width."""
    return letter if factor == 1 else f"{factor}*{letter}"


def affine(name: str, out: str, *into: int | str) -> dict[str, Axes]:
    """A weight and a bias; without ``into`` those of a norm."""
    return {f"{name}.weight": (out, *into), f"{name}.bias": (out,)}


def resnet(name: str, out: int, into: int) -> dict[str, Axes]:
    """A residual block from ``into`` times the width to ``out`` times."""
    keys = affine(f"{name}.norm1", axis(into)) | affine(f"{name}.conv1", axis(out), axis(into), 3, 3)
    keys |= affine(f"{name}.norm2", axis(out)) | affine(f"{name}.conv2", axis(out), axis(out), 3, 3)
    return keys if out == into else keys | affine(f"{name}.conv_shortcut", axis(out), axis(into), 1, 1)


def attention(name: str, factor: int, depth: str) -> dict[str, Axes]:
    """A transformer of as many blocks as the letter ``depth`` counts."""
    c, block = axis(factor), f"{name}.transformer_blocks.{{{depth}}}"
    keys = affine(f"{name}.norm", c) | affine(f"{name}.proj_in", c, c) | affine(f"{name}.proj_out", c, c)
    for number, width in ((1, c), (2, "d")):
        keys |= {f"{block}.attn{number}.to_q.weight": (c, c)}
        keys |= {f"{block}.attn{number}.to_{part}.weight": (c, width) for part in "kv"}
        keys |= affine(f"{block}.attn{number}.to_out.0", c, c)
    keys |= affine(f"{block}.ff.net.0.proj", axis(8 * factor), c) | affine(f"{block}.ff.net.2", c, axis(4 * factor))
    return {**keys, **{key: value for number in (1, 2, 3) for key, value in affine(f"{block}.norm{number}", c).items()}}


def keys_of_network() -> dict[str, Axes]:
    """All keys and their axes: w the width, c the latent channels, d the width of the text."""
    keys = affine("conv_in", "w", "c", 3, 3) | affine("conv_norm_out", "w") | affine("conv_out", "c", "w", 3, 3)
    depths = {1: "m", 2: "n"}
    into = 1
    for level, width in enumerate((1, 2, 4)):
        for number in (0, 1):
            keys |= resnet(f"down_blocks.{level}.resnets.{number}", width, width if number else into)
            keys |= attention(f"down_blocks.{level}.attentions.{number}", width, depths[level]) if level else {}
        if level < 2:
            keys |= affine(f"down_blocks.{level}.downsamplers.0.conv", axis(width), axis(width), 3, 3)
        into = width
    keys |= resnet("mid_block.resnets.0", 4, 4) | attention("mid_block.attentions.0", 4, "n") | resnet("mid_block.resnets.1", 4, 4)
    for block, (width, inputs) in enumerate(((4, (8, 8, 6)), (2, (6, 4, 3)), (1, (3, 2, 2)))):  # with what the way down had kept
        for number, each in enumerate(inputs):
            keys |= resnet(f"up_blocks.{block}.resnets.{number}", width, each)
            keys |= attention(f"up_blocks.{block}.attentions.{number}", width, depths[2 - block]) if block < 2 else {}
        if block < 2:
            keys |= affine(f"up_blocks.{block}.upsamplers.0.conv", axis(width), axis(width), 3, 3)
    return keys


KEYS = keys_of_network()
LAYOUT = Layout(
    KEYS,
    reshapes={key: (*axes, 1, 1) for key, axes in KEYS.items() if key.endswith(("proj_in.weight", "proj_out.weight"))},  # as convolutions
    small={"w": 4, "c": 4, "d": 32, "m": 1, "n": 1},
)
"""What is published at ``h1t/oms_*``, and what ``diffgraft fit one_more_step`` writes."""


class AsPublished(Holds):
    """The same of an artefact."""

    def fault(self, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
        faults = LAYOUT.compare({key: spec_of(value) for key, value in tensors.items()}).faults
        wrong = (f"{key} ({group}): {words}" for group, keys in faults.items() for key, words in keys.items())
        infinite = (f"{key} holds numbers that are not finite" for key, value in tensors.items() if not bool(value.isfinite().all()))
        return next(wrong, None) or next(infinite, None)


def sizes_of(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """The letters' numbers, of tensors that are as the layout says."""

    def depth(level: int) -> int:
        """How many transformer blocks it has after each residual one."""
        return sum(f"down_blocks.{level}.attentions.0.transformer_blocks.{i}.norm1.bias" in tensors for i in range(len(tensors)))

    d = tensors["mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"].shape[1]
    return {"w": len(tensors["conv_in.bias"]), "c": len(tensors["conv_out.bias"]), "d": d, "m": depth(1), "n": depth(2)}


def network(w: int, c: int, d: int, m: int = 1, n: int = 1) -> UNet2DConditionModel:
    """An untrained network. Its time embedding is zero, and stays so in training."""
    published = w % PUBLISHED == 0
    made = UNet2DConditionModel(
        in_channels=c,
        out_channels=c,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        block_out_channels=(w, 2 * w, 4 * w),
        transformer_layers_per_block=(1, m, n),
        attention_head_dim=(5, 10, 20) if published else (1, 2, 4),  # diffusers' name for the numbers of heads
        norm_num_groups=32 if published else GROUPS,
        cross_attention_dim=d,
        use_linear_projection=True,
    )
    for key, value in made.named_parameters():
        if TIME.match(key):
            value.requires_grad_(False).zero_()
    return made


def network_of(tensors: Mapping[str, Tensor], device: torch.device, dtype: torch.dtype) -> UNet2DConditionModel:
    """The network of a file's tensors. They are not copied where they are on the device, in that dtype, already."""
    with torch.device("meta"):
        made = network(**sizes_of(tensors))
    state = {key: torch.zeros(value.shape) if TIME.match(key) else tensors[key] for key, value in made.state_dict().items()}
    made.load_state_dict({key: value.to(device, dtype, non_blocking=True) for key, value in state.items()}, assign=True)
    return made.requires_grad_(False).eval()


def predict(psi: UNet2DConditionModel, noise: Tensor, text: Tensor) -> Tensor:
    """psi(n, c): v [batch, c, height, width], float32, of unit noise.

    Args:
        text: [prompts, tokens, d], each prompt for equally many neighbouring samples.
    """
    text = text.repeat_interleave(len(noise) // len(text), 0)
    none = torch.zeros(1, device=noise.device)
    return psi(noise.to(psi.dtype), none, text.to(psi.dtype), return_dict=False)[0].float()  # type: ignore[no-any-return]
