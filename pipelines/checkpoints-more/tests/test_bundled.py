"""The checkpoints of this package: plain small folders that do what their cards say."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from diffgraft import Bundled, load_pipeline
from diffgraft.installed import registry
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.emoji.judge import load_bundled
from diffgraft_checkpoints_more import bundled

CALLS: dict[str, tuple[str, dict[str, Any]]] = {
    "emoji-dit": ("DiTPipeline", {"num_inference_steps": 50, "guidance_scale": 2.0}),
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
    assert {record.name for record in vars(bundled).values() if isinstance(record, Bundled)} == set(CALLS)


def test_emoji_dit_draws_what_its_labels_name() -> None:
    pipe = opened("emoji-dit")
    assert list(pipe.labels) == sorted(scenes.OBJECTS)
    names = ["apple", "star", "heart", "soccer ball", "pumpkin", "watermelon", "ghost", "christmas tree"]
    call = {"class_labels": pipe.get_label_ids(names), "generator": torch.Generator().manual_seed(0)}
    images = pipe(**call, num_inference_steps=16).images
    assert [image.size for image in images] == [(scenes.SIZE, scenes.SIZE)] * len(names)
    assert sum(map(bool, load_bundled().score(images, names)["object"])) >= len(names) - 1
