"""The network psi: diffusers' U-Net with cross-attention, without a time. What its files hold, and a module from that.

A file has the keys of a ``UNet2DConditionModel`` of three levels, but for those of the time embedding. With that embedding at zero the
stock class computes the same at every t.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from diffgraft.methods.layouts import Layout
from diffgraft.methods.published import spec_of
from diffgraft.methods.schema import Holds
from diffgraft.methods.unet_keys import unet_keys
from diffusers import UNet2DConditionModel
from torch import Tensor

TIME = re.compile(r"time_embedding\.|.*\.time_emb_proj\.")
"""Keys of the stock class that no file has."""
PUBLISHED = 160
"""Widths of the published networks are multiples of this one; they have 5, 10 and 20 heads and norms of 32 groups, others 1, 2 and 4."""
GROUPS = 4
"""Of the norms of all others."""


KEYS = unet_keys()
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
