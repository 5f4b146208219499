"""Tiny pipelines with perturbed attention guidance: those without it, asked for it."""

from __future__ import annotations

from collections.abc import Callable

from diffgraft import Tiny

from diffgraft_pipelines.tiny import _common as c
from diffgraft_pipelines.tiny import animatediff, hunyuan_dit, pixart, sana, sd, sd3, sdxl


def _perturbed(builder: Callable[[str], Tiny]) -> Callable[[str], Tiny]:
    def build(name: str) -> Tiny:
        tiny = builder(name)
        tiny.kwargs["pag_scale"] = 3.0
        return tiny

    return build


BUILDERS: dict[str, Callable[[str], Tiny]] = {
    "StableDiffusionPAGPipeline": sd._text,
    "StableDiffusionPAGImg2ImgPipeline": sd._image,
    "StableDiffusionPAGInpaintPipeline": sd._inpaint,
    "StableDiffusionControlNetPAGPipeline": sd._control,
    "StableDiffusionControlNetPAGInpaintPipeline": sd._control_inpaint,
    "StableDiffusionXLPAGPipeline": sdxl._pipeline,
    "StableDiffusionXLPAGImg2ImgPipeline": sdxl._image,
    "StableDiffusionXLPAGInpaintPipeline": sdxl._inpaint,
    "StableDiffusionXLControlNetPAGPipeline": sdxl._control,
    "StableDiffusionXLControlNetPAGImg2ImgPipeline": sdxl._control_image,
    "StableDiffusion3PAGPipeline": sd3._pipeline,
    "StableDiffusion3PAGImg2ImgPipeline": sd3._image,
    "PixArtSigmaPAGPipeline": pixart._pipeline,
    "AnimateDiffPAGPipeline": animatediff._text,
    "HunyuanDiTPAGPipeline": hunyuan_dit._pipeline,
    "SanaPAGPipeline": sana._pipeline,
}
make = c.maker({name: _perturbed(builder) for name, builder in BUILDERS.items()})
