"""Real checkpoints that ship with this package."""

from __future__ import annotations

from pathlib import Path

from diffgraft import Bundled
from diffgraft_checkpoints.bundled import emoji_sd

HERE = Path(__file__).parent

emoji_dit = Bundled(name="emoji-dit", path=str(HERE / "emoji-dit"), judge=emoji_sd.judge, guidance_scale=1.5)
"""Class labels instead of prompts: the objects of emoji-sd, by number or by name."""
