"""What the tests of the bundled checkpoints share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from diffgraft_checkpoints.emoji import scenes
from diffgraft_checkpoints.train import common


@pytest.fixture(scope="module")
def artwork() -> None:
    try:
        scenes.find_font()
    except scenes.ArtworkMissing as missing:
        pytest.skip(str(missing))


@pytest.fixture
def resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Trains emoji-`what` of `module` in two goes, interrupted in the third call of its function `drawing`, every step being saved; and
    again in one go, which gives the same `parts`. Returns the latter."""

    def run(module: ModuleType, what: str, train: Callable[[], Any], parts: Sequence[str], drawing: str = "draw_timesteps") -> Any:
        calls, drawn = itertools.count(), getattr(module, drawing)

        def draw(*arguments: Any) -> Any:
            if next(calls) == 2:
                raise KeyboardInterrupt
            return drawn(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(common, "SAVE_EVERY", 1)
            patch.setattr(module, drawing, draw)
            with pytest.raises(KeyboardInterrupt):
                train()
        with monkeypatch.context() as patch:
            patch.setattr(module, f"measure_{what}", lambda *arguments, **more: None)
            in_two_goes = train()
        for path in (tmp_path / "state").rglob(f"{what}.pt"):
            path.unlink()
        straight = train()
        for part in parts:
            for one, other in zip(getattr(straight, part).parameters(), getattr(in_two_goes, part).parameters(), strict=True):
                assert torch.equal(one, other)
        return straight

    return run
