"""SkyReels-V2: diffusion forcing, where every latent frame has its own time and a copy of the scheduler; and without it, as Wan does."""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

PIPELINES = (
    "SkyReelsV2DiffusionForcingPipeline",
    "SkyReelsV2DiffusionForcingImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
)

family = Family(
    name="skyreels_df",
    pipelines=PIPELINES,
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("blocks", "block", ("hidden_states", "encoder_hidden_states", "temb")),),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    prediction="flow",
    copied_scheduler=True,
    latents="bcfhw",
    packages={"ftfy": PIPELINES},
    tiny="diffgraft_pipelines.tiny.skyreels:make",
)

PLAIN = ("SkyReelsV2Pipeline", "SkyReelsV2ImageToVideoPipeline")

plain = replace(
    family,
    name="skyreels",
    pipelines=PLAIN,
    conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
    copied_scheduler=False,
    appended="channels",  # image to video: mask and start picture
    packages={"ftfy": PLAIN},
)
