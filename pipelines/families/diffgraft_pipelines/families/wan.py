"""Wan 2.1 and 2.2: text to video, image to video, VACE; 2.2 has a second transformer for the low-noise steps; Lucy Edit, ChronoEdit. Of
the modular ones text to video.

VACE's own blocks (``vace_blocks``) run before the others and make what is added behind them, as a ControlNet does: they are no blocks here.
"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import BlockGroup, Family, Guidance

PIPELINES = ("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline", "WanVACEPipeline", "LucyEditPipeline")
MODULAR = ("WanModularPipeline", "Wan22ModularPipeline")

family = Family(
    name="wan",
    pipelines=PIPELINES,
    denoisers=("transformer", "transformer_2"),
    kind="dit",
    blocks=(BlockGroup("blocks", "block", ("hidden_states", "encoder_hidden_states", "temb")),),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance", second_scale="guidance_scale_2"),
    conditioning=("encoder_hidden_states", "encoder_hidden_states_image"),
    prediction="flow",
    latents="bcfhw",
    appended="channels",  # image to video: mask and start picture; Lucy: the video to be edited
    packages={"ftfy": PIPELINES[1:]},  # the standard text to video does without
    tiny="diffgraft_pipelines.tiny.wan:make",
)

modular = replace(family, name="wan_modular", pipelines=MODULAR, packages={"ftfy": MODULAR})

chronoedit = replace(
    family,  # its temporal reasoning, which is off by default, leaves two of the frames in mid-run
    name="chronoedit",
    pipelines=("ChronoEditPipeline",),
    denoisers=("transformer",),
    guidance=Guidance("sequential", ("cond", "uncond"), active="do_classifier_free_guidance"),
    packages={"ftfy": ("ChronoEditPipeline",)},
)
