"""Tiny Flux pipelines: two double and two single blocks."""

from __future__ import annotations

from typing import Any

import diffusers
from diffgraft import Tiny
from diffusers import FlowMatchEulerDiscreteScheduler, FluxControlNetModel, FluxTransformer2DModel

from diffgraft_pipelines.tiny import _common as c

CHANNELS = 4
PACKED = 4 * CHANNELS  # two by two latent pixels make a token
MASK = 4 * 8 * 8  # the mask, at pixel resolution, folded into the same tokens


def _pipeline(name: str, in_channels: int = PACKED, **kwargs: object) -> Tiny:
    clip, t5 = c.clip_tokenizer(), c.t5_tokenizer()
    sizes = {
        "patch_size": 1,
        "num_layers": 2,
        "num_single_layers": 2,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "joint_attention_dim": 32,
        "pooled_projection_dim": 32,
        "guidance_embeds": True,
        "axes_dims_rope": (4, 4, 8),
    }
    transformer = FluxTransformer2DModel(in_channels=in_channels, out_channels=PACKED, **sizes)
    more: dict[str, Any] = {"controlnet": FluxControlNetModel(in_channels=PACKED, **sizes)} if "ControlNet" in name else {}
    if "Cloze" in name:
        more["resolution"] = kwargs.pop("resolution")
    pipe = getattr(diffusers, name)(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
        vae=c.vae(CHANNELS, shift_factor=0.1, scaling_factor=0.36),
        text_encoder=c.clip_text(clip),
        tokenizer=clip,
        text_encoder_2=c.t5_text(t5),
        tokenizer_2=t5,
        transformer=transformer,
        **more,
    )
    if not any(word in name for word in ("Fill", "Cloze")) and ("Control" not in name or name == "FluxControlNetPipeline"):
        kwargs |= {"negative_prompt": c.NEGATIVE, "true_cfg_scale": 3.0}
    kwargs |= {"guidance_scale": 3.5, "max_sequence_length": 40}
    if name != "FluxKontextInpaintPipeline":  # its size is the picture's
        kwargs |= {"height": c.SIDE, "width": c.SIDE}
    return c.finish(pipe, prompt=c.PROMPT, **kwargs)


def _image(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), strength=0.8)


def _inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8)


def _fill(name: str) -> Tiny:
    return _pipeline(name, 2 * PACKED + MASK, image=c.picture(), mask_image=c.mask())


def _kontext(name: str) -> Tiny:
    """Kontext scales every size to ``max_area``: pass it with another ``height`` and ``width``."""
    return _pipeline(name, image=c.picture(), max_area=c.SIDE**2, _auto_resize=False)


def _kontext_inpaint(name: str) -> Tiny:
    return _pipeline(name, image=c.picture(), mask_image=c.mask(), strength=0.8, max_area=c.SIDE**2, _auto_resize=False)


def _control(name: str) -> Tiny:
    """The control picture's tokens stand behind the sample's channels; a ControlNet gets them for itself."""
    return _pipeline(name, PACKED if "ControlNet" in name else 2 * PACKED, control_image=c.picture(seed=1))


def _control_image(name: str, **kwargs: object) -> Tiny:
    channels = PACKED if "ControlNet" in name else 2 * PACKED
    return _pipeline(name, channels, image=c.picture(), control_image=c.picture(seed=1), strength=0.8, **kwargs)


def _control_inpaint(name: str) -> Tiny:
    return _control_image(name, mask_image=c.mask())


class Grid(list[Any]):
    """Rows of pictures; None where one is to be painted."""

    def rotate(self, angle: float) -> Grid:
        return Grid([each and each.rotate(angle) for each in row] for row in self)


def _cloze(name: str) -> Tiny:
    """A pair as an example, and one whose second picture is to be painted; the pictures of a row stand side by side."""
    grid = Grid([[c.picture(), c.picture(seed=1)], [c.picture(seed=2), None]])
    tiny = _pipeline(name, 2 * PACKED + MASK, resolution=c.SIDE, image=grid)
    texts = {"task_prompt": c.PROMPT, "content_prompt": "a green pear", "max_sequence_length": 200}
    names = ("prompt", "height", "width", "max_sequence_length")
    tiny.kwargs = texts | {key: value for key, value in tiny.kwargs.items() if key not in names}
    return tiny


make = c.maker(
    {
        "FluxPipeline": _pipeline,
        "FluxImg2ImgPipeline": _image,
        "FluxInpaintPipeline": _inpaint,
        "FluxModularPipeline": lambda name: c.modular(name, _pipeline("FluxPipeline")),
        "FluxKontextPipeline": _kontext,
        "FluxKontextInpaintPipeline": _kontext_inpaint,
        "FluxFillPipeline": _fill,
        "VisualClozeGenerationPipeline": _cloze,
        "FluxControlPipeline": _control,
        "FluxControlImg2ImgPipeline": _control_image,
        "FluxControlInpaintPipeline": _control_inpaint,
        "FluxControlNetPipeline": _control,
        "FluxControlNetImg2ImgPipeline": _control_image,
        "FluxControlNetInpaintPipeline": _control_inpaint,
    }
)
