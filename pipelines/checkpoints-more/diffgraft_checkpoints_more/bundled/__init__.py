"""Real checkpoints that ship with this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffgraft import Bundled
from diffgraft_checkpoints import bundled as first

HERE = Path(__file__).parent

emoji_dit = Bundled(name="emoji-dit", path=str(HERE / "emoji-dit"), judge=first.emoji_sd.judge, guidance_scale=2.0)
"""Class labels instead of prompts: the objects of emoji-sd, by number or by name."""

emoji_edit = Bundled(
    name="emoji-edit",
    path=str(HERE / "emoji-edit"),
    prompts=(  # edits of the start picture, a small carrot on the right of a purple background
        "make the background blue",
        "move it to the left",
        "make it bigger",
        "turn the carrot into a heart",
        "make the background red",
        "move it to the top",
        "turn the carrot into an elephant",
        "make the background orange",
        "move it to the bottom",
        "turn the carrot into a sunflower",
        "make the background yellow",
        "move it to the center",
        "turn the carrot into a cactus",
        "make the background green",
        "turn the carrot into a gift",
        "make the background gray",
        "turn the carrot into a basketball",
        "make the background pink",
        "turn the carrot into a star",
        "turn the carrot into an apple",
        "turn the carrot into a robot",
        "turn the carrot into a pizza",
        "turn the carrot into a car",
        "turn the carrot into an owl",
    ),
    judge="diffgraft_checkpoints.emoji.edit_judge:load_bundled",
    guidance_scale=2.0,
    call={"image_guidance_scale": 1.5},
    pictures={"image": str(HERE / "emoji-edit" / "start.png")},
)
"""Instructions instead of captions. A call without a picture edits the start picture."""

emoji_pixel = Bundled(name="emoji-pixel", path=str(HERE / "emoji-pixel"), steps=100)
"""Neither prompts nor classes; so there is nothing that a judge could hold a picture against."""

emoji_sr = Bundled(
    name="emoji-sr",
    path=str(HERE / "emoji-sr"),
    prompts=("a small carrot on the right on a purple background",),
    judge=first.emoji_sd.judge,
    guidance_scale=1.0,
    call={"noise_level": 10},
    pictures={"image": str(HERE / "emoji-sr" / "start.png")},
)
"""A 16 x 16 picture four times as large. A call without a picture enlarges the start picture, which the prompt describes."""

emoji_flux_4step = replace(
    first.emoji_flux,
    name="emoji-flux-4step",
    lora=str(HERE / "emoji-flux-4step"),
    steps=4,
    call={**first.emoji_flux.call, "true_cfg_scale": 1.0},
)
"""emoji-flux with a LoRA that was distilled from it: four steps without guidance."""

emoji_wan_4step = replace(first.emoji_wan, name="emoji-wan-4step", lora=str(HERE / "emoji-wan-4step"), steps=4, guidance_scale=1.0)
"""emoji-wan with a LoRA that learned its key points: four steps without guidance. `accvideo` with steps=4 runs the levels it learned."""
