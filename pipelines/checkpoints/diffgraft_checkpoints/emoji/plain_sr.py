"""A plain network that enlarges pictures four times, in one forward pass. It comes with emoji-sr, to be compared or begun from."""

from __future__ import annotations

from pathlib import Path

import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

SCALE = 4


class PlainSR(ModelMixin, ConfigMixin):
    """(N, 3, H, W) in -1..1 -> (N, 3, 4 H, 4 W): bicubic, plus what residual layers at the small size add, as EDSR's (Lim et al. 2017)."""

    @register_to_config
    def __init__(self, width: int = 56, num_blocks: int = 5) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, width, 3, padding=1)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.SiLU(), nn.Conv2d(width, width, 3, padding=1))
            for _ in range(num_blocks)
        )
        self.tail = nn.Conv2d(width, 3 * SCALE**2, 3, padding=1)
        nn.init.zeros_(self.tail.weight)
        nn.init.zeros_(self.tail.bias)

    def forward(self, low: Tensor) -> Tensor:
        x = self.head(low)
        for block in self.blocks:
            x = x + block(x)
        return bicubic(low) + F.pixel_shuffle(self.tail(x), SCALE)


def bicubic(low: Tensor) -> Tensor:
    """The picture four times as large, without a network."""
    return F.interpolate(low, scale_factor=SCALE, mode="bicubic", align_corners=False)


def load(folder: str | Path) -> PlainSR:
    """The network beside a checkpoint's weights (`emoji-sr/plain_sr`)."""
    return PlainSR.from_pretrained(Path(folder) / "plain_sr", local_files_only=True).eval()  # type: ignore[no-any-return]
