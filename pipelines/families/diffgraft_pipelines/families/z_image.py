"""Z-Image: text, img2img, inpaint; text and inpaint with ControlNet."""

from __future__ import annotations

from diffgraft import BlockGroup, Family, Guidance

TENSORS = ("x", "freqs_cis")
RETURNS = ("x",)

family = Family(
    name="z_image",
    pipelines=(
        "ZImagePipeline",
        "ZImageImg2ImgPipeline",
        "ZImageInpaintPipeline",
        "ZImageControlNetPipeline",
        "ZImageControlNetInpaintPipeline",
    ),
    denoisers=("transformer",),
    kind="dit",
    blocks=(
        BlockGroup("noise_refiner", "noise_refiner", (*TENSORS, "adaln_input"), RETURNS),
        BlockGroup("context_refiner", "context_refiner", TENSORS, RETURNS, joined="alone"),
        BlockGroup("layers", "layer", (*TENSORS, "adaln_input"), RETURNS, joined="behind"),
    ),
    guidance=Guidance("batched", ("cond", "uncond"), over="cond", active="do_classifier_free_guidance"),
    sample="x",
    timestep="t",
    timestep_scale=-1 / 1000,
    timestep_offset=1.0,
    conditioning=("cap_feats",),
    prediction="flow",
    turned=True,
    listed=("x", "cap_feats"),
    tiny="diffgraft_pipelines.tiny.z_image:make",
)
