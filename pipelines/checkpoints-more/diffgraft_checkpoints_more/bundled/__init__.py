"""Real checkpoints that ship with this package."""

from __future__ import annotations

from pathlib import Path

from diffgraft import Bundled
from diffgraft_checkpoints import bundled as first

HERE = Path(__file__).parent

emoji_dit = Bundled(name="emoji-dit", path=str(HERE / "emoji-dit"), judge=first.emoji_sd.judge, guidance_scale=2.0)
"""Class labels instead of prompts: the objects of emoji-sd, by number or by name."""
