"""Moving emoji scenes: sampling, rendering, captions, labels and the train / held-out split.

A clip is one emoji that moves in a straight line over a plain background, or stays where it is. What is drawn at random for a
picture (`scenes.sample_scene`: size, rotation, mirroring, colour) holds for all its frames. The clip of a seed and an index is
always the same, and so cheap to render (0.5 ms a frame) that clips need not be kept.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

import numpy as np
from PIL import Image

from . import scenes
from .scenes import BACKGROUNDS, OBJECTS, SIZES, Scene

FRAMES = 9
"""Frames of a clip: one, and two times four, as Wan's autoencoder groups them."""

MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1), "still": (0, 0)}
"""Motion word -> direction of motion (x to the right, y down)."""

MOTION_PHRASES = {
    "left": "moves to the left", "right": "moves to the right", "up": "moves up", "down": "moves down", "still": "stays still",
}  # fmt: skip

TRAVEL = {"small": (18.0, 26.0), "big": (13.0, 18.0)}
"""Distance between the object's centres in the first and the last frame, in pixels."""
SPLIT_SEED = scenes.SPLIT_SEED + 2


@dataclass(frozen=True)
class MotionLabels:
    """What a caption says; `None` where it does not say."""

    object: str
    background: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Clip:
    """One clip's labels and its scene in the first and the last frame."""

    labels: MotionLabels
    first: Scene
    last: Scene


@lru_cache(maxsize=1)
def split() -> tuple[tuple[MotionLabels, ...], tuple[MotionLabels, ...]]:
    """(training, held-out) combinations of object, background, size and motion: fixed and disjoint."""
    combinations = [MotionLabels(*c) for c in product(OBJECTS, BACKGROUNDS, SIZES, MOTIONS)]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(combinations))
    held = set(order[: round(scenes.HELD_OUT_SHARE * len(combinations))].tolist())
    training = tuple(c for i, c in enumerate(combinations) if i not in held)
    return training, tuple(c for i, c in enumerate(combinations) if i in held)


# --- clips -----------------------------------------------------------------------------------------------------------


def sample_clip(labels: MotionLabels, rng: np.random.Generator) -> Clip:
    """A clip with these labels; what they leave open (`None`) is drawn too.

    The object is never further from the middle than in a still scene, so that it remains in the picture.
    """
    motion = labels.motion or str(rng.choice(list(MOTIONS)))
    first = scenes.sample_scene(scenes.Labels(labels.object, labels.background, labels.size), rng)
    background, size = str(first.labels.background), str(first.labels.size)
    complete = MotionLabels(labels.object, background, size, motion)
    if motion == "still":
        return Clip(complete, first, first)
    dx, dy = MOTIONS[motion]
    travel = rng.uniform(*TRAVEL[size])
    reach = scenes.ALONG[size][1] - travel / 2
    middle, across = rng.uniform(-reach, reach), rng.uniform(-scenes.ACROSS[size], scenes.ACROSS[size])

    def at(share: float) -> Scene:
        along = middle + (share - 0.5) * travel
        return replace(first, x=scenes.SIZE / 2 + dx * along + abs(dy) * across, y=scenes.SIZE / 2 + dy * along + abs(dx) * across)

    return Clip(complete, at(0.0), at(1.0))


def draw_clip(seed: int, index: int, held_out: bool = False) -> Clip:
    """Clip number `index` of `seed`, from the training or the held-out combinations."""
    rng = np.random.default_rng([seed, index, 3])
    combinations = split()[1 if held_out else 0]
    return sample_clip(combinations[int(rng.integers(len(combinations)))], rng)


def render_clip(clip: Clip, frames: int = FRAMES) -> list[Image.Image]:
    """The clip as RGB pictures of 64 x 64 pixels."""
    shares = np.linspace(0.0, 1.0, frames).tolist()
    x, y = clip.last.x - clip.first.x, clip.last.y - clip.first.y
    if x == y == 0:
        return [scenes.render(clip.first)] * frames
    return [scenes.render(replace(clip.first, x=clip.first.x + share * x, y=clip.first.y + share * y)) for share in shares]


def to_array(frames: list[Image.Image]) -> np.ndarray:
    """Pictures of equal size as (frames, height, width, 3) uint8."""
    return np.stack([np.asarray(frame) for frame in frames])


# --- captions --------------------------------------------------------------------------------------------------------


TEMPLATES: tuple[tuple[str, float], ...] = (
    ("a {size} {object} {phrase} on a {background} background", 0.36),
    ("{size} {object}, {moving}, {background} background", 0.18),
    ("a {background} background with a {size} {object} that {phrase}", 0.18),
    ("a {object} {phrase} on a {background} background", 0.10),
    ("a {size} {object} on a {background} background", 0.05),
    ("a {object} {phrase}", 0.08),
    ("a {object}", 0.05),
)
"""Caption templates and how often each is used in training; the first three say everything."""


def fill(template: str, labels: MotionLabels) -> str:
    """The caption that `template` gives for complete labels."""
    phrase = MOTION_PHRASES[labels.motion or "still"]
    moving = phrase.replace("moves", "moving").removeprefix("stays ")
    text = template.format(object=labels.object, background=labels.background, size=labels.size, phrase=phrase, moving=moving)
    return re.sub(r"\ba (?=[aeio]|um)", "an ", text)


def caption(labels: MotionLabels, rng: np.random.Generator | None = None) -> str:
    """A caption for complete labels: the first template, or (with `rng`) one drawn with the training frequencies."""
    if rng is None:
        return fill(TEMPLATES[0][0], labels)
    weights = np.array([weight for _, weight in TEMPLATES])
    return fill(TEMPLATES[int(rng.choice(len(TEMPLATES), p=weights / weights.sum()))][0], labels)


_MOTION = re.compile(r"\b(?:that )?(?:mov(?:es|ing) (?:to the )?(left|right|up|down)|(?:stay(?:s|ing) )?(still))\b")


def parse_motion(text: str) -> MotionLabels:
    """What a clip's caption says: one object, at most one "<colour> background", one size, one motion, and nothing else.

    Raises:
        ValueError: saying what is not understood.
    """
    example = f'a clip\'s caption reads like "{fill(TEMPLATES[0][0], MotionLabels("dog face", "blue", "small", "left"))}"'
    found = [moves or still for moves, still in _MOTION.findall(text.lower())]
    if len(found) > 1:
        raise ValueError(f"caption {text!r} names two motions: {found[0]!r} and {found[1]!r}")
    try:
        rest = scenes.parse_caption(_MOTION.sub(" ", text.lower()))
    except ValueError as error:
        raise ValueError(f"{error}; {example}") from None
    if rest.place is not None:
        raise ValueError(f"caption {text!r} says where the object is ({rest.place!r}), not how it moves; {example}")
    return MotionLabels(rest.object, rest.background, rest.size, found[0] if found else None)
