"""Classes of diffusers that were looked at and have no family, and why."""

from __future__ import annotations

GUIDER = "guides by a part of its own (`guider`), which holds the scale and says which branches run: the scale is no argument of its call"
KEPT = "the first step leaves keys and values for all later ones, which do not see what they were made of: no step can be left out"
FRAME = "a start picture stands in the place of the first frame, and the scheduler steps the frames behind it alone"
PARTS = "makes a video part by part, each from noise and with the end of the one before: one call is several samplings"
LAST = "its latents have the channels last, [rows, frames, height, width, channels], which no layout of a family says"
WEIGHTS = "steps what it makes of the sample and the output with weights of its own, and tells its transformer a sample scaled by others"
PINNED = (
    "puts the frames to go by back into each step's guided prediction, token by token at times of their own: what plugins make of the "
    "prediction or the sample would move them, or be lost there"
)
TOKENS = "has each token step from a time of its own: what its scheduler steps are tokens, with the prediction turned round"

REFUSED = {
    "ChromaInpaintPipeline": "asks its transformer for `guidance_embeds`, which it does not have: it cannot run in diffusers 0.42",
    "Cosmos2TextToImagePipeline": "steps what it makes of the sample and the output with weights of its own, gives its transformer the "
    "sample scaled and a time that is no multiple of the scheduler's, and guides by cond + scale (cond - uncond); needs `cosmos_guardrail`",
    "Ideogram4Pipeline": "each branch has a transformer of its own, and a sample of its own size: the conditional one's begins with zeros "
    "for the text's places; how strong guidance is, is said step by step",
    "LTXConditionPipeline": TOKENS,
    "ConsisIDPipeline": "needs `opencv`; without it diffusers has a stand-in that cannot be made, so nothing of it could be tried here",
    "CosmosTextToWorldPipeline": "calls `scheduler.step` twice a step, for the clean samples of both branches, then with the guided one",
    "CosmosVideoToWorldPipeline": "calls `scheduler.step` twice a step, and gives each branch noised frames of its own in the sample",
    "EasyAnimateControlPipeline": "asks its own `encode_prompt` for a `text_encoder_index` that it does not take: it cannot run in 0.42",
    "PRXPixelPipeline": "makes what it steps of the sample and the clean one that its transformer tells, with a weight that is cut off",
    "VisualClozePipeline": "calls two other pipelines, one after the other; the first, VisualClozeGenerationPipeline, is known",
    **dict.fromkeys(("SanaSprintPipeline", "SanaSprintImg2ImgPipeline"), WEIGHTS),
    **dict.fromkeys(("Kandinsky5T2IPipeline", "Kandinsky5I2IPipeline", "Kandinsky5T2VPipeline"), LAST),
    "Kandinsky5I2VPipeline": f"{LAST}; it steps all frames but the first",
    **dict.fromkeys(("Flux2KleinKVPipeline", "QwenImage21Pipeline"), KEPT),
    **dict.fromkeys(("SanaImageToVideoPipeline", "HunyuanVideoImageToVideoPipeline"), FRAME),
    **dict.fromkeys(("HunyuanVideoFramepackPipeline", "WanAnimatePipeline"), PARTS),
    **dict.fromkeys(("AnyFlowFARPipeline", "HeliosPipeline", "HeliosPyramidPipeline", "LTXI2VLongMultiPromptPipeline"), PARTS),
    "Kandinsky6TI2VAPipeline": f"{LAST}, of a picture that has a sound beside it",
    "Kandinsky6SRPipeline": "enlarges a video tile by tile, each from noise: one call is several samplings",
    "AnyFlowPipeline": "its transformer is told where a step ends too, and gives the mean velocity to there: a step that a plugin leaves "
    "out, or moves, would end elsewhere than was told",
    "BriaFibo2Pipeline": "the text's tokens stand in front of the picture's in the stream of its blocks, or behind them where the prompts "
    "of a batch are of different lengths; a family says one of them",
    **dict.fromkeys(
        ("DreamLitePipeline", "DreamLiteMobilePipeline"),
        "the picture to go by stands beside the noisy sample, on the axis of its width",
    ),
    **dict.fromkeys(
        ("JoyImageEditPipeline", "JoyImageEditPlusPipeline"),
        "the pictures to go by are in what the scheduler steps, and are put back into it before every step",
    ),
    "GlmImagePipeline": "of each picture that it is given its transformer makes keys and values in a forward of its own before the first "
    "step, which is none of guidance's branches, though it is taken for one (without pictures it would fit)",
    **dict.fromkeys(("LTX2ConditionPipeline", "LTX2InContextPipeline"), PINNED),
    "LTX2HDRPipeline": f"{PINNED}; steps its sound by zeros and throws it away",
    **dict.fromkeys(
        ("LTX2DFRPipeline", "LTX2DFRTemporalRefinePipeline"),
        f"{PINNED}; a step may be several forwards, one a tile, and the refiner samples tile by tile",
    ),
    "Cosmos3OmniPipeline": "denoises picture, sound and a robot's actions in one forward, to a prediction of each, each by a scheduler",
    "SanaWMPipeline": TOKENS,
    "LDMPipeline": "is the example that shows how to write one (`docs/howto/family.md`)",
    "DiffusionPipeline": "is what the others are made of",
    **dict.fromkeys(("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline", "HunyuanImagePipeline"), GUIDER),
    **dict.fromkeys(("HunyuanImageRefinerPipeline", "MotifVideoPipeline", "MotifVideoImage2VideoPipeline"), GUIDER),
    **dict.fromkeys(
        ("Cosmos2VideoToWorldPipeline", "Cosmos2_5_PredictBasePipeline", "Cosmos2_5_TransferPipeline"),
        "puts given frames into the sample and into the prediction in every step, and tells its transformer a time for each frame",
    ),
    "LattePipeline": "its blocks alternate between two lists (in space, in time); a family runs one list after the other",
    "MochiPipeline": "its scheduler itself runs from 0 up (`invert_sigmas`): its timesteps, its sigmas and the sign of its steps, which "
    "every plugin that reads or makes a schedule takes to fall",
    "OmniGenPipeline": "its guidance is never off, and the pictures that it is given are placed by the number of the row in the batch of "
    "all branches, which no branch alone has; cannot be made without torchvision, so nothing of it could be tried here",
    "ZImageOmniPipeline": "a row of what its transformer gets is a list of pictures of several sizes, of which the last one is the sample, "
    "and its blocks hold text, pictures and sample in an order that is another in each row",
    # older pipelines ------------------------------------------------------------------------------------------------------------------
    "CycleDiffusionPipeline": "one batch holds the branches of two samples, of the start picture's and of its own, and it steps one",
    "KarrasVePipeline": "asks its U-Net a second time after each step and corrects the step; its scheduler steps between two noise levels",
    "RePaintPipeline": "its schedule goes back up again and again, by a method of its scheduler other than `step`",
    "ScoreSdeVePipeline": "never calls `scheduler.step` (`step_correct` and `step_pred` instead)",
    "SemanticStableDiffusionPipeline": "a branch runs for each thing to change, as many as the call says, and they combine by thresholds",
    "StableDiffusionAttendAndExcitePipeline": "before a step it asks its U-Net, with gradients, as often as a loss on its attention wants",
    "StableDiffusionGLIGENTextImagePipeline": "two calls of both branches a step, with the boxes and without; it drops a half of each",
    "StableDiffusionLatentUpscalePipeline": "makes what it steps of the sample and the output with weights of its own, without "
    "the last channel, and tells its U-Net the logarithm of the noise level",
    "StableDiffusionPanoramaPipeline": "denoises windows of the latents, each by steps of the scheduler of its own, and averages them",
    "StableDiffusionParadigmsPipeline": "computes many steps at once and never calls `scheduler.step`",
    "StableDiffusionPix2PixZeroPipeline": "asks its U-Net with gradients in each step, for what its attention was in a run before",
    "StableDiffusionSAGPipeline": "asks its U-Net again in each step about other latents, blurred where its attention was (`sag_scale`)",
    "UniDiffuserPipeline": "its U-Net takes picture, picture embedding and text as three samples at two times",
    "VersatileDiffusionDualGuidedPipeline": "its attention takes no `encoder_attention_mask`, which the blocks give it: it cannot run in "
    "diffusers 0.42",
    **dict.fromkeys(
        ("TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline"),
        "goes through parts of one schedule three times, with the first frame, then with all, noise in between",
    ),
    **dict.fromkeys(
        ("StableDiffusionControlNetXSPipeline", "StableDiffusionXLControlNetXSPipeline"),
        "two streams, of the U-Net and of its control, flow through each block, and up blocks write into the tensor that they are given",
    ),
    **dict.fromkeys(
        ("Kandinsky3Pipeline", "Kandinsky3Img2ImgPipeline"),
        "a skip of its U-Net comes to an up block in its stream instead of beside it, there is no mid block, and layers are of other kinds",
    ),
    **dict.fromkeys(
        ("TextToVideoSDPipeline", "VideoToVideoSDPipeline", "I2VGenXLPipeline"),
        "steps each frame as a row of its own, though its U-Net has a row for each video",
    ),
    **dict.fromkeys(
        ("MarigoldDepthPipeline", "MarigoldIntrinsicsPipeline", "MarigoldNormalsPipeline"),
        "its U-Net is given the picture first and the noisy sample behind it; a family knows what is put behind the sample. Members of an "
        "ensemble are sampled one after the other in one call",
    ),
    **dict.fromkeys(
        ("StableCascadeDecoderPipeline", "StableCascadePriorPipeline", "WuerstchenDecoderPipeline", "WuerstchenPriorPipeline"),
        "its blocks lie in lists of lists, or in one list, in threes that take different things: there are none to name",
    ),
    **dict.fromkeys(
        ("BlipDiffusionPipeline", "BlipDiffusionControlNetPipeline"),
        "its Q-Former asks transformers for methods that version 5 does not have: it cannot run there",
    ),
    **dict.fromkeys(
        ("AmusedImg2ImgPipeline", "AmusedInpaintPipeline", "AmusedPipeline", "VQDiffusionPipeline"),
        "its sample is numbers of a code book, and its prediction their odds: nothing to add noise to or to guide along a path",
    ),
    **dict.fromkeys(
        ("UnCLIPPipeline", "UnCLIPImageVariationPipeline"),
        "denoises in turn with two networks under two schedulers, none of which it calls `scheduler`, and which are told each next time",
    ),
    # what makes no pictures -----------------------------------------------------------------------------------------------------------
    **dict.fromkeys(
        ("LTXLatentUpsamplePipeline", "LTX2LatentUpsamplePipeline", "FluxPriorReduxPipeline", "LTX2VideoDiffusionDecodePipeline"),
        "no denoising: one pass of a network",
    ),
    **dict.fromkeys(
        (
            "KandinskyCombinedPipeline",
            "KandinskyImg2ImgCombinedPipeline",
            "KandinskyInpaintCombinedPipeline",
            "KandinskyV22CombinedPipeline",
            "KandinskyV22Img2ImgCombinedPipeline",
            "KandinskyV22InpaintCombinedPipeline",
            "StableCascadeCombinedPipeline",
            "VersatileDiffusionPipeline",
            "WuerstchenCombinedPipeline",
        ),
        "only calls other pipelines, each of which has its own line here: what is on those works in it",
    ),
    **dict.fromkeys(
        (
            "KandinskyPriorPipeline",
            "KandinskyV22PriorEmb2EmbPipeline",
            "KandinskyV22PriorPipeline",
            "ShapEImg2ImgPipeline",
            "ShapEPipeline",
        ),
        "denoises an embedding, or the weights of a shape, not latents: no layout of a family",
    ),
    **dict.fromkeys(
        (
            "AceStepPipeline",
            "AudioLDM2Pipeline",
            "AudioLDMPipeline",
            "DanceDiffusionPipeline",
            "LongCatAudioDiTPipeline",
            "MusicLDMPipeline",
            "StableAudio3AudioToAudioPipeline",
            "StableAudio3InpaintPipeline",
            "StableAudio3Pipeline",
            "StableAudioPipeline",
        ),
        "makes sound, and families are of pictures and videos",
    ),
    **dict.fromkeys(("DiffusionGemmaPipeline", "LLaDA2Pipeline"), "writes text"),
    "RFD4ProteinaPipeline": "makes molecules",
}
