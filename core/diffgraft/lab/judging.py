"""Judges: does a picture show what its prompt asks for?"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from diffgraft.installed.errors import RewardError
from diffgraft.installed.family import Bundled
from diffgraft.installed.foreign import brief
from diffgraft.installed.offers import blamed
from diffgraft.lab.metrics import share
from diffgraft.lab.pictures import to_images
from diffgraft.lab.results import Verdicts
from diffgraft.methods.inputs import Pictures


class Judge(Protocol):
    """Says for each picture whether it shows what its prompt asks for: a list of verdicts for each thing (None: the prompt is silent)."""

    def score(self, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[bool | None]]: ...


def as_seen(frames: Pictures) -> Any:
    """A PIL picture, or the list of a video's frames."""
    images = to_images(frames)
    return images[0] if len(images) == 1 else images


def verdicts_of(judge: Judge, images: Sequence[Any], prompts: Sequence[str]) -> dict[str, list[bool | None]]:
    """What a judge says, if it is what a judge must say.

    Raises:
        RewardError: no mapping of names to lists with one verdict for each picture. What the judge raises itself comes through.
    """
    raw = judge.score(images, prompts)
    if not isinstance(raw, Mapping) or not all(isinstance(row, Sequence) and len(row) == len(images) for row in raw.values()):
        raise RewardError(
            f"judge {type(judge).__name__} gave {brief(raw)}: score(images, prompts) must give {{name: [one verdict for each of the "
            f"{len(images)} pictures]}}, each True, False or None"
        )
    return dict(raw)


def understood_by(judge: Judge, prompts: Sequence[str], pictures: Pictures) -> tuple[list[int], str | None]:
    """Which prompts the judge can read, and a note about those it cannot (it raises ValueError)."""
    understood, fault = [], None
    for i, prompt in enumerate(prompts):
        try:
            verdicts_of(judge, [as_seen(pictures[i])], [prompt])
            understood.append(i)
        except ValueError as error:
            fault = fault or str(error)
    missed = len(prompts) - len(understood)
    return understood, f"the judge does not understand {missed} of {len(prompts)} prompts: {fault}" if fault else None


def summarise(raw: dict[str, list[bool | None]], baseline: dict[str, list[bool | None]]) -> Verdicts:
    """Shares by field and for all fields together."""
    together, before = all_right(raw), all_right(baseline)
    shares = {name: found for name, row in raw.items() if (found := share(row)) is not None}
    if (everything := share(together)) is not None:
        shares["all"] = everything
    gained = sum(now and not then for now, then in zip(together, before, strict=True))
    lost = sum(then and not now for now, then in zip(together, before, strict=True))
    return Verdicts(shares, raw, gained, lost)


def all_right(raw: dict[str, list[bool | None]]) -> list[bool]:
    """By picture: nothing that the prompt asks for is wrong."""
    return [all(verdict is not False for verdict in verdicts) for verdicts in zip(*raw.values(), strict=True)]


def load_judge(bundled: Bundled) -> Judge | None:
    """The judge of a bundled checkpoint, or None when it has none.

    Raises:
        BrokenPlugin: it names one that cannot be loaded.
    """
    if bundled.judge is None:
        return None
    module, _, function = bundled.judge.partition(":")
    with blamed(f"the judge of {bundled.name!r} ({bundled.judge}) cannot be loaded"):
        judge: Judge = getattr(importlib.import_module(module), function)()
    return judge
