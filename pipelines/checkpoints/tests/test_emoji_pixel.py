"""emoji-pixel: its training from end to end on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import load_pipeline
from diffgraft_checkpoints.train import common, pixel, unet
from diffusers import DDIMPipeline, DDPMPipeline


def test_one_command_trains_resumes_exports_and_measures(
    tmp_path: Path, artwork: None, resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (pixel, unet):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)
    monkeypatch.setattr(pixel, "SAMPLERS", {"DDPM": (DDPMPipeline, 2), "DDIM": (DDIMPipeline, 2)})

    def train() -> DDPMPipeline:
        pixel.emoji_pixel(tmp_path, 4, 24, 0, "cpu", pictures=4)
        return DDPMPipeline.from_pretrained(tmp_path / pixel.NAME, local_files_only=True)

    resumed(pixel, "pixel", train, ["unet"])
    folder = tmp_path / pixel.NAME
    assert load_pipeline(str(folder), plugins=[]).plugins.family.name == "pixel"
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(result["samplers"]) == {"DDPM", "DDIM"}
    assert set(result["samplers"]["DDPM"]) == {"steps", "seconds_per_picture", *result["true_renders"]}
    assert "{" not in (folder / "README.md").read_text()
    assert {path.name for path in (tmp_path / f"grids-{pixel.NAME}").iterdir()} == {"ddpm.png", "ddim.png", "nearest.png"}


def test_the_nearest_training_picture_is_found() -> None:
    training = torch.randint(256, (50, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    near = training[[7, 30]].clone()
    near[1, 0, 0, 0] ^= 3
    distance, which = pixel.nearest([pixel.to_image(each) for each in near], training)
    assert which.tolist() == [7, 30]
    assert distance[0] < 0.01
    off = (near[1].float() - training[30].float()).square().mean().sqrt()
    torch.testing.assert_close(distance[1], off, rtol=1e-2, atol=1e-2)


def test_the_noisiest_timesteps_weigh_ten_times_the_cleanest() -> None:
    weights = pixel.noise_weight(pixel.build_scheduler().alphas_cumprod)
    assert weights[0] == 1
    assert weights[-1] == 10
    assert bool((weights.diff() >= 0).all())
