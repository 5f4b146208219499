"""SkyReels-V2 diffusion forcing: every latent frame has its own time and a copy of the scheduler."""

from __future__ import annotations

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
