"""Low-quality and super-resolved pictures in any of the usual forms, and the networks that make the one of the other, to pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffgraft import ConfigError
from diffgraft.methods.named import find_callable
from PIL import Image
from torch import Tensor

from diffgraft_consissr.method import resized

GROUP = "diffgraft.super_resolution"
"""Entry points of this group are networks that `sr` may name: a callable, pixels [n, 3, h, w] in -1 to 1 -> [n, 3, H, W]."""
PLAIN = "bicubic"
FILES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


def is_picture(value: Any) -> bool:
    """Whether a value is pictures by its form, and no network's name: a list of them, a path, a tensor, an array, a PIL picture."""
    if isinstance(value, str):
        return Path(value).suffix.lower() in FILES
    return isinstance(value, (list, tuple, Path, Tensor, np.ndarray, Image.Image))


def ensure_pictures(value: Any) -> None:
    """Raises ValueError for what is no picture by its form."""
    if isinstance(value, (list, tuple)):
        if not value:
            raise ValueError("there is no picture in an empty list")
        for each in value:
            ensure_pictures(each)
    elif isinstance(value, (Tensor, np.ndarray)):
        if value.ndim not in (3, 4):
            raise ValueError(f"a picture has 3 axes and several have 4, and this has {value.ndim}: {tuple(value.shape)}")
    elif not is_picture(value):
        raise ValueError(f"{value!r:.80} is no picture: give a PIL picture, a path, a tensor, an array, or a list of these")


def ensure_there(knob: str, value: Any) -> None:
    """Raises ConfigError for a path that names no file, before a model is touched."""
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, (str, Path)) and is_picture(each) and not Path(each).is_file():
            raise ConfigError(f"plugin 'consissr': {knob} = {str(each)!r}: there is no such file")


def pixels_of(knob: str, value: Any) -> Tensor:
    """Pictures as pixels [n, 3, height, width], float32 in -1 to 1.

    Args:
        value: tensors [(n,) 3, height, width] in 0 to 1, arrays [(n,) height, width, 3] in 0 to 1 or uint8, PIL pictures, paths, a list.

    Raises:
        ConfigError: a file cannot be read, a size or a value does not do.
    """
    name = f"plugin 'consissr': {knob}"
    if isinstance(value, (list, tuple)):
        parts = [pixels_of(knob, each) for each in value]
        if len(sizes := {tuple(part.shape[-2:]) for part in parts}) > 1:
            raise ConfigError(f"{name}: pictures of one call have one size, and these have {', '.join(map(str, sorted(sizes)))}")
        return torch.cat(parts)
    if isinstance(value, (str, Path)):
        try:
            value = Image.open(value).convert("RGB")
        except OSError as error:
            raise ConfigError(f"{name} = {str(value)!r}: {error}") from None
    if isinstance(value, Image.Image):
        value = np.array(value.convert("RGB"))
    if isinstance(value, np.ndarray):
        value = torch.from_numpy(np.ascontiguousarray(value)).movedim(-1, -3)
    x = value.detach().float() / (255 if value.dtype == torch.uint8 else 1)
    x = x[None] if x.ndim == 3 else x
    if x.ndim != 4 or x.shape[1] != 3 or not x.numel():
        raise ConfigError(f"{name}: three colours are expected (first axis of a tensor, last of an array), not {list(value.shape)}")
    low, high = float(x.min()), float(x.max())
    if not (low >= -1e-3 and high <= 1 + 1e-3):
        raise ConfigError(f"{name}: its values go from {low:.3g} to {high:.3g}; give 0 to 1 (as pipelines do), or uint8 of 0 to 255")
    return x * 2 - 1


def network_of(sr: Any) -> Callable[[Tensor], Tensor] | None:
    """The function that `sr` stands for; None where it is pictures.

    Raises:
        ConfigError: it names nothing, or what it names takes no pixels.
    """
    if isinstance(sr, str) and sr == PLAIN:
        return lambda low: resized(low, (4 * low.shape[-2], 4 * low.shape[-1]))
    if is_picture(sr):
        return None
    return find_callable("plugin 'consissr': sr", sr, GROUP, "network of super-resolution", ("pixels",), (PLAIN,))[1]


BEYOND = 1.5
"""How far a network's answer may be from grey: it is cut to -1 and 1."""


@torch.no_grad()
def enlarged(sr: Any, low: Tensor | None) -> Tensor:
    """The super-resolved pictures [n, 3, height, width] in -1 to 1, of the low-quality ones or as they were given.

    Raises:
        ConfigError: there is no low-quality picture, or the network gives something else than pictures.
    """
    network = network_of(sr)
    if network is None:
        return pixels_of("sr", sr)
    if low is None:
        raise ConfigError("plugin 'consissr': sr is a network, and there is no low-quality picture for it: give image=")
    where = next((value.device for value in getattr(network, "parameters", tuple)()), low.device)
    found = network(low.to(where))
    found = getattr(found, "sample", found)
    if not isinstance(found, Tensor) or found.ndim != 4 or found.shape[:2] != low.shape[:2]:
        told = f"a tensor of {list(found.shape)}" if isinstance(found, Tensor) else f"a {type(found).__name__}"
        raise ConfigError(f"plugin 'consissr': sr gave {told} for pixels of {list(low.shape)}; wanted is [{len(low)}, 3, height, width] "
                          "in -1 to 1")  # fmt: skip
    found = found.detach().float().to(low.device)
    if not float(found.abs().max()) <= BEYOND:  # NaN is not either
        raise ConfigError(
            f"plugin 'consissr': sr gave pixels up to {float(found.abs().max()):.3g} in size; wanted is -1 to 1 (of bytes: y / 127.5 - 1)"
        )
    return found.clamp(-1, 1)


# what comes out ------------------------------------------------------------------------------------------------------------------------


def in_form(images: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Pictures as a pipeline gives them (PIL, array, tensor), changed as pixels [n, 3, height, width] in 0 to 1; in the same form."""
    if isinstance(images, Tensor):
        return change(images.float()).clamp(0, 1).to(images.dtype)
    if isinstance(images, np.ndarray):
        fixed = change(torch.from_numpy(images).movedim(-1, 1).float()).clamp(0, 1).movedim(1, -1)
        return np.ascontiguousarray(fixed.numpy()).astype(images.dtype)
    x = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))).movedim(-1, 0) for image in images])
    fixed = (change(x.float() / 255).clamp(0, 1) * 255).round().byte().movedim(1, -1).numpy()
    return [Image.fromarray(each) for each in fixed]


def rows(x: Tensor, count: int, what: str, tiled: bool = False) -> Tensor:
    """``x`` [pictures, ...] for so many samples: several of a prompt stand one behind the other; ``tiled``: all prompts, and again.

    Raises:
        ConfigError: there are neither one nor one for each.
    """
    if count % len(x):
        raise ConfigError(f"plugin 'consissr': {what}: {len(x)} pictures for {count} samples; give one for all, or one for each prompt")
    return torch.cat([x] * (count // len(x))) if tiled else x.repeat_interleave(count // len(x), 0)


def card(side: int = 16) -> Image.Image:
    """A picture of no meaning, for tests: a bright square on a slope of colours."""
    slope = np.linspace(40, 200, side)
    x = np.stack([np.broadcast_to(slope, (side, side)), np.broadcast_to(slope[:, None], (side, side)), np.full((side, side), 90)], -1)
    x[side // 4 : side // 2, side // 4 : side // 2] = (240, 220, 60)
    return Image.fromarray(x.astype(np.uint8))


def names(value: Sequence[Any] | Any) -> str:
    """A knob's pictures or network, for a record in JSON."""
    return value if isinstance(value, str) else f"({type(value).__name__})"
