"""Real checkpoints that ship with this package."""

from __future__ import annotations

from pathlib import Path

from diffgraft.family import Bundled

emoji_sd = Bundled(
    name="emoji-sd",
    path=str(Path(__file__).parent / "emoji-sd"),
    prompts=(
        "a small dog face on the left on a blue background",
        "a large red apple in the center on a white background",
        "a small rocket at the top on a black background",
        "a large pizza on the right on a green background",
    ),
    judge="diffgraft_pipelines.emoji.judge:load_bundled",
)
