"""Real checkpoints that ship with this package."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from diffgraft import Bundled

HERE = Path(__file__).parent

emoji_sd = Bundled(
    name="emoji-sd",
    path=str(HERE / "emoji-sd"),
    prompts=(  # held out of the training: the first of the fixed order in which `train` evaluates them
        "a small penguin in the center on a blue background",
        "a small crown at the top on a gray background",
        "a small turtle on the left on a purple background",
        "a big car at the bottom on a pink background",
        "a big donut on the left on a red background",
        "a big chick on the right on a gray background",
        "a big strawberry on the right on a red background",
        "a big snail in the center on a gray background",
        "a big house at the bottom on a purple background",
        "a small grapes at the top on a gray background",
        "a small balloon on the right on a gray background",
        "a big car on the left on a purple background",
        "a small carrot on the right on a purple background",
        "a big heart in the center on a gray background",
        "a small elephant on the right on a blue background",
        "a big penguin on the right on a pink background",
        "a small watermelon at the bottom on a green background",
        "a big bus at the bottom on a pink background",
        "a small butterfly on the right on a pink background",
        "a big cactus at the bottom on an orange background",
        "a small cactus on the right on a yellow background",
        "a small alien at the bottom on a yellow background",
        "a small chick on the right on a purple background",
        "a big umbrella on the left on a purple background",
    ),
    judge="diffgraft_checkpoints.emoji.judge:load_bundled",
    guidance_scale=2.0,
)

emoji_sd_small = replace(emoji_sd, name="emoji-sd-small", path=str(HERE / "emoji-sd-small"), guidance_scale=1.5)
"""A fifth of the compute for the same autoencoder, text encoder and prompts."""

emoji_sd_lcm = replace(emoji_sd, name="emoji-sd-lcm", lora=str(HERE / "emoji-sd-lcm"), steps=4, guidance_scale=1.0)
"""emoji-sd with a LoRA that was distilled from it: four steps without guidance."""

emoji_wan = Bundled(
    name="emoji-wan",
    path=str(HERE / "emoji-wan"),
    prompts=(  # held out of the training: the first of the fixed order in which `train` evaluates them
        "a small owl moves to the left on a yellow background",
        "a small snowman moves to the left on a blue background",
        "a small ladybug stays still on a red background",
        "a big rocket stays still on a red background",
        "a big ice cream moves up on a pink background",
        "a small turtle moves up on a gray background",
        "a big watermelon stays still on a blue background",
        "a big ladybug moves to the left on a purple background",
        "a big umbrella stays still on a green background",
        "a small watermelon moves to the left on a blue background",
        "a big soccer ball moves to the right on a purple background",
        "a big bus moves to the right on a gray background",
        "a big mushroom moves to the left on a blue background",
        "a big crown moves to the right on an orange background",
        "a big fox moves down on a blue background",
        "a big chick moves up on an orange background",
        "a big cherries moves to the left on an orange background",
        "a big sailboat moves down on a green background",
        "a small whale moves to the left on a green background",
        "a small palm tree moves to the left on a red background",
        "a big palm tree moves down on a red background",
        "a small alien stays still on a purple background",
        "a small turtle moves up on an orange background",
        "a big gift moves to the left on an orange background",
    ),
    judge="diffgraft_checkpoints.emoji.motion_judge:load_bundled",
    guidance_scale=2.0,
    call={"num_frames": 9, "height": 64, "width": 64, "max_sequence_length": 16},
)

emoji_flux = replace(
    emoji_sd,
    name="emoji-flux",
    path=str(HERE / "emoji-flux"),
    guidance_scale=None,  # Flux has a distilled one and a true one: it is the true one that this checkpoint was trained for
    call={"height": 64, "width": 64, "max_sequence_length": 20, "negative_prompt": "", "true_cfg_scale": 2.0},
)
"""The same prompts drawn by a flow transformer."""
