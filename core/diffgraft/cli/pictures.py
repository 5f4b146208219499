"""The pictures that ``run`` is given: read, checked, and brought to the size of the pipeline."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from diffgraft.installed.errors import ConfigError, PipelineNotFound
from diffgraft.lab.terminal import say

if TYPE_CHECKING:
    from diffgraft.methods.inputs import CallSettings


@dataclass(frozen=True)
class Given:
    """The pictures of one command, each with the name of its file."""

    image: Image.Image | None = None
    mask: Image.Image | None = None
    control: Image.Image | None = None

    def __bool__(self) -> bool:
        return any(picture is not None for picture in (self.image, self.mask, self.control))


def read_given(image: str | None, mask: str | None, control: str | None, controlnet: str | None, strength: float | None) -> Given:
    """The pictures of the files named; all that can be said before a pipeline is known is said here.

    Raises:
        ConfigError: a file that is no picture, options that do not go together, a mask that is none or does not fit.
    """
    if mask is not None and image is None:
        raise ConfigError("--mask goes with --image: which picture is to be filled in?")
    if strength is not None and image is None:
        raise ConfigError("--strength goes with --image: it says how much of that picture is redrawn")
    if strength is not None and not 0 < strength <= 1:
        raise ConfigError(f"--strength {strength}: above 0 (the picture stays) and at most 1 (nothing of it stays)")
    if controlnet is not None and control is None:
        raise ConfigError("--controlnet goes with --control-image: what is it to follow?")
    given = Given(
        None if image is None else flat(open_picture(image, "--image"), image),
        None if mask is None else open_mask(mask),
        None if control is None else flat(open_picture(control, "--control-image"), control),
    )
    if given.mask is not None and given.image is not None and given.mask.size != given.image.size:
        raise ConfigError(
            f"--mask {mask} is {size(given.mask)}, --image {image} is {size(given.image)}: a mask has one pixel for each of the picture"
        )
    return given


def open_picture(path: str, option: str) -> Image.Image:
    """A picture, turned as its camera says."""
    try:
        with Image.open(path) as image:
            turned = ImageOps.exif_transpose(image)
            turned.load()
            if turned.mode.startswith("I;16"):  # which PIL would cut off at 255, and not scale
                return Image.fromarray((np.asarray(turned, np.float32) / 257).round().astype(np.uint8))
            return turned
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ConfigError(f"{option} {path}: {error}") from None


def flat(image: Image.Image, path: str) -> Image.Image:
    """In RGB; what is transparent becomes white."""
    if not image.has_transparency_data:
        return image.convert("RGB")
    layered = image.convert("RGBA")
    if see_through(image):
        say(f"{path}: its transparent parts are taken as white")
    white = Image.new("RGBA", layered.size, "white")
    return Image.alpha_composite(white, layered).convert("RGB")


def see_through(image: Image.Image) -> bool:
    """Whether any pixel is not opaque."""
    return image.has_transparency_data and np.asarray(image.convert("RGBA"))[..., 3].min() < 255


def open_mask(path: str) -> Image.Image:
    """A mask in grey: white is painted anew, black stays."""
    image = open_picture(path, "--mask")
    if see_through(image):
        raise ConfigError(
            f"--mask {path} is transparent in places, and that could mean either: save it without transparency, white where the picture is "
            "to be painted anew and black where it stays"
        )
    grey = image.convert("L")
    if not grey.getextrema()[1]:
        raise ConfigError(f"--mask {path} is black all over: nothing would be painted anew; make that part white")
    return grey


def size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"


def class_for(folder: Any, given: Given, controlnet: str | None) -> Any:
    """(the class that takes these pictures, as the pipeline's index file tells before any weight is read)."""
    from diffusers import DiffusionPipeline

    from diffgraft.methods.inputs import parameters_of
    from diffgraft.methods.variants import variant_of

    try:
        name = DiffusionPipeline.load_config(folder)["_class_name"]
    except (OSError, KeyError) as error:
        raise PipelineNotFound(f"{folder} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from error
    if given.control is not None and controlnet is None and "ControlNet" not in name:
        raise ConfigError("--control-image goes with --controlnet: a folder or Hub id of the ControlNet that reads it")
    cls = variant_of(name, image=given.image is not None, mask=given.mask is not None, control=controlnet is not None)
    if "ControlNet" in cls.__name__ and given.control is None:
        raise ConfigError(f"{cls.__name__} needs --control-image FILE: what its ControlNet follows")
    if given.image is not None and given.mask is None and parameters_of(cls).get("mask_image") is not None:
        raise ConfigError(f"{cls.__name__} needs --mask FILE: white where the picture is to be painted anew")
    return cls


def strength_for(cls: type, strength: float | None, steps: int | None) -> float | None:
    """The strength of the call (None where the pipeline takes none).

    Raises:
        ConfigError: a pipeline without strength, or no step would be left.
    """
    from diffgraft.methods.inputs import parameters_of

    known = parameters_of(cls)
    if strength is not None and "strength" not in known:
        raise ConfigError(f"{cls.__name__} takes no strength: leave --strength out")
    strength = strength if strength is not None else known["strength"].default if "strength" in known else None
    steps = steps or known["num_inference_steps"].default
    if strength is not None and isinstance(steps, int) and int(steps * strength) < 1:
        raise ConfigError(f"--strength {strength} of {steps} steps is less than one step: raise one of them")
    return strength


def check_controlnet(name: str) -> None:
    """Raises ConfigError when there is no ControlNet at a folder or Hub id; reads its settings only."""
    from diffusers import ControlNetModel

    if not Path(name).is_dir() and name.count("/") != 1:
        raise ConfigError(f"--controlnet {name}: there is no such folder; a Hub id is written owner/name")
    try:
        config = ControlNetModel.load_config(name)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--controlnet {name} cannot be loaded: {str(error).strip().partition(chr(10))[0]}") from None
    if config.get("_class_name") != "ControlNetModel":
        raise ConfigError(f"--controlnet {name} is a {config.get('_class_name')}, not a ControlNetModel")


def load_controlnet(name: str, pipe: Any) -> Any:
    """The ControlNet on the device and in the dtype of the pipeline.

    Raises:
        ConfigError: it was made for another kind of U-Net.
    """
    from diffusers import ControlNetModel

    net = ControlNetModel.from_pretrained(name, dtype=pipe.dtype, use_safetensors=True).to(pipe.device)
    for key in ("in_channels", "cross_attention_dim", "block_out_channels", "addition_embed_type"):
        here, there = pipe.unet.config.get(key), net.config.get(key)
        if (list(here) if isinstance(here, (tuple, list)) else here) != (list(there) if isinstance(there, (tuple, list)) else there):
            raise ConfigError(f"--controlnet {name} was made for another model: its {key} is {there}, the pipeline's {here}")
    shrinks = 2 ** (len(net.config["conditioning_embedding_out_channels"]) - 1)  # each level but the first halves the control picture
    if shrinks != pipe.vae_scale_factor:
        raise ConfigError(
            f"--controlnet {name} was made for another model: it makes its picture {shrinks} times smaller, the pipeline's autoencoder "
            f"{pipe.vae_scale_factor} times"
        )
    return net


def sized(picture: Image.Image, height: int, width: int, name: str | None, err: bool = False) -> Image.Image:
    """A picture scaled and cropped to a size, where it has another; that is told of it by ``name``, on standard error with ``err``."""
    if picture.size == (width, height):
        return picture
    say(f"{name}: {size(picture)}, scaled and cropped to {width}x{height}; --height and --width choose another size", err=err)
    return ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)


def fitted(given: Given, names: dict[str, str | None], pipe: Any, call: CallSettings) -> CallSettings:
    """The settings of the call with the pictures in the size of the pipeline, or in that given; what was resized is told."""
    from diffgraft.methods.inputs import parameters
    from diffgraft.methods.variants import own_size

    known = parameters(pipe)
    extra = dict(call.extra)
    bundled = extra.pop("height", None), extra.pop("width", None)
    height, width = (call.height, call.width) if call.height else bundled
    if height is None and ("strength" in known or given.control is not None):  # others (image to video) have their own ways with sizes
        height, width = own_size(pipe) or (None, None)
    resized: dict[str, Image.Image | None] = {}
    for key in ("image", "mask", "control"):
        picture = getattr(given, key)
        if picture is not None and height and width:
            if key != "mask":
                picture = sized(picture, height, width, names[key])
            elif picture.size != (width, height):  # it goes with its picture, and is not told of
                picture = ImageOps.fit(picture, (width, height), Image.Resampling.NEAREST)
        resized[key] = picture
    control_alone = "control_image" not in known
    return replace(
        call,
        image=resized["control"] if control_alone and given.image is None else resized["image"],
        mask_image=resized["mask"],
        control_image=None if control_alone else resized["control"],
        height=height if "height" in known else None,
        width=width if "width" in known else None,
        extra=extra,
    )
