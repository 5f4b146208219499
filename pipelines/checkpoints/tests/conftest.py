"""What the tests of the bundled checkpoints share."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train import common, unet
from torch import Tensor


@pytest.fixture(scope="module")
def artwork() -> None:
    try:
        scenes.find_font()
    except scenes.ArtworkMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Callable[[ModuleType, Callable[[], Any]], None]:
    """Runs a training of `module` that is interrupted in its third step, every step being saved."""

    def run(module: ModuleType, train: Callable[[], Any]) -> None:
        steps = itertools.count()

        def draw(count: int, generator: torch.Generator, progress: float) -> Tensor:
            if next(steps) == 2:
                raise KeyboardInterrupt
            return unet.draw_timesteps(count, generator, progress)

        with monkeypatch.context() as patch:
            patch.setattr(common, "SAVE_EVERY", 1)
            patch.setattr(module, "draw_timesteps", draw)
            with pytest.raises(KeyboardInterrupt):
                train()

    return run
