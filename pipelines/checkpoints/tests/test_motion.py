"""Moving emoji scenes: split, ways, captions, parser, and the judge of clips on true renders."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
from diffgraft_checkpoints.emoji import motion, scenes

FIELDS = [field.name for field in fields(motion.MotionLabels)]


def test_importing_the_clips_does_not_import_torch() -> None:
    code = "import sys, diffgraft_checkpoints.emoji.motion; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_split_is_disjoint_complete_and_fixed() -> None:
    training, held_out = motion.split()
    assert not set(training) & set(held_out)
    total = len(scenes.OBJECTS) * len(scenes.BACKGROUNDS) * len(scenes.SIZES) * len(motion.MOTIONS)
    assert len(set(training) | set(held_out)) == len(training) + len(held_out) == total
    assert len(held_out) == round(scenes.HELD_OUT_SHARE * total)
    motion.split.cache_clear()
    assert motion.split() == (training, held_out)


def test_every_caption_parses_back_to_what_it_says() -> None:
    for labels in [*motion.split()[0][::17], *motion.split()[1]]:
        for template, _ in motion.TEMPLATES:
            parsed = motion.parse_motion(motion.fill(template, labels))
            for name in FIELDS:
                said = "{" + name + "}" in template or (name == "motion" and ("{phrase}" in template or "{moving}" in template))
                assert getattr(parsed, name) == (getattr(labels, name) if said else None)


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("", "names no object"),
        ("a blue background moves to the left", "names no object"),
        ("a heart moves", "'moves' is not understood"),
        ("a heart flies", "'flies' is not understood"),
        ("a heart moves up and moves down", "two motions: 'up' and 'down'"),
        ("a heart moves to the left and up", "'and' is not understood"),
        ("a heart on the left", "not how it moves"),
        ("a small big frog moves up", "two sizes"),
    ],
)
def test_prompts_outside_the_grammar_are_refused(prompt: str, part: str) -> None:
    with pytest.raises(ValueError, match=part):
        motion.parse_motion(prompt)


def test_clips_are_deterministic_and_go_the_way_they_say_inside_the_picture() -> None:
    for index in range(300):
        clip = motion.draw_clip(7, index, held_out=True)
        assert clip == motion.draw_clip(7, index, held_out=True)
        assert clip.labels in motion.split()[1]
        size = str(clip.labels.size)
        dx, dy = motion.MOTIONS[str(clip.labels.motion)]
        way = np.array([clip.last.x - clip.first.x, clip.last.y - clip.first.y])
        along = float(way @ (dx, dy))
        assert np.allclose(way, along * np.array([dx, dy]))
        low, high = (0.0, 0.0) if clip.labels.motion == "still" else motion.TRAVEL[size]
        assert low - 1e-9 <= along <= high + 1e-9
        for scene in (clip.first, clip.last):
            assert max(abs(scene.x - scenes.SIZE / 2), abs(scene.y - scenes.SIZE / 2)) <= scenes.ALONG[size][1] + 1e-9
        assert replace(clip.last, x=clip.first.x, y=clip.first.y) == clip.first
    assert motion.draw_clip(7, 0) != motion.draw_clip(7, 1) != motion.draw_clip(8, 1)


def test_renders_start_at_the_first_scene_and_end_at_the_last(artwork: None) -> None:
    clip = motion.sample_clip(motion.MotionLabels("frog", "blue", "small", "right"), np.random.default_rng(1))
    frames = motion.render_clip(clip)
    assert motion.to_array(frames).shape == (motion.FRAMES, 64, 64, 3)
    assert np.array_equal(frames[0], scenes.render(clip.first))
    assert np.array_equal(frames[-1], scenes.render(clip.last))
    still = motion.sample_clip(motion.MotionLabels("frog", "blue", "small", "still"), np.random.default_rng(1))
    assert len({frame.tobytes() for frame in motion.render_clip(still)}) == 1


def test_motion_is_read_from_the_way_of_the_object() -> None:
    from diffgraft_checkpoints.emoji.motion_judge import UNCLEAR, motion_of

    def clip(*centers: tuple[int, int]) -> np.ndarray:
        frames = np.full((len(centers), 64, 64, 3), (86, 140, 214), dtype=np.uint8)
        for frame, (x, y) in zip(frames, centers, strict=True):
            frame[y - 8 : y + 8, x - 8 : x + 8] = (255, 255, 255)
        return frames

    assert motion_of(clip((42, 32), (32, 32), (22, 33))) == "left"
    assert motion_of(clip((22, 32), (32, 32), (42, 31))) == "right"
    assert motion_of(clip((32, 42), (32, 32), (33, 22))) == "up"
    assert motion_of(clip((32, 22), (32, 32), (31, 42))) == "down"
    assert motion_of(clip((32, 32), (33, 32), (32, 33))) == "still"
    slantwise, by_a_jump, there_and_back = ((20, 20), (30, 30), (40, 40)), ((20, 32), (20, 32), (40, 32)), ((32, 32), (42, 32), (32, 32))
    assert [motion_of(clip(*each)) for each in (slantwise, by_a_jump, there_and_back)] == [UNCLEAR] * 3
    assert motion_of(np.full((9, 64, 64, 3), 100, dtype=np.uint8)) == UNCLEAR


def test_judge_on_true_renders(artwork: None) -> None:
    from diffgraft_checkpoints.emoji import motion_judge

    judge = motion_judge.load_bundled()
    assert list(motion_judge.FIELDS) == FIELDS
    clips = [motion.draw_clip(9, i, held_out=True) for i in range(64)]
    prompts = [motion.caption(clip.labels) for clip in clips]
    videos = [motion.render_clip(clip) for clip in clips]
    scores = judge.score(videos, prompts)
    assert list(scores) == FIELDS
    for name in FIELDS:
        assert sum(map(bool, scores[name])) >= 0.97 * len(videos), name
    arrays = [motion.to_array(video) for video in videos[:4]]
    assert judge.predict(arrays) == judge.predict([array / 255.0 for array in arrays]) == judge.predict(videos[:4])
    assert judge.score([video[::-1] for video in videos], prompts)["motion"] == [clip.labels.motion == "still" for clip in clips]
    assert judge.score(videos[:1], [f"a {clips[0].labels.object}"])["motion"] == [None]
    with pytest.raises(ValueError, match="one prompt for each video"):
        judge.score(videos, prompts[:1])
