"""What the tests of the bundled checkpoints share."""

from __future__ import annotations

import pytest
from diffgraft_checkpoints.emoji import scenes


@pytest.fixture(scope="module")
def artwork() -> None:
    try:
        scenes.find_font()
    except scenes.ArtworkMissing as missing:
        pytest.skip(str(missing))
