"""emoji-flux: the parts of its training that can be wrong without a word, and the bundled checkpoint."""

from __future__ import annotations

import json
from pathlib import Path

import diffgraft_checkpoints
import pytest
import torch
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train import flux, unet
from diffusers import FluxPipeline
from transformers import T5Tokenizer

FOLDER = Path(diffgraft_checkpoints.__file__).parent / "bundled" / "emoji-flux"
bundled = pytest.mark.skipif(not FOLDER.exists(), reason="emoji-flux is not in this checkout")


def test_tokenizer_knows_every_word_and_survives_saving(tmp_path: Path) -> None:
    tokenizer = flux.build_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    loaded = T5Tokenizer.from_pretrained(tmp_path, local_files_only=True)
    labels = [scenes.Labels(name, "yellow", "small", place) for name in scenes.OBJECTS for place in ("left", "bottom")]
    prompts = [scenes.fill(template, each) for each in labels for template, _ in scenes.TEMPLATES]
    prompts += [scenes.pair_caption((each, scenes.Labels("ice cream", place=scenes.OPPOSITE[str(each.place)]))) for each in labels]
    ids = tokenizer(prompts).input_ids
    assert loaded(prompts).input_ids == ids
    assert max(len(each) for each in ids) <= flux.TOKENS
    known = {tokenizer.convert_tokens_to_ids(",")} | set(range(len(tokenizer))[3:])
    letters = {tokenizer.convert_tokens_to_ids(letter) for letter in "abcdefghijklmnopqrstuvwxyz"}
    assert all(set(each[:-1]) <= known - letters for each in ids)


def test_training_attention_is_that_of_diffusers() -> None:
    torch.manual_seed(0)
    transformer = flux.build_transformer().eval()
    for parameter in transformer.parameters():  # nothing at zero, so that every part counts
        torch.nn.init.normal_(parameter, std=0.1)
    inputs = {
        "hidden_states": torch.randn(2, 64, 16),
        "encoder_hidden_states": torch.randn(2, flux.TOKENS, unet.TEXT_WIDTH),
        "pooled_projections": torch.randn(2, unet.TEXT_WIDTH),
        "timestep": torch.tensor([0.9, 0.1]),
        "img_ids": flux.places(16),
        "txt_ids": torch.zeros(flux.TOKENS, 3),
        "return_dict": False,
    }
    with torch.no_grad():
        expected = transformer(**inputs)[0]
        transformer.set_attn_processor(flux.TrainingAttention())
        torch.testing.assert_close(transformer(**inputs)[0], expected, rtol=1e-4, atol=1e-4)


def test_weight_treats_clean_latents_as_emoji_sd_does() -> None:
    sigma = torch.tensor([0.2, 0.5, 0.9])
    snr = ((1 - sigma) / sigma).square()
    for progress, expected in ((0.1, snr.clamp(1, 5)), (0.9, (10 * snr).clamp(1, 20))):
        torch.testing.assert_close(flux.flow_weight(sigma, progress), sigma.square() * expected)


@pytest.mark.parametrize(("side", "shift"), [(16, 3.0), (8, 1.5)])
def test_training_noise_is_spread_as_the_sampler_spreads_it(side: int, shift: float) -> None:
    u = torch.arange(1, 65) / 64
    drawn = flux.draw_sigmas(side, torch.Generator().manual_seed(0), 0.0).sort().values
    upper = shift * u / (1 + (shift - 1) * u)
    assert bool((drawn <= upper + 1e-4).all())
    assert bool((drawn[1:] >= upper[:-1] - 1e-4).all())


@bundled
def test_bundled_folder_is_a_plain_small_pipeline_that_follows_its_prompt() -> None:
    from diffgraft_checkpoints.emoji.judge import load_bundled

    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    assert {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt"} <= {path.name for path in files}
    assert json.loads((FOLDER / "model_index.json").read_text())["_class_name"] == "FluxPipeline"
    pipe = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a big {name} {phrase} on a blue background" for name in ("heart", "star") for phrase in scenes.PLACE_PHRASES.values()]
    images = flux.Guided(pipe)(prompts, 16, 1.5, [torch.Generator().manual_seed(i) for i in range(len(prompts))]).images
    assert [image.size for image in images] == [(scenes.SIZE, scenes.SIZE)] * len(prompts)
    scores = load_bundled().score(images, prompts)
    right = {name: sum(map(bool, row)) for name, row in scores.items()}
    assert all(count >= len(prompts) - 1 for count in right.values()), right


@bundled
def test_bundled_pipeline_survives_saving(tmp_path: Path) -> None:
    pipe = FluxPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.save_pretrained(tmp_path)
    loaded = FluxPipeline.from_pretrained(tmp_path, local_files_only=True)
    latents = []
    for each in (pipe, loaded):
        each.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "generator": torch.Generator().manual_seed(0), "output_type": "latent"}
        latents.append(each("a star", negative_prompt="", true_cfg_scale=2.0, **call, **flux.CALL).images)
    torch.testing.assert_close(latents[1], latents[0], rtol=1e-5, atol=1e-5)
