"""Rewards: how good pictures are, for plugins that search. Any callable will do.

    reward(images, prompts) -> one number a picture, the larger the better

``images`` are PIL pictures (for video lists of them, a frame each), ``prompts`` their captions. A knob takes the callable itself, the name
of one registered as an entry point in the group ``diffgraft.rewards`` ("emoji_judge"), or "package.module:attribute".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from diffgraft.errors import ConfigError, RewardError, nearest

REWARDS = "diffgraft.rewards"

Scores = Callable[[Sequence[Any], Sequence[str]], Sequence[float]]


@dataclass(frozen=True, eq=False)
class Reward:
    """A reward whose answers are checked; ``name`` is what errors and reports call it."""

    name: str
    scores: Scores

    def __call__(self, images: Sequence[Any], prompts: Sequence[str]) -> list[float]:
        """One finite number a picture.

        Raises:
            RewardError: an answer of another length, or one that is not a finite number. What it raises itself comes through.
        """
        answer = [float(each) for each in self.scores(images, prompts)]
        if len(answer) != len(images):
            raise RewardError(f"reward {self.name!r} gave {len(answer)} numbers for {len(images)} pictures: it must give one for each")
        for i, value in enumerate(answer):
            if not math.isfinite(value):
                raise RewardError(f"reward {self.name!r} gave {value} for picture {i} ({prompts[i]!r}): it must give finite numbers")
        return answer


def find_reward(knob: str, value: Any) -> Reward:
    """The reward that a knob's value stands for.

    Raises:
        ConfigError: it is neither callable, nor a registered name, nor "package.module:attribute" of something callable.
    """
    if isinstance(value, Reward):
        return value
    if callable(value):
        return Reward(getattr(value, "__name__", type(value).__name__), value)
    if not isinstance(value, str):
        raise ConfigError(f"{knob} = {value!r}: give a callable (images, prompts) -> numbers, or the name of one")
    registered = {entry.name: entry for entry in entry_points(group=REWARDS)}
    if value in registered:
        return Reward(value, registered[value].load())
    module, colon, attribute = value.partition(":")
    if not colon:
        known = ", ".join(sorted(registered)) or "none"
        raise ConfigError(f"{knob} = {value!r} is no reward{nearest(value, registered)}; installed: {known}; or give 'package.module:name'")
    try:
        found = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"{knob} = {value!r}: {error}") from error
    if not callable(found):
        raise ConfigError(f"{knob} = {value!r}: {type(found).__name__} is not callable")
    return Reward(value, found)
