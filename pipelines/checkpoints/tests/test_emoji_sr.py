"""emoji-sr: what surrounds its U-Net, and the training from end to end on a tiny scale."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft_checkpoints.emoji import plain_sr, scenes
from diffgraft_checkpoints.train import common, sr, unet
from diffusers import StableDiffusionPipeline, StableDiffusionUpscalePipeline
from PIL import Image


def small() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(sr.emoji_sd_small.path, local_files_only=True)


def test_the_rescaled_autoencoder_has_the_latents_of_the_other() -> None:
    vae = small().vae
    new = sr.rescaled(vae)
    x, z = torch.randn(2, 3, 64, 64), torch.randn(2, 4, 16, 16)
    with torch.no_grad():
        old_posterior, posterior = (each.encode(x).latent_dist for each in (vae, new))
        for name in ("mean", "std"):
            expected = getattr(old_posterior, name) * vae.config.scaling_factor
            torch.testing.assert_close(getattr(posterior, name) * new.config.scaling_factor, expected, rtol=1e-4, atol=1e-5)
        decoded = [each.decode(z / each.config.scaling_factor).sample for each in (vae, new)]
    torch.testing.assert_close(decoded[1], decoded[0], rtol=1e-4, atol=1e-4)
    assert new.config.scaling_factor == sr.PIPELINE_SCALING


def test_a_widened_unet_begins_as_the_narrow_one() -> None:
    narrow = small().unet
    wide = sr.widen(narrow).eval()
    x, low, text = torch.randn(2, 4, 16, 16), torch.randn(2, 3, 16, 16), torch.randn(2, unet.POSITIONS, unet.TEXT_WIDTH)
    with torch.no_grad():
        out = wide(torch.cat([x, low], 1), 500, text, class_labels=torch.tensor([0, sr.MOST_NOISE])).sample
        torch.testing.assert_close(out, narrow(x, 500, text).sample)


def test_the_plain_network_begins_as_bicubic_and_small_pictures_are_those_that_people_give() -> None:
    net = plain_sr.PlainSR()
    assert 0.25e6 < sum(p.numel() for p in net.parameters()) < 0.35e6
    low = torch.rand(2, 3, 16, 16) * 2 - 1
    torch.testing.assert_close(net(low), plain_sr.bicubic(low))
    picture = torch.randint(256, (1, 3, 64, 64), dtype=torch.uint8)
    reduced = Image.fromarray(picture[0].permute(1, 2, 0).numpy()).reduce(4)
    apart = sr.to_bytes(sr.shrink(picture)).int() - sr.from_images([reduced]).int()
    assert apart.abs().max() <= 1


def test_one_command_trains_resumes_exports_and_measures(
    tmp_path: Path, artwork: None, resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (sr, unet):
        monkeypatch.setattr(module, "BATCH", 4)
    for name, value in {"PLAIN_BATCH": 2, "GUIDANCES": (1.0, 1.5), "SWEEP_PICTURES": 2, "HELD_OUT_SCENES": 8}.items():
        monkeypatch.setattr(sr, name, value)
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)
    generate = sr.generate
    monkeypatch.setattr(sr, "generate", lambda pipe, low, prompts, guidance: generate(pipe, low, prompts, guidance, 1))

    def train() -> StableDiffusionUpscalePipeline:
        sr.emoji_sr(tmp_path, 4, 3, Path(sr.emoji_sd_small.path), 24, 0, "cpu", pictures=4)
        return StableDiffusionUpscalePipeline.from_pretrained(tmp_path / sr.NAME, local_files_only=True)

    straight = resumed(sr, "sr", train, ["unet"])
    assert straight.unet.conv_in.weight[:, 4:].any()
    assert straight.unet.class_embedding.weight.any()
    assert straight.vae.config.scaling_factor == sr.PIPELINE_SCALING
    folder = tmp_path / sr.NAME
    assert plain_sr.load(folder)(torch.zeros(1, 3, 16, 16)).shape == (1, 3, scenes.SIZE, scenes.SIZE)
    result = json.loads((folder / "evaluation.json").read_text())
    assert set(result["ways"]) >= {"emoji-sr", "plain network", "bicubic", "true picture"}
    assert result["ways"]["true picture"]["psnr_small_db"] > 60
    assert "{" not in (folder / "README.md").read_text()
    assert {path.name for path in (tmp_path / f"grids-{sr.NAME}").iterdir()} == {"held-out.png"}
