"""Where a U-Net joins what comes from below with what comes across."""

from __future__ import annotations

import copy

import pytest
from diffgraft import Unsupported
from diffgraft.methods.quant.shortcuts import from_below, skip_channels
from probes import tiny


def test_what_is_left_behind_last_is_taken_first() -> None:
    down = [([32, 32], 32), ([64, 64], None)]
    assert skip_channels(16, down, [3, 3]) == [[64, 64, 32], [32, 32, 16]]
    with pytest.raises(ValueError, match="leave 6 tensors, the up blocks take 5"):
        skip_channels(16, down, [3, 2])


def test_what_comes_from_below_must_be_something() -> None:
    unet = copy.deepcopy(tiny("StableDiffusionPipeline")[0].unet)
    below = from_below(unet, "me")
    assert all(0 < channels < unet.get_submodule(path).in_channels for path, channels in below.items())
    unet.up_blocks[0].resnets[0].in_channels = 1
    with pytest.raises(Unsupported, match=r"me: .*nothing comes from below in up_blocks\.0\.resnets\.0"):
        from_below(unet, "me")
