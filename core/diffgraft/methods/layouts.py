"""Weights that others published, declared as data: which keys a file has, in which shapes. What of a file is otherwise is told all at once.

    Layout(
        {"connector.latents": ("n", "d"), "connector.blocks.{i}.attn.in_proj_weight": ("3*d", "d")},
        counts={"i": 6}, prefixes=("net.",), renames={".query.": ".to_q."}, ignored=("*.num_batches_tracked",), small={"n": 4, "d": 8},
    )

``{i}`` in a key stands for 0, 1, 2...: as many as ``counts`` says, else as many as the file has, without gaps, and equally many wherever
the same letter stands behind the same numbers. Letters in shapes: ``diffgraft.methods.axes``.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cached_property
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from diffgraft.installed.errors import ArtefactMismatch, BrokenPlugin, ConfigError
from diffgraft.installed.foreign import plain
from diffgraft.methods.axes import AXIS, Axes, Shape, bind, fits, in_words, letters_of, sized, turned
from diffgraft.methods.schema import name_of

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
MOST = 20_000
"""Keys that a model may have."""
LONGEST = 200
"""Characters of a file's key that are looked at and shown."""
PAIRS = 10_000
"""Pairs of a missing and an unexpected key that are held against each other for their likeness."""
RENAMED = 0.6
"""Likeness from which on one looks like the other, renamed."""

Count = Callable[[str, tuple[int, ...]], Collection[int]]
"""(letter of a ``{i}``, the numbers before it) -> its numbers."""


class Spec(NamedTuple):
    """What a file says of a key. What is no tensor has no shape, and its type in the place of a dtype."""

    shape: Shape | None
    dtype: str

    def __str__(self) -> str:
        return f"[{', '.join(map(str, self.shape))}]" if self.shape is not None else f"no tensor ({plain(self.dtype)[:LONGEST]})"


@dataclass(frozen=True)
class Comparison:
    """A file, held against a layout.

    sizes    the letters' numbers, and how many there are of each ``{i}`` that stands behind no other
    used     key -> the same in the file, without those that have a fault
    shapes   what shapes these are given
    faults   group ("missing", "unexpected", "given twice", "wrong shape", "wrong dtype") -> key -> what is wrong
    ignored  keys of the file that nobody needs
    found    keys of the file, without those that the layout ignores
    near     how many of them are expected, or look like one that is
    front    what stands before all unexpected keys, and without which most of them would fit
    """

    sizes: dict[str, int]
    used: dict[str, str]
    shapes: dict[str, Shape]
    faults: dict[str, dict[str, str]]
    ignored: list[str]
    found: int
    near: int
    front: str

    @property
    def whole(self) -> bool:
        """Whether it is as the layout says."""
        return not any(self.faults.values())

    def ensure(self, plugin: str, what: str) -> None:
        """Raises ArtefactMismatch with every fault; with few of them where ``what`` is something else altogether."""
        missing, unexpected = self.faults["missing"], self.faults["unexpected"]
        if not self.whole and 10 * self.near < max(self.found, len(self.used) + len(missing)):
            raise ArtefactMismatch(
                f"{plugin}: {what}: this looks like no file of {plugin}: {self.near} of {self.found} keys fit. It lacks "
                f"{some(missing)}; it has {some(unexpected)}"
            )
        if not self.whole:
            lines = [f"{plugin}: {what} is not as {plugin} reads it; {len(self.used)} of {self.found} keys fit"]
            lines[0] += f"; without {shown(self.front)!r} in front of them others would" if self.front else ""
            for group, keys in self.faults.items():
                lines += [f"  {group} ({len(keys)}):"] * bool(keys) + [f"    {key}: {words}" for key, words in keys.items()]
            raise ArtefactMismatch("\n".join(lines))


@dataclass(frozen=True, eq=False)
class Layout:
    """The keys of a published file.

    keys      key, with ``{i}`` for numbers -> its axes; in them ``{i}`` too ("c{i}")
    counts    letter of a ``{i}`` -> how many there are, or which
    prefixes  what may stand before keys ("net.")
    renames   part of a key, as it was published once -> as it is in ``keys``; for keys that have no place as they stand
    reshapes  key -> axes in which it is published too: the same numbers in the same order
    optional  keys that may be missing, written as in ``keys``, with ``*`` for any part
    ignored   keys of the file that nobody needs, likewise
    dtypes    keys, likewise -> the dtypes that they may have; all others are floating
    inside    names under which a pickled file may keep its state dict ("state_dict")
    small     numbers for the letters, also of each ``{i}`` that is not counted: those of a small file, for tests
    """

    keys: Mapping[str, Axes]
    counts: Mapping[str, int | Collection[int]] = field(default_factory=dict)
    prefixes: tuple[str, ...] = ()
    renames: Mapping[str, str] = field(default_factory=dict)
    reshapes: Mapping[str, Axes] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()
    dtypes: Mapping[str, tuple[torch.dtype, ...]] = field(default_factory=dict)
    inside: tuple[str, ...] = ()
    small: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        indices = {letter for key in self.keys for letter in indices_of(key)}
        wrong = [f"{name!r} names no key" for name in self.reshapes if name not in self.keys]
        patterns = (*self.optional, *self.dtypes)
        wrong += [f"{name!r} names no key" for name in patterns if not any(fnmatchcase(key, name) for key in self.keys)]
        wrong += [f"{{{letter}}} is counted, but in no key" for letter in self.counts if letter not in indices]
        for key, axes in [*self.keys.items(), *self.reshapes.items()]:
            at = dict.fromkeys(indices_of(key), 0)
            bad = [axis for axis in map(str, axes) if not {*indices_of(axis)} <= {*at} or not AXIS.fullmatch(axis.format(**at))]
            wrong += [f"{key}: {axis!r} is no axis" for axis in bad]
            wrong += [f"{key}: {axis!r} is no axis, but numbers keys" for axis in axes if axis in indices]
        short = [(key, axes) for key, axes in self.reshapes.items() if letters_of(self.keys.get(key, ())) - letters_of(axes)]
        wrong += [f"{key}: not all letters are in {axes}" for key, axes in short]
        if wrong:
            raise BrokenPlugin(f"Layout: {'; '.join(wrong)}")

    # a file -------------------------------------------------------------------------------------------------------------------------

    def compare(self, file: Mapping[str, Spec]) -> Comparison:
        """Hold what a file says of its keys against this; no tensor is read."""
        places = {key: next(filter(None, map(self._place, self._forms(key))), None) for key in file}
        count = self._count(place for place in places.values() if place)
        expected: dict[str, tuple[str, list[Axes]]] = {}
        for name, key, forms in itertools.islice(self._expected(count), min(MOST, 10 * (len(file) + len(self.keys)))):
            expected.setdefault(name, (key, forms))
        here: dict[str, str] = {}
        twice: dict[str, str] = {}
        strange: list[str] = []
        ignored: list[str] = []
        for key, place in places.items():
            name = place[0].format(**place[1]) if place else ""
            if name in here:
                twice[shown(key)] = f"is {name}, and so is {shown(here[name])}"
            elif name in expected:
                here[name] = key
            else:
                spare = any(fnmatchcase(form, pattern) for form in self._forms(key) for pattern in self.ignored)
                (ignored if spare else strange).append(key)
        shapes = {name: (expected[name][1], shape) for name, key in here.items() if (shape := file[key].shape) is not None}
        sizes = bind(shapes.values())
        good = {name for name, (forms, shape) in shapes.items() if given(forms, shape, sizes) is not None}
        sizes = bind(shapes[name] for name in shapes if name in good)
        dtypes = {name: [*map(name_of, self._dtypes(expected[name][0]))] for name in good}
        used = {name: key for name, key in here.items() if name in good and file[key].dtype in dtypes[name]}
        lacking = {name: forms for name, (key, forms) in expected.items() if name not in here and not self._may_miss(key)}
        renamed = likely(lacking, {key: file[key].shape for key in strange}, sizes)
        was = {key: name for name, key in renamed.items()}
        front = in_front_of(strange)
        behind = sum(self._place(key[len(front) :]) is not None for key in strange if key.startswith(front))
        return Comparison(
            sizes={**sizes, **{letter: len(count(letter, ())) for key in self.keys for letter in indices_of(key)[:1]}},
            used=used,
            shapes={name: given(*shapes[name], sizes) or () for name in used},
            faults={
                "missing": {n: in_words(forms, sizes) + hint("it looks renamed to", renamed.get(n)) for n, forms in lacking.items()},
                "unexpected": {shown(key): str(file[key]) + hint("it looks like", was.get(key)) for key in strange},
                "given twice": twice,
                "wrong shape": {n: misfit(expected[n][1], file[key], sizes) for n, key in here.items() if n not in good},
                "wrong dtype": {n: f"is {file[here[n]].dtype}, not {' or '.join(dtypes[n])}" for n in good - used.keys()},
            },
            ignored=[*map(shown, ignored)],
            found=len(here) + len(twice) + len(strange),
            near=len(here) + max(len(renamed), behind),
            front=front if 2 * behind > len(strange) else "",
        )

    def synthetic(
        self, sizes: Mapping[str, int] | None = None, seed: int = 0, path: str | os.PathLike[str] | None = None
    ) -> dict[str, Tensor]:
        """A state dict with the published keys and small random numbers, for tests; also written to ``path`` where that is given.

        Args:
            sizes: of each letter, also of a ``{i}`` that is not counted (default: ``small``).

        Raises:
            ConfigError: a letter has none.
        """
        known = self.small if sizes is None else sizes
        needed = {letter for key in self.keys for letter in indices_of(key)} - self.counts.keys()
        if not (lacking := needed - known.keys()):
            listed = [*self._expected(lambda letter, before: self._declared(letter) or range(known[letter]))]
            lacking = {letter for _, _, (axes, *_) in listed for letter in letters_of(axes)} - known.keys()
        if lacking:
            raise ConfigError(f"a synthetic file needs a size for {', '.join(sorted(lacking))}")
        generator = torch.Generator().manual_seed(seed)
        made = {}
        for name, key, (axes, *_) in listed:
            values = 0.02 * torch.randn([sized(axis, known) or 0 for axis in axes], generator=generator)
            made[name] = values.to(self._dtypes(key)[0])
        if path is not None:
            save_file(made, path) if Path(path).suffix == ".safetensors" else torch.save(made, path)
        return made

    # keys ---------------------------------------------------------------------------------------------------------------------------

    @cached_property
    def _skeletons(self) -> dict[str, list[tuple[str, re.Pattern[str]]]]:
        """Keys by what is left without numbers, so that a file's key is held against one or two of them."""
        found = defaultdict(list)
        for key in self.keys:
            pattern = re.escape(key)
            for letter in indices_of(key):
                hole = re.escape(f"{{{letter}}}")
                pattern = pattern.replace(hole, rf"(?P<{letter}>0|[1-9]\d{{0,5}})", 1).replace(hole, f"(?P={letter})")
            found[skeleton(re.sub(r"\{\w+\}", "0", key))].append((key, re.compile(pattern, re.ASCII)))
        return dict(found)

    def _place(self, name: str) -> tuple[str, dict[str, int]] | None:
        """(the key of ``keys``, its numbers) that a name is, or None."""
        for key, pattern in self._skeletons.get(skeleton(name), ()):
            if match := pattern.fullmatch(name):
                return key, {letter: int(number) for letter, number in match.groupdict().items()}
        return None

    def _forms(self, key: str) -> Iterator[str]:
        """What a file's key may stand for, likeliest first."""
        bare = [key, *(key[len(prefix) :] for prefix in self.prefixes if key.startswith(prefix))] if len(key) <= LONGEST else []
        yield from bare
        for name in bare:
            for old, new in self.renames.items():
                name = name.replace(old, new)
            yield name

    def _expected(self, count: Count) -> Iterator[tuple[str, str, list[Axes]]]:
        """(name, key of ``keys``, its axes and those in which it is published too)."""

        def numbers(letters: list[str], before: tuple[int, ...] = ()) -> Iterator[tuple[int, ...]]:
            if len(before) == len(letters):
                yield before
            else:
                for number in count(letters[len(before)], before):
                    yield from numbers(letters, (*before, number))

        for key, axes in self.keys.items():
            forms = [axes, *([self.reshapes[key]] if key in self.reshapes else [])]
            for chosen in numbers(indices_of(key)):
                at = dict(zip(indices_of(key), chosen, strict=True))
                yield key.format(**at), key, [tuple(a.format(**at) if isinstance(a, str) else a for a in form) for form in forms]

    def _count(self, places: Iterable[tuple[str, dict[str, int]]]) -> Count:
        """Counting as a file does. At least half of 0, 1, ... must be there up to the last: who writes 999999 into one key does not make us
        look for a million."""
        seen: dict[tuple[str, tuple[int, ...]], set[int]] = defaultdict(set)
        for _, at in places:
            for i, (letter, number) in enumerate(at.items()):
                seen[letter, tuple(at.values())[:i]].add(number)
        ends = {
            place: max((number + 1 for have, number in enumerate(sorted(numbers), 1) if number < 2 * have), default=1)
            for place, numbers in seen.items()
        }
        return lambda letter, before: self._declared(letter) or range(ends.get((letter, before), 1))

    def _declared(self, letter: str) -> Collection[int] | None:
        count = self.counts.get(letter)
        return range(count) if isinstance(count, int) else count

    def _may_miss(self, key: str) -> bool:
        return any(fnmatchcase(key, name) for name in self.optional)

    def _dtypes(self, key: str) -> tuple[torch.dtype, ...]:
        return next((dtypes for name, dtypes in self.dtypes.items() if fnmatchcase(key, name)), FLOATS)


def indices_of(key: str) -> list[str]:
    """The letters of a key's numbers, each once."""
    return list(dict.fromkeys(re.findall(r"\{(\w+)\}", key)))


def skeleton(name: str) -> str:
    return re.sub(r"\d+", "#", name, flags=re.ASCII)


def given(forms: Sequence[Axes], shape: Shape, sizes: Mapping[str, int]) -> Shape | None:
    """The shape in which a plugin gets a tensor of this one: the first of ``forms``. None where it does not fit."""
    if fits(forms[:1], shape, sizes):
        return shape
    wanted = tuple(sized(axis, sizes) or 0 for axis in forms[0])
    return wanted if fits(forms[1:], shape, sizes) and prod(wanted) == prod(shape) else None


def in_front_of(keys: list[str]) -> str:
    """The dotted parts with which all of these begin."""
    first, last = min(keys, default="").split("."), max(keys, default="").split(".")
    same = itertools.takewhile(lambda parts: parts[0] == parts[1], zip(first[:-1], last, strict=False))
    return "".join(f"{part}." for part, _ in same)


# words --------------------------------------------------------------------------------------------------------------------------------


def shown(key: str) -> str:
    return plain(key)[:LONGEST]


def some(keys: Mapping[str, str]) -> str:
    return ", ".join(itertools.islice(keys, 3)) + ("..." if len(keys) > 3 else "") if keys else "nothing"


def hint(words: str, key: str | None) -> str:
    return "" if key is None else f"; {words} {shown(key)}"


def misfit(forms: Sequence[Axes], spec: Spec, sizes: Mapping[str, int]) -> str:
    return f"is {spec}, not {in_words(forms, sizes)}{'; it looks transposed' if turned(forms, spec.shape, sizes) else ''}"


def likely(missing: Mapping[str, Sequence[Axes]], unexpected: Mapping[str, Shape | None], sizes: Mapping[str, int]) -> dict[str, str]:
    """Missing key -> the unexpected one that is probably the same: its shape fits, perhaps transposed, and its name is alike. Of very many
    only those are seen that have something more, or less, in front."""
    ends = {tail: key for key in unexpected for tail in tails(key)}
    pairs = [(name, ends[tail]) for name in missing for tail in tails(name) if tail in ends and tail in (name, ends[tail])]
    if len(missing) * len(unexpected) <= PAIRS:
        pairs += itertools.product(missing, unexpected)
    ranked = []
    for name, key in dict.fromkeys(pairs):
        straight = fits(missing[name], unexpected[key], sizes)
        if len(key) <= LONGEST and (straight or turned(missing[name], unexpected[key], sizes)):
            alike = difflib.SequenceMatcher(None, name, key, autojunk=False).ratio()
            alike += name.endswith(key) or key.endswith(name)
            ranked += [(alike + 0.1 * straight, name, key)] * (alike >= RENAMED)
    found: dict[str, str] = {}
    taken: set[str] = set()
    for _, name, key in sorted(ranked, key=lambda one: -one[0]):
        if name not in found and key not in taken:
            found[name] = key
            taken.add(key)
    return found


def tails(name: str) -> list[str]:
    """A dotted name, and what is left of it without its first parts."""
    parts = name[:LONGEST].split(".")
    return [".".join(parts[i:]) for i in range(len(parts))]
