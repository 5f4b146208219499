"""What classes of diffusers 0.42 cannot do, so that no test asks it of them (pipelines/families/README.md says why)."""

ONE_PROMPT = (
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffControlNetPipeline",
    "CogVideoXImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    "WanVACEPipeline",
    "CogVideoXFunControlPipeline",
    "ZImageControlNetInpaintPipeline",
    "EasyAnimateInpaintPipeline",
    "LongCatImageEditPipeline",
    "LucyEditPipeline",
    "PRXPipeline",
    "QwenImageEditPlusPipeline",
    "QwenImageLayeredPipeline",
    "AnimateDiffSparseControlNetPipeline",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "PIAPipeline",
    "StableDiffusionDiffEditPipeline",
    "KandinskyInpaintPipeline",
    "KandinskyV22InpaintPipeline",
)

ONE_VIDEO = (
    "AnimateDiffPipeline",
    "AnimateDiffPAGPipeline",
    "AnimateDiffVideoToVideoPipeline",
    "AnimateDiffControlNetPipeline",
    "AnimateDiffSDXLPipeline",
    "AnimateDiffSparseControlNetPipeline",
    "AnimateDiffVideoToVideoControlNetPipeline",
    "PIAPipeline",
    "CogVideoXPipeline",
    "CogVideoXImageToVideoPipeline",
    "CogVideoXVideoToVideoPipeline",
    "CogVideoXFunControlPipeline",
    "WanVideoToVideoPipeline",
    "WanImageToVideoPipeline",
    "WanVACEPipeline",
    "SkyReelsV2ImageToVideoPipeline",
    "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    "ZImageControlNetInpaintPipeline",
    "AllegroPipeline",
    "ChronoEditPipeline",
    "EasyAnimateInpaintPipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
    "LucyEditPipeline",
    "PRXPipeline",
    "QwenImageLayeredPipeline",
)

ONE_AREA = (
    "HiDreamImagePipeline",
    "KandinskyV22ControlnetPipeline",
    "KandinskyV22ControlnetImg2ImgPipeline",
    "KandinskyV22Img2ImgPipeline",
    "KandinskyImg2ImgPipeline",
)
"""Whose size is its own, that of another argument, or a square's."""

FOUR_STEPS = ("StableDiffusionDiffEditPipeline", "PNDMPipeline")
"""Whose call brings something for each of its steps; whose scheduler makes none of two."""

PICTURE_EACH = (
    "StableDiffusionUpscalePipeline",
    "HunyuanSkyreelsImageToVideoPipeline",
    "StableDiffusionAdapterPipeline",
    "StableDiffusionXLAdapterPipeline",
    "IFImg2ImgPipeline",
    "IFInpaintingPipeline",
    "IFSuperResolutionPipeline",
    "IFImg2ImgSuperResolutionPipeline",
    "IFInpaintingSuperResolutionPipeline",
    "KandinskyImg2ImgPipeline",
)

EDITS = ("StableDiffusionInstructPix2PixPipeline", "StableDiffusionXLInstructPix2PixPipeline")

ALWAYS_GUIDED = ("WanModularPipeline", "Wan22ModularPipeline")
"""Which fail without guidance: their text encoder's block gives back what it has not made."""

GUIDED = ("HunyuanDiTPAGPipeline", *ALWAYS_GUIDED)
"""Which fail without guidance, or fail so while they perturb."""
