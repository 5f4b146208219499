"""CogVideoX: text to video, image to video, video to video, a control video (Fun)."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("hidden_states", "encoder_hidden_states")

family = Family(
    name="cogvideox",
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
    ),
    denoisers=("transformer",),
    kind="dit",
    blocks=(BlockGroup("transformer_blocks", "block", (*TENSORS, "temb"), TENSORS),),
    guidance=Guidance("batched"),
    latents="bfchw",
    appended="channels",  # image to video: the start picture; Fun: the control video
    common=("image_rotary_emb",),
    one_each=True,
    tiny="diffgraft_pipelines.tiny.cogvideox:make",
)
