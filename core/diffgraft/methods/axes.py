"""Shapes in letters: ``("n", "3*d")``. A letter is one number wherever it stands; an axis is a number, a letter, or a product of them."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from math import prod

Axes = tuple["int | str", ...]
Shape = tuple[int, ...]
AXIS = re.compile(r"(\d+|[A-Za-z]\w*)(\*(\d+|[A-Za-z]\w*))*", re.ASCII)


def factors(axis: int | str) -> tuple[int, list[str]]:
    """(the number, the letters) whose product an axis is."""
    parts = str(axis).split("*")
    return prod(int(part) for part in parts if part.isdigit()), [part for part in parts if not part.isdigit()]


def letters_of(axes: Axes) -> set[str]:
    """All letters of a shape."""
    return {letter for axis in axes for letter in factors(axis)[1]}


def sized(axis: int | str, sizes: Mapping[str, int]) -> int | None:
    """The length of an axis, or None where a letter of it has no number."""
    number, letters = factors(axis)
    return number * prod(sizes[letter] for letter in letters) if sizes.keys() >= set(letters) else None


def bind(shapes: Iterable[tuple[Sequence[Axes], Shape]]) -> dict[str, int]:
    """The number of each letter, from shapes and what they may be: the one that most axes say."""
    pairs = [pair for forms, shape in shapes for axes in forms if len(axes) == len(shape) for pair in zip(axes, shape, strict=True)]
    sizes: dict[str, int] = {}
    while True:
        votes: dict[str, Counter[int]] = defaultdict(Counter)
        for axis, size in pairs:
            number, letters = factors(axis)
            unknown = [letter for letter in letters if letter not in sizes]
            rest = number * prod(sizes[letter] for letter in letters if letter in sizes)
            if len(unknown) == 1 and size > 0 and size % rest == 0:
                votes[unknown[0]][size // rest] += 1
        if not votes:
            return sizes
        sizes |= {letter: count.most_common(1)[0][0] for letter, count in votes.items()}


def fits(forms: Sequence[Axes], shape: Shape | None, sizes: Mapping[str, int]) -> bool:
    """Whether a shape is one of those that it may be, as far as the letters have numbers. No axis is empty."""
    if shape is None or 0 in shape:
        return False
    same = [axes for axes in forms if len(axes) == len(shape)]
    return any(all(sized(axis, sizes) in (None, size) for axis, size in zip(axes, shape, strict=True)) for axes in same)


def turned(forms: Sequence[Axes], shape: Shape | None, sizes: Mapping[str, int]) -> bool:
    """Whether a shape does so with its first or its last two axes exchanged."""
    if shape is None or len(shape) < 2:
        return False
    return any(fits(forms, other, sizes) for other in ((shape[1], shape[0], *shape[2:]), (*shape[:-2], shape[-1], shape[-2])))


def in_words(forms: Sequence[Axes], sizes: Mapping[str, int]) -> str:
    """``[n, 3*d = 2304]``, or several of them."""

    def word(axis: int | str) -> str:
        return str(axis) if isinstance(axis, int) or (size := sized(axis, sizes)) is None else f"{axis} = {size}"

    return " or ".join(f"[{', '.join(map(word, axes))}]" for axes in forms)
