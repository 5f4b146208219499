"""Pipelines with perturbed attention guidance: a further branch, the conditional one with attention that looks at nothing.

uncond + guidance_scale (cond - uncond) + pag_scale (cond - perturbed)
"""

from __future__ import annotations

from dataclasses import replace

from diffgraft import Family, Guidance

from diffgraft_pipelines.families import animatediff, hunyuan_dit, pixart, sd, sdxl
from diffgraft_pipelines.families import sana as flow
from diffgraft_pipelines.families import sd3 as without

ON = "do_perturbed_attention_guidance"
ORDER = ("uncond", "cond", "perturbed")


def _perturbed(family: Family, *pipelines: str) -> Family:
    guidance = Guidance("batched", ORDER, optional=(("perturbed", ON),), bound=True, active=family.guidance.active)
    return replace(family, name=f"{family.name}_pag", pipelines=pipelines, guidance=guidance, tiny="diffgraft_pipelines.tiny.pag:make")


stable = _perturbed(
    sd.family,
    "StableDiffusionPAGPipeline",
    "StableDiffusionPAGImg2ImgPipeline",
    "StableDiffusionPAGInpaintPipeline",
    "StableDiffusionControlNetPAGPipeline",
    "StableDiffusionControlNetPAGInpaintPipeline",
)
xl = _perturbed(
    sdxl.family,
    "StableDiffusionXLPAGPipeline",
    "StableDiffusionXLPAGImg2ImgPipeline",
    "StableDiffusionXLPAGInpaintPipeline",
    "StableDiffusionXLControlNetPAGPipeline",
    "StableDiffusionXLControlNetPAGImg2ImgPipeline",
)
sd3 = _perturbed(without.family, "StableDiffusion3PAGPipeline", "StableDiffusion3PAGImg2ImgPipeline")
sigma = _perturbed(pixart.family, "PixArtSigmaPAGPipeline")
moving = _perturbed(animatediff.family, "AnimateDiffPAGPipeline")
chinese = _perturbed(hunyuan_dit.family, "HunyuanDiTPAGPipeline")
sana = _perturbed(flow.family, "SanaPAGPipeline")
