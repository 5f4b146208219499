"""The bundled checkpoint emoji-sd: its scenes, captions, split, judge and weights."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import diffgraft_checkpoints
import numpy as np
import pytest
from diffgraft_checkpoints.emoji import scenes

FOLDER = Path(diffgraft_checkpoints.__file__).parent / "bundled" / "emoji-sd"
EXAMPLE = scenes.Labels("dog face", "blue", "small", "left")


def test_importing_the_emoji_package_does_not_import_torch() -> None:
    code = "import sys, diffgraft_checkpoints.emoji, diffgraft_checkpoints.emoji.scenes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_split_is_disjoint_complete_and_fixed() -> None:
    training, held_out = scenes.split()
    assert not set(training) & set(held_out)
    total = len(scenes.OBJECTS) * len(scenes.BACKGROUNDS) * len(scenes.SIZES) * len(scenes.PLACES)
    assert len(set(training) | set(held_out)) == len(training) + len(held_out) == total
    assert len(held_out) == round(scenes.HELD_OUT_SHARE * total)
    scenes.split.cache_clear()
    assert scenes.split() == (training, held_out)


def test_every_caption_parses_back_to_what_it_says() -> None:
    combinations = [*scenes.split()[0][::17], *scenes.split()[1]]
    for labels in combinations:
        for template, _ in scenes.TEMPLATES:
            parsed = scenes.parse_caption(scenes.fill(template, labels))
            for name in ("object", "background", "size", "place"):
                said = "{" + name + "}" in template or (name == "place" and "{phrase}" in template)
                assert getattr(parsed, name) == (getattr(labels, name) if said else None)


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("", "names no object"),
        ("a blue background", "names no object"),
        ("a dog face and a frog", "'and' is not understood"),
        ("a dog face, frog", "two objects"),
        ("a photo of an astronaut", "'photo' is not understood"),
        ("a small big frog", "two sizes"),
        ("a blue frog", "'blue' is not understood"),
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        scenes.parse_caption(prompt)


def test_pairs_stand_opposite_each_other_and_their_captions_parse_back() -> None:
    for seed in range(60):
        rng = np.random.default_rng([seed, 5])
        pair = scenes.draw_pair(rng, held_out=seed % 2 == 0)
        first, second = pair
        assert scenes.OPPOSITE[str(first.place)] == second.place
        assert first.background == second.background
        names = tuple(sorted((first.object, second.object)))
        assert (names in scenes.held_out_pairs()) == (seed % 2 == 0)
        for template, _ in scenes.PAIR_TEMPLATES:
            parsed = scenes.parse_prompt(scenes.fill_pair(template, pair))
            background = first.background if "{background}" in template else None
            wanted = [scenes.Labels(each.object, background, None, each.place) for each in pair]
            assert list(parsed) == wanted
        one, other = scenes.sample_pair(pair, np.random.default_rng(seed))
        assert one.color == other.color
        assert abs(one.x - other.x) + abs(one.y - other.y) > 26, "they do not lie on each other"


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("a dog face on the left and a frog", "opposite each other"),
        ("a dog face on the left and a frog at the top", "opposite each other"),
        ("a dog face and a frog and a star", "joins 3 objects"),
        ("a dog face on the left on a blue background and a frog on the right on a red background", "two backgrounds"),
        ("a dog face on the left and a robin on the right", "'robin' is not understood"),
    ],
)
def test_prompts_for_pairs_outside_the_grammar_are_refused(prompt: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        scenes.parse_prompt(prompt)


def test_scenes_are_deterministic_and_stay_inside_their_class() -> None:
    for labels in scenes.split()[1][:200]:
        scene = scenes.sample_scene(labels, np.random.default_rng([7, 1]))
        assert scene == scenes.sample_scene(labels, np.random.default_rng([7, 1]))
        low, high = scenes.SIZES[str(labels.size)]
        assert low <= scene.side <= high
        dx, dy = scene.x - scenes.SIZE / 2, scene.y - scenes.SIZE / 2
        if labels.place == "center":
            assert max(abs(dx), abs(dy)) <= 4
        else:
            ax, ay = scenes.PLACES[str(labels.place)]
            along, across = dx * ax + dy * ay, abs(dx * ay) + abs(dy * ax)
            assert along >= 9
            assert along > across + 4


def test_renders_are_deterministic_and_differ_by_seed(artwork: None) -> None:
    def picture(seed: int) -> np.ndarray:
        return np.asarray(scenes.render(scenes.sample_scene(EXAMPLE, np.random.default_rng(seed))))

    assert picture(1).shape == (64, 64, 3)
    assert np.array_equal(picture(1), picture(1))
    assert np.abs(picture(1).astype(int) - picture(2)).mean() > 2


def test_a_missing_font_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(scenes.FONT_ENV, "no-such-file.ttf")
    with pytest.raises(scenes.ArtworkMissing, match="no-such-file"):
        scenes.find_font()
    monkeypatch.delenv(scenes.FONT_ENV)
    monkeypatch.setattr(scenes, "_FONT_DIRS", ())
    with pytest.raises(scenes.ArtworkMissing, match="apt-get install fonts-noto-color-emoji"):
        scenes.find_font()


def test_judge_on_true_renders(artwork: None) -> None:
    from diffgraft_checkpoints.emoji.judge import FIELDS, Judge

    judge = Judge.from_pretrained(FOLDER / "judge")
    labels = scenes.split()[1][:128]
    prompts = [scenes.caption(each) for each in labels]
    images = [scenes.render(scenes.sample_scene(each, np.random.default_rng([9, i]))) for i, each in enumerate(labels)]
    scores = judge.score(images, prompts)
    assert list(scores) == list(FIELDS)
    for name in FIELDS:
        assert sum(bool(s) for s in scores[name]) >= 0.97 * len(images), name
    assert sum(bool(s) for s in judge.score(images, prompts[::-1])["object"]) < 0.1 * len(images)
    assert judge.score(images[:1], [f"a {labels[0].object}"])["place"] == [None]
    features = judge.features(images[:5])
    assert features.shape[0] == 5
    assert features.isfinite().all()
    with pytest.raises(ValueError, match="one prompt for each image"):
        judge.score(images, prompts[:1])


def test_judge_reads_both_objects_of_a_pair(artwork: None) -> None:
    from diffgraft_checkpoints.emoji.judge import Judge

    judge = Judge.from_pretrained(FOLDER / "judge")
    pairs = [scenes.draw_pair(np.random.default_rng([i, 6]), held_out=True) for i in range(48)]
    prompts = [scenes.pair_caption(pair) for pair in pairs]
    images = [scenes.render(*scenes.sample_pair(pair, np.random.default_rng([8, i]))) for i, pair in enumerate(pairs)]
    scores = judge.score(images, prompts)
    assert sum(bool(s) for s in scores["object"]) >= 0.95 * len(pairs)
    assert scores["background"] == [True] * len(pairs)
    assert scores["size"] == scores["place"] == [None] * len(pairs), "a caption for a pair does not say the size; the object says the place"
    swapped = [scenes.pair_caption((first, second)) for (_, first), (second, _) in zip(pairs, pairs, strict=True)]
    turned = [scenes.pair_caption((replace(a, place=b.place), replace(b, place=a.place))) for a, b in pairs]
    assert judge.score(images, swapped)["object"] == scores["object"], "the order in which they are named does not matter"
    assert sum(bool(s) for s in judge.score(images, turned)["object"]) <= 2, "exchanged places are seen"


def test_judge_says_where_it_looked(tmp_path: Path) -> None:
    from diffgraft_checkpoints.emoji.judge import Judge

    with pytest.raises(FileNotFoundError, match="no judge in"):
        Judge.from_pretrained(tmp_path)


def test_bundled_folder_is_a_plain_small_pipeline_that_follows_its_prompt() -> None:
    import torch
    from diffgraft_checkpoints.emoji.judge import Judge
    from diffusers import StableDiffusionPipeline

    files = [path for path in FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {"README.md", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt"} <= {path.name for path in files}
    index = json.loads((FOLDER / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    assert index["requires_safety_checker"] is False
    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    prompts = [f"a small apple {phrase} on a blue background" for phrase in scenes.PLACE_PHRASES.values()]
    images = pipe(prompts, num_inference_steps=12, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
    pair = "a pumpkin at the top and a strawberry at the bottom on a blue background"
    both = pipe(pair, num_inference_steps=12, guidance_scale=2.0, generator=torch.Generator().manual_seed(0)).images
    assert Judge.from_pretrained(FOLDER / "judge").score(both, [pair])["object"] == [True]
    assert [image.size for image in images] == [(64, 64)] * len(prompts)
    scores = Judge.from_pretrained(FOLDER / "judge").score(images, prompts)
    for name in ("object", "background", "size", "place"):
        assert scores[name] == [True] * len(prompts), name


def test_the_small_one_stands_in_for_the_large_one() -> None:
    import torch
    from diffgraft_checkpoints.bundled import emoji_sd_small
    from diffgraft_checkpoints.emoji.judge import load_bundled
    from diffusers import StableDiffusionPipeline
    from torch.utils.flop_counter import FlopCounterMode

    folder = Path(emoji_sd_small.path)
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 40e6
    assert {"README.md", "LICENSE-APACHE-2.0.txt", "LICENSE-OFL-1.1.txt"} <= {path.name for path in files}
    large, small = (StableDiffusionPipeline.from_pretrained(path, local_files_only=True) for path in (FOLDER, folder))
    for part in ("vae", "text_encoder"):
        ours, theirs = (getattr(pipe, part).state_dict() for pipe in (small, large))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), part
    assert small.scheduler.config == large.scheduler.config

    def work(pipe: StableDiffusionPipeline) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            pipe.unet(torch.zeros(1, 4, 16, 16), torch.tensor(500), torch.zeros(1, 24, 128))
        return counter.get_total_flops()

    assert work(small) <= work(large) / 5
    small.set_progress_bar_config(disable=True)
    prompts = [f"a big apple {phrase} on a blue background" for phrase in scenes.PLACE_PHRASES.values()]
    images = small(prompts, num_inference_steps=12, guidance_scale=1.5, generator=torch.Generator().manual_seed(0)).images
    scores = load_bundled().score(images, prompts)
    for name in ("background", "size", "place"):
        assert scores[name] == [True] * len(prompts), name
