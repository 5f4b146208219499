"""Rewards: how good pictures are, for plugins that search. Any callable will do.

    reward(images, prompts) -> one number a picture, the larger the better

``images`` are PIL pictures (for video lists of them, a frame each), ``prompts`` their captions. A knob takes the callable itself, the name
of one registered as an entry point in the group ``diffgraft.methods.rewards`` ("emoji_judge"), or "package.module:attribute".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from diffgraft.installed.errors import RewardError
from diffgraft.installed.foreign import brief
from diffgraft.kernel.onion import active_run
from diffgraft.methods.named import find_callable

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
            RewardError: no list of numbers, one of another length, or a number that is not finite. What it raises itself comes through.
        """
        given = self.scores(images, prompts)
        try:
            answer = [float(each) for each in given]
        except (TypeError, ValueError) as error:
            raise RewardError(
                f"reward {self.name!r} gave {brief(given)}: it must give a list with one number for each of the {len(images)} pictures"
            ) from error
        if len(answer) != len(images):
            raise RewardError(f"reward {self.name!r} gave {len(answer)} numbers for {len(images)} pictures: it must give one for each")
        for i, value in enumerate(answer):
            if not math.isfinite(value):
                raise RewardError(f"reward {self.name!r} gave {value} for picture {i} ({prompts[i]!r}): it must give finite numbers")
        return answer


def find_reward(knob: str, value: Any) -> Reward:
    """The reward that a knob's value stands for.

    Raises:
        ConfigError: it is neither callable, nor a registered name, nor "package.module:attribute" of something callable, or takes no
            (images, prompts).
    """
    return value if isinstance(value, Reward) else Reward(*find_callable(knob, value, REWARDS, "reward", ("images", "prompts")))


def asking_pipeline() -> Any | None:
    """The pipeline whose run asks a reward, for one that judges by that model itself; None outside a run.

    It is running: ask a :func:`~diffgraft.methods.conditioning.sibling` of it.
    """
    run = active_run()
    return None if run is None else run.pipe
