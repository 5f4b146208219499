"""The checkpoints of this package: plain small folders that do what their cards say."""

from __future__ import annotations

import inspect
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft import Bundled, Unsupported, load_pipeline
from diffgraft.installed import registry
from diffgraft.kernel.defaults import own_defaults
from diffgraft_checkpoints.emoji import edit_judge, edits, motion, motion_judge, plain_sr, scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints.train import edit, pixel, text
from diffgraft_checkpoints_more import bundled
from diffusers import DDIMScheduler

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "emoji-dit": ("DiTPipeline", {"num_inference_steps": 50, "guidance_scale": 2.0}),
    "emoji-edit": (
        "StableDiffusionInstructPix2PixPipeline",
        {"num_inference_steps": 50, "guidance_scale": 2.0, "image_guidance_scale": 1.5},
    ),
    "emoji-pixel": ("DDPMPipeline", {"num_inference_steps": 100}),
    "emoji-sr": ("StableDiffusionUpscalePipeline", {"num_inference_steps": 50, "guidance_scale": 1.0, "noise_level": 10}),
}
"""Pipeline class, and what a call takes where nobody says otherwise."""


def opened(name: str) -> Any:
    pipe = load_pipeline(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("name", CALLS)
def test_it_is_a_plain_small_folder_with_its_notices(name: str) -> None:
    record = registry.find_bundled(name)
    files = [path for path in Path(record.path).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 18e6
    assert {path.suffix for path in files} <= {".safetensors", ".json", ".txt", ".md", ".png"}
    assert {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt", "NOTICE-noto-emoji.txt"} <= {
        path.name for path in files
    }
    cls, call = CALLS[name]
    assert json.loads((Path(record.path) / "model_index.json").read_text())["_class_name"] == cls
    pipe = opened(name)
    assert type(pipe).__name__ == cls
    shown = inspect.signature(pipe.__call__).parameters
    assert {key: shown[key].default for key in call} == call


def test_all_of_them_are_offered() -> None:
    with_lora = {"emoji-flux-4step", "emoji-wan-4step"}
    assert {record.name for record in vars(bundled).values() if isinstance(record, Bundled)} == {*CALLS, *with_lora}


def test_emoji_sr_enlarges_what_it_is_given() -> None:
    pipe = opened("emoji-sr")
    prompts = [f"a {size} star {phrase} on a red background" for size in scenes.SIZES for phrase in list(scenes.PLACE_PHRASES.values())[:3]]
    drawn = opened("emoji-sd")(prompts, num_inference_steps=10, generator=torch.Generator().manual_seed(0)).images
    small = [image.reduce(4) for image in drawn]
    images = pipe(prompts, image=small, generator=torch.Generator().manual_seed(0)).images
    apart = [np.asarray(image.reduce(4), float) - np.asarray(given, float) for image, given in zip(images, small, strict=True)]
    assert 20 * np.log10(255 / np.sqrt(np.mean(np.square(apart)))) > 28, "made small again, it is what was given"
    scores = load_bundled().score(images, prompts)
    assert sum(all(row) for row in zip(*scores.values(), strict=True)) >= len(prompts) - 1
    alone = pipe("a small carrot on the right on a purple background", num_inference_steps=2, output_type="np").images
    assert alone.shape == (1, 64, 64, 3), "a call without a picture enlarges the start picture"
    network = plain_sr.load(Path(registry.find_bundled("emoji-sr").path))
    assert network(torch.zeros(1, 3, 16, 16)).shape == (1, 3, 64, 64)


def test_emoji_flux_4step_is_a_small_folder_and_draws_in_four_steps_what_is_asked() -> None:
    folder = Path(str(bundled.emoji_flux_4step.lora))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 8e6
    experts = {"pytorch_lora_weights.safetensors", "phase_1.safetensors", "phase_2.safetensors"}
    notices = {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt", "NOTICE-noto-emoji.txt"}
    assert experts | notices <= {path.name for path in files}
    pipe = opened("emoji-flux-4step")
    seen: list[float] = []
    prompts = [f"a big apple {phrase} on a blue background" for phrase in scenes.PLACE_PHRASES.values()]

    def count(pipe: Any, step: int, t: Any, values: Any) -> Any:
        seen.append(float(t))
        return values

    images = pipe(prompts, generator=torch.Generator().manual_seed(0), callback_on_step_end=count).images
    assert seen == pytest.approx([1000, 900, 750, 500], abs=0.1)
    scores = load_bundled().score(images, prompts)
    for name in ("background", "size", "place"):
        assert scores[name] == [True] * len(prompts), name
    assert sum(map(bool, scores["object"])) >= len(prompts) - 1


def test_emoji_flux_4step_without_its_lora_is_emoji_flux() -> None:
    call = {"prompt": "a star", "num_inference_steps": 2, "output_type": "latent", "true_cfg_scale": 2.0}
    plain, distilled = opened("emoji-flux"), opened("emoji-flux-4step")
    distilled.disable_lora()
    ours, theirs = (pipe(**call, generator=torch.Generator().manual_seed(0)).images for pipe in (distilled, plain))
    assert torch.equal(ours, theirs)


def test_emoji_wan_4step_is_a_small_folder_and_draws_in_four_steps_what_is_asked() -> None:
    folder = Path(str(bundled.emoji_wan_4step.lora))
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 4e6
    notices = {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt", "NOTICE-noto-emoji.txt"}
    assert {"pytorch_lora_weights.safetensors", *notices} <= {path.name for path in files}
    pipe = opened("emoji-wan-4step")
    seen: list[float] = []

    def count(pipe: Any, step: int, t: Any, values: Any) -> Any:
        seen.append(float(t))
        return values

    prompts = [f"a big star {phrase} on a blue background" for phrase in motion.MOTION_PHRASES.values()]
    clips = pipe(prompts, generator=torch.Generator().manual_seed(0), callback_on_step_end=count).frames
    assert seen == pytest.approx([1000, 857.7, 602.2, 8.9], abs=0.1), "the levels of the model card"
    scores = motion_judge.load_bundled().score(list(clips), prompts)
    for name in ("background", "size", "motion"):
        assert scores[name] == [True] * len(prompts), name


def test_emoji_wan_4step_with_accvideo_runs_on_the_levels_that_it_learned() -> None:
    pytest.importorskip("diffgraft_accvideo")
    pipe = load_pipeline("emoji-wan-4step", plugins={"accvideo": {"steps": 4}})
    pipe.set_progress_bar_config(disable=True)
    seen: list[float] = []

    def count(pipe: Any, step: int, t: Any, values: Any) -> Any:
        seen.append(float(t))
        return values

    pipe("a star", callback_on_step_end=count, output_type="latent")
    assert seen == pytest.approx([1000 * 3 * s / (1 + 2 * s) for s in (1, 0.76, 0.5, 0.26)], abs=0.1)
    assert sum(pipe.plugins.report().forwards.values()) == 4


def test_emoji_wan_4step_without_its_lora_is_emoji_wan() -> None:
    call = {"prompt": "a star", "num_inference_steps": 2, "output_type": "latent", "guidance_scale": 2.0}
    plain, distilled = opened("emoji-wan"), opened("emoji-wan-4step")
    distilled.disable_lora()
    ours, theirs = (pipe(**call, generator=torch.Generator().manual_seed(0)).frames for pipe in (distilled, plain))
    assert torch.equal(ours, theirs)


def test_emoji_dit_draws_what_its_labels_name() -> None:
    pipe = opened("emoji-dit")
    assert list(pipe.labels) == sorted(scenes.OBJECTS)
    names = ["apple", "star", "heart", "soccer ball", "pumpkin", "watermelon", "ghost", "christmas tree"]
    call = {"class_labels": pipe.get_label_ids(names), "generator": torch.Generator().manual_seed(0)}
    images = pipe(**call, num_inference_steps=16).images
    assert [image.size for image in images] == [(scenes.SIZE, scenes.SIZE)] * len(names)
    assert sum(map(bool, load_bundled().score(images, names)["object"])) >= len(names) - 1


def test_emoji_edit_edits_its_start_picture_and_others_as_told() -> None:
    pipe = opened("emoji-edit")
    start = edit.start_scene()
    said = bundled.emoji_edit.prompts
    asked = [edits.asked(each) for each in said]
    assert len({*said}) == len(said)
    assert all(getattr(start.labels, kind) != value for kind, value in asked), "each changes something"
    assert own_defaults(pipe)["image"].tobytes() == edit.start_picture().tobytes()
    some = [i for i, (kind, _) in enumerate(asked) if kind != "object"]
    call = {"num_inference_steps": 16, "generator": torch.Generator().manual_seed(0)}
    images = pipe([said[i] for i in some], **call).images
    after = [edits.apply(start, replace(start.labels, **{asked[i][0]: asked[i][1]})) for i in some]
    unedited = edit.psnr([edit.start_picture()] * len(some), [scenes.render(each) for each in after])
    assert sum(edit.psnr(images, [scenes.render(each) for each in after])) > sum(unedited) + 2 * len(some)
    scores = edit_judge.load_bundled().score(images, [said[i] for i in some])
    assert sum(bool(verdict) for row in scores.values() for verdict in row) >= len(some) - 1
    other = scenes.render(scenes.upright(replace(start, labels=replace(start.labels, object="star"))))
    [moved] = pipe("make the background blue", image=other, num_inference_steps=16, generator=torch.Generator().manual_seed(0)).images
    assert load_bundled().score([moved], ["a star on a blue background"])["background"] == [True]


def test_emoji_pixel_draws_its_objects() -> None:
    pipe = opened("emoji-pixel")
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    images = pipe(batch_size=16, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
    assert [image.size for image in images] == [(pixel.SIDE, pixel.SIDE)] * 16
    seen = pixel.recognised(load_bundled(), images)
    assert seen["share"] >= 0.6
    assert seen["objects"] >= 5


def test_emoji_text_writes_captions_of_its_grammar() -> None:
    folder = bundled.HERE / "emoji-text"
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 3e6
    assert {"README.md", "evaluation.json", "LICENSE-APACHE-2.0.txt"} <= {path.name for path in files}
    pipe = text.load(folder)
    drawn = text.generate(pipe, 64, **text.SAMPLERS["23 steps"])
    assert text.figures(drawn)["valid"] >= 0.8
    with pytest.raises(Unsupported):  # when a family takes it: the card says that none does
        load_pipeline(pipe)
