"""HunyuanVideo: text to video, and SkyReels V1's image to video (start picture behind the sample's channels).

HunyuanVideo's own image to video may step all frames but the first; see ``refused``.
"""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TAKES = ("hidden_states", "encoder_hidden_states", "temb", "attention_mask")
RETURNS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="hunyuan_video",
    pipelines=("HunyuanVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup("transformer_blocks", "double", TAKES, RETURNS),
        BlockGroup("single_transformer_blocks", "single", TAKES, RETURNS),
    ),
    guidance=Guidance("sequential", ("cond", "uncond"), "true_cfg_scale", requires=("negative_prompt", "negative_prompt_embeds")),
    conditioning=("encoder_hidden_states", "encoder_attention_mask", "pooled_projections", "guidance"),
    prediction="flow",
    latents="bcfhw",
    appended="channels",  # of a start picture
    tiny="diffgraft_pipelines.tiny.hunyuan_video:make",
)
