"""Emoji scenes: artwork, sampling, rendering, captions, labels and the train / held-out split.

A scene is one emoji on a plain background; a pair is two small ones opposite each other. Labels (object, background, size, place) are
exact, so that how well a picture follows its caption can be measured without a learned metric of "prompt following". Everything that
is drawn at random comes from `numpy` generators seeded with (seed, index): the same call always gives the same picture.
"""

from __future__ import annotations

import io
import math
import os
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = 64
"""Side of a picture in pixels."""

OBJECTS: dict[str, int] = {
    "dog face": 0x1F436, "cat face": 0x1F431, "frog": 0x1F438, "panda": 0x1F43C, "lion": 0x1F981, "pig": 0x1F437,
    "monkey": 0x1F435, "penguin": 0x1F427, "owl": 0x1F989, "chick": 0x1F424, "fish": 0x1F420, "octopus": 0x1F419,
    "turtle": 0x1F422, "snail": 0x1F40C, "butterfly": 0x1F98B, "bee": 0x1F41D, "ladybug": 0x1F41E, "whale": 0x1F433,
    "elephant": 0x1F418, "unicorn": 0x1F984, "fox": 0x1F98A, "rabbit": 0x1F430, "apple": 0x1F34E, "banana": 0x1F34C,
    "grapes": 0x1F347, "strawberry": 0x1F353, "watermelon": 0x1F349, "pineapple": 0x1F34D, "cherries": 0x1F352,
    "carrot": 0x1F955, "corn": 0x1F33D, "eggplant": 0x1F346, "mushroom": 0x1F344, "pizza": 0x1F355,
    "hamburger": 0x1F354, "donut": 0x1F369, "ice cream": 0x1F366, "sunflower": 0x1F33B, "cactus": 0x1F335,
    "palm tree": 0x1F334, "car": 0x1F697, "bus": 0x1F68C, "rocket": 0x1F680, "sailboat": 0x26F5, "house": 0x1F3E0,
    "umbrella": 0x2614, "balloon": 0x1F388, "gift": 0x1F381, "soccer ball": 0x26BD, "basketball": 0x1F3C0,
    "guitar": 0x1F3B8, "drum": 0x1F941, "light bulb": 0x1F4A1, "alarm clock": 0x23F0, "book": 0x1F4D5,
    "star": 0x2B50, "heart": 0x2764, "crown": 0x1F451, "snowman": 0x26C4, "ghost": 0x1F47B, "robot": 0x1F916,
    "alien": 0x1F47D, "pumpkin": 0x1F383, "christmas tree": 0x1F384,
}  # fmt: skip
"""Object name in captions -> Unicode code point of its emoji."""

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "red": (196, 62, 68), "orange": (238, 148, 66), "yellow": (246, 222, 112), "green": (98, 176, 108),
    "blue": (86, 140, 214), "purple": (140, 96, 186), "pink": (246, 176, 208), "gray": (158, 160, 164),
}  # fmt: skip
"""Background colour name -> mean RGB, 0..255."""

SIZES: dict[str, tuple[float, float]] = {"small": (26.0, 31.0), "big": (40.0, 46.0)}
"""Size word -> range of the longer side of the artwork, in pixels."""

PLACES: dict[str, tuple[int, int]] = {
    "left": (-1, 0),
    "right": (1, 0),
    "top": (0, -1),
    "bottom": (0, 1),
    "center": (0, 0),
}
"""Place word -> direction of the object's centre from the picture's centre (x to the right, y down)."""

PLACE_PHRASES = {
    "left": "on the left", "right": "on the right", "top": "at the top", "bottom": "at the bottom",
    "center": "in the center",
}  # fmt: skip

ALONG = {"small": (13.0, 19.0), "big": (9.0, 13.0)}
"""Distance of the object's centre from the picture's centre along its direction, in pixels."""
ACROSS = {"small": 7.0, "big": 4.5}
"""Largest offset across that direction, in pixels."""
CENTER_JITTER = {"small": 4.0, "big": 3.0}
"""Largest offset of a centred object on either axis, in pixels."""
MAX_ROTATION = 25.0
"""Largest rotation either way, in degrees."""
UPRIGHT_ROTATION = 10.0
"""Largest rotation of an upright scene, in degrees."""

HELD_OUT_SHARE = 0.1
SPLIT_SEED = 20_240

FONT_ENV = "DIFFGRAFT_EMOJI_FONT"
_FONT_NAME = "NotoColorEmoji.ttf"
_FONT_DIRS = (
    "/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts", "/Library/Fonts",
    "~/Library/Fonts", "/opt/homebrew/share/fonts",
)  # fmt: skip


class ArtworkMissing(FileNotFoundError):
    """The emoji font is not on this machine, or is not the bitmap (CBDT) build."""


@dataclass(frozen=True)
class Labels:
    """What a caption says; `None` where it does not say."""

    object: str
    background: str | None = None
    size: str | None = None
    place: str | None = None


@dataclass(frozen=True)
class Scene:
    """One picture's labels and everything that was drawn at random for it (pixels, degrees, 0..255 levels)."""

    labels: Labels
    x: float
    y: float
    side: float
    rotation: float
    mirrored: bool
    color: tuple[int, int, int]


# --- artwork ---------------------------------------------------------------------------------------------------------


def find_font() -> Path:
    """Path of NotoColorEmoji.ttf: `$DIFFGRAFT_EMOJI_FONT`, or the usual font folders."""
    if given := os.environ.get(FONT_ENV):
        if Path(given).is_file():
            return Path(given)
        raise ArtworkMissing(f"{FONT_ENV} is set to {given!r}, which is not a file")
    for folder in _FONT_DIRS:
        for path in sorted(Path(folder).expanduser().rglob(_FONT_NAME)):
            return path
    raise ArtworkMissing(
        f"{_FONT_NAME} was not found. Install it (Debian, Ubuntu: apt-get install fonts-noto-color-emoji; "
        f"Fedora: google-noto-color-emoji-fonts) or set {FONT_ENV} to the file"
    )


@lru_cache(maxsize=1)
def load_artwork() -> dict[str, Image.Image]:
    """Object name -> square RGBA picture of 128 x 128 pixels, cut to the drawing (longer side 128)."""
    from fontTools.ttLib import TTFont

    path = find_font()
    font = TTFont(path, lazy=True)
    if "CBDT" not in font:
        raise ArtworkMissing(f"{path} holds no bitmaps (CBDT table); install the package fonts-noto-color-emoji")
    names = font.getBestCmap()
    bitmaps = font["CBDT"].strikeData[0]
    return {name: _square(bitmaps[names[code]].imageData) for name, code in OBJECTS.items()}


def _square(png: bytes) -> Image.Image:
    picture = Image.open(io.BytesIO(png)).convert("RGBA")
    picture = picture.crop(picture.getchannel("A").point(lambda a: 255 if a > 24 else 0).getbbox())
    scale = 128 / max(picture.size)
    picture = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (128, 128))
    square.paste(picture, ((128 - picture.width) // 2, (128 - picture.height) // 2))
    return square


@lru_cache(maxsize=512)
def _artwork_at(name: str, side: int, mirrored: bool) -> Image.Image:
    picture = load_artwork()[name].resize((side, side), Image.Resampling.LANCZOS)
    return picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else picture


# --- combinations ----------------------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def split() -> tuple[tuple[Labels, ...], tuple[Labels, ...]]:
    """(training, held-out) combinations of object, background, size and place: fixed and disjoint."""
    combinations = [Labels(*c) for c in product(OBJECTS, BACKGROUNDS, SIZES, PLACES)]
    order = np.random.default_rng(SPLIT_SEED).permutation(len(combinations))
    held = set(order[: round(HELD_OUT_SHARE * len(combinations))].tolist())
    training = tuple(c for i, c in enumerate(combinations) if i not in held)
    return training, tuple(c for i, c in enumerate(combinations) if i in held)


# --- scenes ----------------------------------------------------------------------------------------------------------


def sample_scene(labels: Labels, rng: np.random.Generator) -> Scene:
    """A scene with these labels; what they leave open (`None`) is drawn too."""
    background = labels.background or str(rng.choice(list(BACKGROUNDS)))
    size = labels.size or str(rng.choice(list(SIZES)))
    place = labels.place or str(rng.choice(list(PLACES)))
    dx, dy = PLACES[place]
    if place == "center":
        jitter = CENTER_JITTER[size]
        x, y = rng.uniform(-jitter, jitter, 2)
    else:
        along, across = rng.uniform(*ALONG[size]), rng.uniform(-ACROSS[size], ACROSS[size])
        x, y = dx * along + abs(dy) * across, dy * along + abs(dx) * across
    level = rng.uniform(0.9, 1.06)
    color = np.clip(np.array(BACKGROUNDS[background]) * level + rng.uniform(-5, 5, 3), 0, 255).round().astype(int)
    return Scene(
        labels=Labels(labels.object, background, size, place),
        x=SIZE / 2 + float(x),
        y=SIZE / 2 + float(y),
        side=float(rng.uniform(*SIZES[size])),
        rotation=float(rng.uniform(-MAX_ROTATION, MAX_ROTATION)),
        mirrored=bool(rng.random() < 0.5),
        color=(int(color[0]), int(color[1]), int(color[2])),
    )


def upright(scene: Scene) -> Scene:
    """The same scene with its object as the artist drew it: not mirrored, and turned by ``UPRIGHT_ROTATION`` at most."""
    return replace(scene, rotation=scene.rotation * UPRIGHT_ROTATION / MAX_ROTATION, mirrored=False)


Pair = tuple[Labels, Labels]
"""Two small objects on one background, at opposite places."""

OPPOSITE = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}


@lru_cache(maxsize=1)
def held_out_pairs() -> frozenset[tuple[str, str]]:
    """Pairs of objects (in alphabetical order) that no training picture shows together."""
    names = sorted(OBJECTS)
    pairs = [(a, b) for a, b in product(names, names) if a < b]
    order = np.random.default_rng(SPLIT_SEED + 1).permutation(len(pairs))
    return frozenset(pairs[i] for i in order[: round(HELD_OUT_SHARE * len(pairs))])


def draw_pair(rng: np.random.Generator, held_out: bool) -> Pair:
    """A pair from the training or the held-out pairs of objects, in random places on a random background."""
    while True:
        first, second = (str(name) for name in rng.choice(list(OBJECTS), 2, replace=False))
        if (tuple(sorted((first, second))) in held_out_pairs()) == held_out:
            break
    background, place = str(rng.choice(list(BACKGROUNDS))), str(rng.choice(list(OPPOSITE)))
    return Labels(first, background, "small", place), Labels(second, background, "small", OPPOSITE[place])


def sample_pair(pair: Pair, rng: np.random.Generator) -> tuple[Scene, Scene]:
    """A scene of each, on the background of the first."""
    first, second = (sample_scene(labels, rng) for labels in pair)
    return first, replace(second, color=first.color)


def render(*scenes: Scene) -> Image.Image:
    """The scenes as one RGB picture of 64 x 64 pixels (drawn at twice that size, then averaged down)."""
    canvas = Image.new("RGB", (2 * SIZE, 2 * SIZE), scenes[0].color)
    for scene in scenes:
        drawn = draw(scene)
        canvas.paste(drawn, (0, 0), drawn)
    return canvas.reduce(2)


def draw(scene: Scene) -> Image.Image:
    """The scene's object, RGBA, 128 x 128 pixels."""
    source = 64 if scene.side < 35 else 96
    artwork = _artwork_at(scene.labels.object, source, scene.mirrored)
    scale = source / (2 * scene.side)
    cos, sin = math.cos(math.radians(scene.rotation)) * scale, math.sin(math.radians(scene.rotation)) * scale
    cx, cy, middle = 2 * scene.x, 2 * scene.y, source / 2
    matrix = (cos, sin, middle - cos * cx - sin * cy, -sin, cos, middle + sin * cx - cos * cy)
    return artwork.transform((2 * SIZE, 2 * SIZE), Image.Transform.AFFINE, matrix, Image.Resampling.BICUBIC)


# --- captions --------------------------------------------------------------------------------------------------------


TEMPLATES: tuple[tuple[str, float], ...] = (
    ("a {size} {object} {phrase} on a {background} background", 0.34),
    ("{size} {object}, {place}, {background} background", 0.18),
    ("a {background} background with a {size} {object} {phrase}", 0.18),
    ("a {object} {phrase} on a {background} background", 0.07),
    ("a {size} {object} on a {background} background", 0.07),
    ("{object}, {background} background", 0.06),
    ("a {size} {object} {phrase}", 0.05),
    ("a {object}", 0.05),
)
"""Caption templates and how often each is used in training; the first three say everything."""


def fill(template: str, labels: Labels) -> str:
    """The caption that `template` gives for complete labels."""
    place = labels.place or "center"
    text = template.format(
        object=labels.object,
        background=labels.background,
        size=labels.size,
        place=place,
        phrase=PLACE_PHRASES[place],
    )
    return articles(text)


PAIR_TEMPLATES: tuple[tuple[str, float], ...] = (
    ("a {object} {phrase} and a {other} {other_phrase} on a {background} background", 0.5),
    ("a {object} {phrase} and a {other} {other_phrase}, {background} background", 0.3),
    ("a {object} {phrase} and a {other} {other_phrase}", 0.2),
)
"""Caption templates for pairs and how often each is used in training."""


def fill_pair(template: str, pair: Pair) -> str:
    """The caption that `template` gives for a pair."""
    first, second = pair
    text = template.format(
        object=first.object,
        phrase=PLACE_PHRASES[first.place or "center"],
        other=second.object,
        other_phrase=PLACE_PHRASES[second.place or "center"],
        background=first.background,
    )
    return articles(text)


def pair_caption(pair: Pair, rng: np.random.Generator | None = None) -> str:
    """A caption for a pair: the first template, or (with `rng`) one drawn with the training frequencies."""
    if rng is None:
        return fill_pair(PAIR_TEMPLATES[0][0], pair)
    weights = np.array([weight for _, weight in PAIR_TEMPLATES])
    return fill_pair(PAIR_TEMPLATES[int(rng.choice(len(PAIR_TEMPLATES), p=weights / weights.sum()))][0], pair)


def articles(text: str) -> str:
    """ "an" instead of "a" where the next word begins with a vowel."""
    return re.sub(r"\ba (?=[aeio]|um)", "an ", text)


def caption(labels: Labels, rng: np.random.Generator | None = None) -> str:
    """A caption for complete labels: the first template, or (with `rng`) one drawn with the training frequencies."""
    if rng is None:
        return fill(TEMPLATES[0][0], labels)
    weights = np.array([weight for _, weight in TEMPLATES])
    return fill(TEMPLATES[int(rng.choice(len(TEMPLATES), p=weights / weights.sum()))][0], labels)


_FILLER = {"a", "an", "the", "on", "at", "in", "with", "of"}
_WORD_GROUPS = {
    "object": {name: name for name in OBJECTS},
    "background": {f"{name} background": name for name in BACKGROUNDS},
    "size": {name: name for name in SIZES},
    "place": {name: name for name in PLACES},
}


def parse_prompt(text: str) -> tuple[Labels, ...]:
    """What a caption says of its one object or its two ("a cat face on the left and a star on the right").

    Raises:
        ValueError: saying what is not understood.
    """
    parts = re.split(r"\band\b", text.lower())
    if len(parts) == 1:
        return (parse_caption(text),)
    if len(parts) > 2:
        raise ValueError(f"caption {text!r} joins {len(parts)} objects by 'and'; two at most")
    first, second = (parse_caption(part) for part in parts)
    background = first.background or second.background
    if first.background and second.background and first.background != second.background:
        raise ValueError(f"caption {text!r} names two backgrounds: {first.background!r} and {second.background!r}")
    if first.place is None or OPPOSITE.get(first.place) != second.place:
        raise ValueError(f"caption {text!r}: two objects stand opposite each other, left and right or top and bottom; say where each is")
    return replace(first, background=background), replace(second, background=background)


def parse_caption(text: str) -> Labels:
    """Labels that a caption says.

    The grammar is loose in order and little words, and strict in content: one object, at most one
    "<colour> background", one size, one place, and nothing else. Anything else raises `ValueError` saying what is not understood.
    """
    words = re.findall(r"[a-z]+", text.lower())
    found: dict[str, str] = {}
    at = 0
    while at < len(words):
        for length in (2, 1):
            chunk = " ".join(words[at : at + length])
            group = next((g for g, table in _WORD_GROUPS.items() if chunk in table), None)
            if group is not None and at + length <= len(words):
                if group in found:
                    raise ValueError(f"caption {text!r} names two {group}s: {found[group]!r} and {chunk!r}")
                found[group] = _WORD_GROUPS[group][chunk]
                at += length
                break
        else:
            if words[at] not in _FILLER:
                raise ValueError(
                    f"caption {text!r}: {words[at]!r} is not understood; a caption reads like "
                    f'"{fill(TEMPLATES[0][0], Labels("dog face", "blue", "small", "left"))}"'
                )
            at += 1
    if "object" not in found:
        raise ValueError(f"caption {text!r} names no object; known objects: {', '.join(OBJECTS)}")
    return Labels(**found)
