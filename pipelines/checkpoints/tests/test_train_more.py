"""Going on with emoji-sd: the U-Net stage and the decoder stage, a few steps on tiny made-up pools."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import Judge
from diffgraft_checkpoints.train import common, decoder, export, more, recipe, unet
from diffgraft_checkpoints.train.pool import Pairs, Pool, encode_labels
from diffgraft_checkpoints.train.recipe import BASE
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file
from torch import Tensor, nn

PICTURES = 12


def base() -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(BASE, local_files_only=True)


def pools() -> tuple[Pool, Pairs]:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(256, (PICTURES, 3, 64, 64), generator=generator, dtype=torch.uint8)
    labels = [encode_labels(each) for each in scenes.split()[0][:PICTURES]]
    both = [[encode_labels(each) for each in scenes.draw_pair(np.random.default_rng(i), held_out=False)] for i in range(PICTURES)]
    return Pool(pictures, torch.tensor(labels), torch.full((PICTURES, 2), 32.0)), Pairs(pictures, torch.tensor(both))


def weights(*modules: nn.Module) -> list[Tensor]:
    return [value.clone() for module in modules for value in module.state_dict().values()]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unet, "BATCH", 4)
    monkeypatch.setattr(more, "BATCH", 4)
    monkeypatch.setattr(decoder, "BATCH", 2)
    monkeypatch.setattr(decoder, "DRAWN", 4)
    monkeypatch.setattr(decoder, "ADVERSARIAL_FROM", 1)
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)


def train_more(folder: Path, steps: int) -> StableDiffusionPipeline:
    pipe = base()
    more.train_more(pools(), pipe, folder, steps, 1000, 0, common.make_accelerator("cpu"))
    return pipe


def train_decoder(folder: Path, steps: int) -> StableDiffusionPipeline:
    pipe = base()
    judge = Judge.from_pretrained(BASE / "judge")
    decoder.train_decoder(pools()[0], pipe, judge, folder, steps, 1000, 0, common.make_accelerator("cpu"))
    return pipe


def test_more_steps_move_unet_and_text_encoder_alone_and_resume_bit_equal(tmp_path: Path, small_batches: None) -> None:
    straight = train_more(tmp_path / "straight", 4)
    train_more(tmp_path / "resumed", 2)
    resumed = train_more(tmp_path / "resumed", 4)
    trained = weights(straight.unet, straight.text_encoder)
    assert same(trained, weights(resumed.unet, resumed.text_encoder))
    old = base()
    assert not same(trained, weights(old.unet, old.text_encoder))
    assert same(weights(straight.vae), weights(old.vae))
    exported = train_more(tmp_path / "resumed", 1)
    assert same(trained, weights(exported.unet, exported.text_encoder)), "with fewer steps than are made: what there is"


def test_the_decoder_alone_moves_and_resumes_bit_equal(tmp_path: Path, small_batches: None) -> None:
    straight = train_decoder(tmp_path / "straight", 4)
    train_decoder(tmp_path / "resumed", 2)
    resumed = train_decoder(tmp_path / "resumed", 4)
    assert same(weights(straight.vae), weights(resumed.vae))
    old = base()
    assert not same(weights(straight.vae.decoder), weights(old.vae.decoder))
    assert same(weights(straight.vae.encoder, straight.vae.quant_conv), weights(old.vae.encoder, old.vae.quant_conv))
    assert straight.vae.config.scaling_factor == old.vae.config.scaling_factor
    assert same(weights(straight.unet, straight.text_encoder), weights(old.unet, old.text_encoder))


def test_the_learning_rate_is_held_and_then_falls() -> None:
    factors = [common.trapezoid(step, 1000, 200) for step in range(1000)]
    assert factors[0] == 0.01
    assert set(factors[100:800]) == {1.0}
    assert factors[900] == 0.5
    assert factors[999] == 0.01
    assert factors[:500] == [common.trapezoid(step, 5000, 200) for step in range(500)], "the end may be moved"


def test_timesteps_are_denser_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(more, "BATCH", 10_000)
    drawn = more.draw_middle_timesteps(1000, torch.Generator().manual_seed(0), 1.0)
    count = torch.histc(drawn.float(), 10, 0, 1000) / 1000
    assert drawn.min() >= 0
    assert drawn.max() < 1000
    assert 1.5 < count[4:6].mean() < 1.7
    assert 0.7 < count[[0, 9]].mean() < 0.75


def test_upright_scenes_differ_in_rotation_and_mirroring_alone() -> None:
    for i, labels in enumerate(scenes.split()[0][:50]):
        free = scenes.sample_scene(labels, np.random.default_rng([i, 3]))
        upright = scenes.upright(free)
        assert abs(upright.rotation) <= scenes.UPRIGHT_ROTATION
        assert not upright.mirrored
        assert (upright.labels, upright.x, upright.y, upright.side, upright.color) == (free.labels, free.x, free.y, free.side, free.color)


def test_an_export_says_what_the_base_said_and_not_where_it_lay(tmp_path: Path) -> None:
    pipe = base()
    export.export(tmp_path / "emoji-sd", pipe, Judge.from_pretrained(BASE / "judge"))
    for part in ("vae", "unet"):
        assert json.loads((tmp_path / "emoji-sd" / part / "config.json").read_text()) == json.loads(
            (BASE / part / "config.json").read_text()
        )
    assert json.loads((tmp_path / "emoji-sd" / "model_index.json").read_text()) == json.loads((BASE / "model_index.json").read_text())
    for path in BASE.glob("*/*.safetensors"):
        old, new = load_file(path), load_file(tmp_path / "emoji-sd" / path.relative_to(BASE))
        assert old.keys() == new.keys()
        assert same(list(old.values()), [new[name] for name in old])


def test_the_recipe_of_a_continuation_keeps_what_was_done_before() -> None:
    before = {"command": "a", "stages": {"unet": {"steps": 1}}, "scenes": 10, "pairs": 4, "scaling_factor": 0.9}
    after = recipe.continued(before, {"command": "b", "stages": {"decoder": {"steps": 2}}, "scenes": 5, "pairs": 2})
    assert after["command"] == "a; b --base BASE"
    assert list(after["stages"]) == ["unet", "decoder"]
    assert (after["scenes"], after["pairs"], after["scaling_factor"]) == (10, 4, 0.9)
