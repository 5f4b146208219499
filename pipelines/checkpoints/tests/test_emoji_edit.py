"""emoji-edit: the edits and their one true result, and the training from end to end on a tiny scale."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffgraft_checkpoints.emoji import edit_judge, edits, scenes
from diffgraft_checkpoints.train import common, edit, unet
from diffgraft_checkpoints.train.pool import draw_scene
from diffgraft_checkpoints.train.recipe import BASE
from diffusers import StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTokenizer

SOURCE = scenes.Scene(scenes.Labels("apple", "red", "small", "left"), 16.0, 34.0, 28.0, 5.0, False, (200, 60, 70))


@pytest.mark.parametrize(
    ("changed", "said", "differs"),
    [
        ({"background": "blue"}, "make the background blue", {"color": (86, 140, 214)}),
        ({"place": "top"}, "move it to the top", {"x": 32.0, "y": 16.0}),
        ({"place": "center"}, "move it to the center", {"x": 32.0, "y": 32.0}),
        ({"size": "big"}, "make it bigger", {"x": 21.0, "y": 33.375, "side": 28 * (43 / 28.5)}),
        ({"object": "ice cream"}, "turn the apple into an ice cream", {}),
    ],
)
def test_an_edit_is_said_in_a_sentence_and_has_one_result(changed: dict[str, str], said: str, differs: dict[str, Any]) -> None:
    target = replace(SOURCE.labels, **changed)
    assert edits.instruction(SOURCE.labels, target) == said
    result = edits.apply(SOURCE, target)
    assert result == replace(SOURCE, labels=target, **differs)


def test_an_edit_changes_one_field() -> None:
    with pytest.raises(ValueError, match="differ in nothing"):
        edits.kind_of(SOURCE.labels, SOURCE.labels)
    with pytest.raises(ValueError, match="background and place"):
        edits.kind_of(SOURCE.labels, scenes.Labels("apple", "blue", "small", "top"))


def test_no_training_edit_is_like_a_held_out_one() -> None:
    shown = set()
    for i in range(300):
        before, after = draw_scene(0, i, upright=True), edit.draw_target(0, i, False, True)
        assert after.labels in scenes.split()[0]
        shown.add((before.labels, after.labels))
    assert {edits.kind_of(*pair) for pair in shown} == set(edits.KINDS)
    tasks = edit.held_out_tasks(4, 0)
    assert [task.kind for task in tasks] == [kind for kind in edits.KINDS for _ in range(4)]
    assert all(edits.is_held_out(task.before.labels, task.after.labels) for task in tasks)
    assert not {(task.before.labels, task.after.labels) for task in tasks} & shown
    assert not any(edits.is_held_out(*pair) for pair in shown)
    with pytest.raises(ValueError, match="no training edit of size"):
        edits.draw_edit(next(task.before for task in tasks if task.kind == "size"), np.random.default_rng(0), kinds=("size",))


def test_every_instruction_fits_the_text_encoder() -> None:
    tokenizer = CLIPTokenizer.from_pretrained(BASE / "tokenizer", local_files_only=True)
    labels = [scenes.Labels(name, "red", "big", "left") for name in scenes.OBJECTS]
    said = [edits.instruction(one, other) for one in labels for other in labels if one != other]
    others = [target for kind in edits.KINDS[:3] for held_out in (False, True) for target in edits.choices(labels[0], kind, held_out)]
    said += [edits.instruction(labels[0], target) for target in others]
    assert len(said) == 64 * 63 + 7 + 4 + 1
    assert max(len(each) for each in tokenizer(said).input_ids) <= unet.POSITIONS


def test_a_widened_unet_begins_as_the_narrow_one() -> None:
    narrow = UNet2DConditionModel.from_pretrained(BASE / "unet", local_files_only=True)
    wide = edit.widen(narrow).eval()
    x, picture, text = torch.randn(2, 4, 16, 16), torch.randn(2, 4, 16, 16), torch.randn(2, unet.POSITIONS, unet.TEXT_WIDTH)
    with torch.no_grad():
        torch.testing.assert_close(wide(torch.cat([x, picture], 1), 500, text).sample, narrow(x, 500, text).sample)


def test_one_command_trains_resumes_exports_and_measures(
    tmp_path: Path, artwork: None, resumed: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (edit, unet):
        monkeypatch.setattr(module, "BATCH", 4)
    monkeypatch.setattr(common, "AVERAGE_EVERY", 1)
    generate = edit.generate
    monkeypatch.setattr(edit, "generate", lambda pipe, tasks, guidance, steps=50: generate(pipe, tasks, guidance, 1))
    monkeypatch.setattr(edit, "GUIDANCES", ((1.5, 1.0), (2.0, 1.5)))
    monkeypatch.setattr(edit, "SWEEP_EACH", 1)

    def train() -> StableDiffusionInstructPix2PixPipeline:
        edit.emoji_edit(tmp_path, 4, BASE, 24, 0, "cpu", each=2)
        return StableDiffusionInstructPix2PixPipeline.from_pretrained(tmp_path / edit.NAME, local_files_only=True)

    straight = resumed(edit, "edit", train, ["unet", "text_encoder"])
    assert straight.unet.conv_in.weight[:, 4:].any()
    folder = tmp_path / edit.NAME
    assert edit.START in scenes.split()[1]
    with Image.open(folder / edit.START_FILE) as start:
        assert start.tobytes() == edit.start_picture().tobytes()
    result = json.loads((folder / "evaluation.json").read_text())
    assert result["edits"] == 8
    assert set(result["psnr_db"]) == {"edited", "unedited", "true edit through the autoencoder"}
    assert set(result["psnr_db"]["edited"]) == {"all", *edits.KINDS}
    assert set(re.findall(r"{(.*?)}", (folder / "README.md").read_text())) == {"colour", "object"}, "what the instructions leave open"
    assert {path.name for path in (tmp_path / f"grids-{edit.NAME}").iterdir()} == {f"{kind}.png" for kind in edits.KINDS}


def test_what_an_instruction_asks_is_read_back() -> None:
    for kind in edits.KINDS:
        for held_out in (False, True):
            for target in edits.choices(SOURCE.labels, kind, held_out):
                assert edits.asked(edits.instruction(SOURCE.labels, target)) == (kind, getattr(target, kind))
    assert edits.asked("Turn the christmas tree into an ice cream.") == ("object", "ice cream")
    for said in ("make it blue", "make the background beige", "move it", "turn the apple into a robin", ""):
        with pytest.raises(ValueError, match="is not understood; an edit reads like"):
            edits.asked(said)


def test_the_judge_of_edits_looks_at_what_was_to_change(artwork: None) -> None:
    judge = edit_judge.load_bundled()
    tasks = edit.held_out_tasks(4, 0)
    said = [task.instruction for task in tasks]
    verdicts = judge.score([scenes.render(task.after) for task in tasks], said)
    assert {name: [i for i, v in enumerate(row) if v is not None] for name, row in verdicts.items()} == {
        name: [i for i, task in enumerate(tasks) if task.kind == name] for name in verdicts
    }
    assert sum(bool(v) for row in verdicts.values() for v in row) >= len(tasks) - 1
    before = judge.score([scenes.render(task.before) for task in tasks], said)
    assert not any(v for row in before.values() for v in row)
    with pytest.raises(ValueError, match="one for each image"):
        judge.score([], said)
