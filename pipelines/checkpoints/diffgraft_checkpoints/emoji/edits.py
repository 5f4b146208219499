"""Edits of a scene that can be said in a sentence, each with its one true result.

An edit changes the background, the place, the size or the object, to a value that follows from the scene and the sentence alone, and
nothing else. So the picture that a method should give is known pixel by pixel.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

import numpy as np

from . import scenes
from .scenes import Labels, Scene

KINDS = ("background", "place", "size", "object")
VALUES: dict[str, Sequence[str]] = {
    "background": tuple(scenes.BACKGROUNDS), "place": tuple(scenes.PLACES), "size": tuple(scenes.SIZES), "object": tuple(scenes.OBJECTS),
}  # fmt: skip
MOVES = {"left": "to the left", "right": "to the right", "top": "to the top", "bottom": "to the bottom", "center": "to the center"}
"""Place -> what "move it ..." says of it."""

SIZES_ASKED = {"make it bigger": "big", "make it smaller": "small"}


def kind_of(source: Labels, target: Labels) -> str:
    """The one field in which the labels differ.

    Raises:
        ValueError: they differ in none, or in several.
    """
    kinds = [kind for kind in KINDS if getattr(source, kind) != getattr(target, kind)]
    if len(kinds) != 1:
        raise ValueError(f"{source} and {target} differ in {' and '.join(kinds) or 'nothing'}; an edit changes one field")
    return kinds[0]


def instruction(source: Labels, target: Labels) -> str:
    """The sentence that asks for the edit."""
    kind = kind_of(source, target)
    if kind == "background":
        return f"make the background {target.background}"
    if kind == "place":
        return f"move it {MOVES[str(target.place)]}"
    if kind == "size":
        return next(said for said, size in SIZES_ASKED.items() if size == target.size)
    return scenes.articles(f"turn the {source.object} into a {target.object}")


def asked(said: str) -> tuple[str, str]:
    """The field that an instruction changes and the value that it asks for: ("background", "blue").

    Raises:
        ValueError: the sentence is none of an edit's.
    """
    text = said.lower().strip(" .")
    moves = {f"move it {phrase}": place for place, phrase in MOVES.items()}
    if text in moves:
        return "place", moves[text]
    if text in SIZES_ASKED:
        return "size", SIZES_ASKED[text]
    for kind, pattern in (("background", r"make the background (.+)"), ("object", r"turn the .+ into an? (.+)")):
        if (found := re.fullmatch(pattern, text)) and found[1] in VALUES[kind]:
            return kind, found[1]
    raise ValueError(
        f"{said!r} is not understood; an edit reads like 'make the background blue', 'move it to the left', 'make it bigger', 'turn the "
        "apple into a star'"
    )


def apply(source: Scene, target: Labels) -> Scene:
    """The scene after the edit.

    A background becomes the exact colour of its name; an object that is moved stands on the axis, at the mean distance for its size; one
    that is made bigger or smaller grows by the ratio of the mean sizes, and its distance from the middle by the ratio of the mean
    distances, so that it stays in the picture; another object stands where the first was, as wide, and turned alike.
    """
    kind = kind_of(source.labels, target)
    if kind == "background":
        return replace(source, labels=target, color=scenes.BACKGROUNDS[str(target.background)])
    if kind == "object":
        return replace(source, labels=target)
    middle = scenes.SIZE / 2
    if kind == "place":
        distance = np.mean(scenes.ALONG[str(target.size)])
        dx, dy = scenes.PLACES[str(target.place)]
        return replace(source, labels=target, x=middle + float(dx * distance), y=middle + float(dy * distance))
    grown, farther = (
        float(np.mean(table[str(target.size)]) / np.mean(table[str(source.labels.size)])) for table in (scenes.SIZES, scenes.ALONG)
    )
    x, y = (middle + farther * (at - middle) for at in (source.x, source.y))
    return replace(source, labels=target, x=x, y=y, side=source.side * grown)


@lru_cache(maxsize=1)
def _held_out_combinations() -> frozenset[Labels]:
    return frozenset(scenes.split()[1])


def is_held_out(source: Labels, target: Labels) -> bool:
    """Whether no training edit is like this one: it ends in a held-out combination or, if it changes the object, joins a held-out pair."""
    if target in _held_out_combinations():
        return True
    pair = sorted((source.object, target.object))
    return kind_of(source, target) == "object" and (pair[0], pair[1]) in scenes.held_out_pairs()


def choices(source: Labels, kind: str, held_out: bool) -> list[Labels]:
    """The results of all edits of this kind, of those that training shows or of those that it does not."""
    changed = [replace(source, **{kind: value}) for value in VALUES[kind] if value != getattr(source, kind)]
    return [target for target in changed if is_held_out(source, target) == held_out]


def draw_edit(source: Scene, rng: np.random.Generator, held_out: bool = False, kinds: Sequence[str] = KINDS) -> Scene:
    """The scene after an edit drawn from `kinds`, each as likely as the others that are possible here.

    Raises:
        ValueError: none is (`choices` tells before).
    """
    possible = [found for kind in kinds if (found := choices(source.labels, kind, held_out))]
    if not possible:
        raise ValueError(f"no {'held-out' if held_out else 'training'} edit of {', '.join(kinds)} begins at {source.labels}")
    targets = possible[int(rng.integers(len(possible)))]
    return apply(source, targets[int(rng.integers(len(targets)))])
