"""Optical flow in the forms that users have it, and from the frames of a clip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
import torch
from diffgraft import ConfigError, Unsupported
from diffgraft.methods.named import ensure_takes
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

NAME = "plugin 'motion_guided'"
Estimate = Callable[[Tensor, Tensor], Any]
"""(first, second), both [n, 3, H, W] in 0 to 1 -> flow [n, 2, H, W] from the first to the second, in pixels (x, then y)."""


class Flows(NamedTuple):
    """Of a clip of T frames, [T - 1, 2, H, W] in pixels of their own grid: frame i to i + 1, and back."""

    forward: Tensor
    backward: Tensor

    @property
    def frames(self) -> int:
        return len(self.forward) + 1


# what a user gives ------------------------------------------------------------------------------------------------------------------


def read_flow(value: Any) -> Any:
    """None, "dis", a pan (u, v), :class:`Flows`, or a function, as they are used; of a knob's value.

    Raises:
        ValueError: it is nothing of the kind.
    """
    if value is None or value == "dis" or isinstance(value, Flows):
        return value
    if isinstance(value, Mapping):
        if set(value) != {"forward", "backward"}:
            raise ValueError(f"a dict of flows has the keys forward and backward, and this one has {', '.join(map(str, value)) or 'none'}")
        return pair(value["forward"], value["backward"])
    if isinstance(value, (list, tuple)) and len(value) == 2:
        if all(isinstance(each, (int, float)) and not isinstance(each, bool) for each in value):
            if not all(np.isfinite(value)):
                raise ValueError("a pan is two finite numbers, pixels a frame to the right and down")
            return float(value[0]), float(value[1])
        return pair(*value)
    if callable(value):
        return ensure_takes("flow", getattr(value, "__name__", type(value).__name__), value, ("first", "second"))[1]
    raise ValueError(
        "give 'dis', two numbers (a pan), two tensors [T - 1, 2, H, W] (forward and backward), or a function of two batches of frames"
    )


def pair(forward: Any, backward: Any) -> Flows:
    """Two flows, held against each other."""
    found = Flows(flow_in(forward, "forward"), flow_in(backward, "backward"))
    if found.forward.shape != found.backward.shape:
        raise ValueError(f"forward is {list(found.forward.shape)} and backward {list(found.backward.shape)}: both are of the same clip")
    return found


def flow_in(value: Any, what: str) -> Tensor:
    """One direction, float32 [T - 1, 2, H, W].

    Raises:
        ValueError: it is of another shape, or not finite.
    """
    if not isinstance(value, (Tensor, np.ndarray)):
        raise ValueError(f"{what} is a {type(value).__name__}, not a tensor or an array [T - 1, 2, H, W]")
    flow = torch.as_tensor(value).detach()
    if flow.ndim != 4 or flow.shape[1] != 2 or not flow.numel() or flow.is_complex() or flow.dtype == torch.bool:
        raise ValueError(
            f"{what} is {list(flow.shape)} of {flow.dtype}, not [T - 1, 2, H, W]: for each pair of neighbours x, then y, in pixels"
        )
    flow = flow.float()
    if not bool(flow.isfinite().all()):
        raise ValueError(f"{what} has {int((~flow.isfinite()).sum())} values that are not finite; a pixel without a flow takes 0")
    return flow


UNDERSHOOT = -0.05
"""The least value of a clip in 0 to 1 that was resampled."""


def read_clip(value: Any) -> Tensor:
    """Frames [T, 3, H, W] in 0 to 1 of a clip: a list of pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W], in 0 to 1, -1 to 1 or
    uint8.

    Raises:
        ValueError: it is no clip.
    """
    if isinstance(value, (list, tuple)) and value and all(isinstance(frame, Image.Image) for frame in value):
        if len(sizes := {frame.size for frame in value}) > 1:
            raise ValueError(f"its frames have different sizes: {', '.join(map(str, sorted(sizes)))}")
        value = np.stack([np.asarray(frame.convert("RGB")) for frame in value])
    elif isinstance(value, (list, tuple)) and value and all(isinstance(frame, (Tensor, np.ndarray)) for frame in value):
        if len(shapes := {tuple(frame.shape) for frame in value}) > 1:
            raise ValueError(f"its frames have different shapes: {', '.join(map(str, sorted(shapes)))}")
        value = torch.stack(list(value)) if isinstance(value[0], Tensor) else np.stack(value)
    if isinstance(value, np.ndarray) and value.ndim == 4:
        value = torch.from_numpy(np.ascontiguousarray(value)).movedim(-1, 1)
    if not isinstance(value, Tensor) or value.ndim != 4 or value.shape[1] != 3 or not value.numel():
        told = list(value.shape) if isinstance(value, (Tensor, np.ndarray)) else f"a {type(value).__name__}"
        raise ValueError(f"{told} is no clip: give a list of pictures, an array [T, H, W, 3] or a tensor [T, 3, H, W]")
    x = value.detach().cpu().float() / (255 if value.dtype == torch.uint8 else 1)
    low, high = float(x.min()), float(x.max())
    if not (low >= -1.001 and high <= 1.001):
        raise ValueError(f"its values go from {low:.3g} to {high:.3g}; give 0 to 1, -1 to 1, or uint8")
    return (x + 1) / 2 if low < UNDERSHOOT else x.clamp(0, 1)


# from frames ------------------------------------------------------------------------------------------------------------------------


def estimated(clip: Tensor, estimate: Estimate) -> Flows:
    """Both directions of a clip [T, 3, H, W] in 0 to 1, by a function.

    Raises:
        ConfigError: what it answers is no flow of these frames.
    """
    first, second = clip[:-1], clip[1:]
    found = []
    for a, b in ((first, second), (second, first)):
        answer = estimate(a, b)
        try:
            flow = flow_in(answer, "what the function gives").cpu()
        except ValueError as error:
            raise ConfigError(f"{NAME}: flow: {error}") from None
        if flow.shape != (len(a), 2, *a.shape[-2:]):
            raise ConfigError(
                f"{NAME}: flow: the function gives {list(flow.shape)} for frames {list(a.shape)}; give {[len(a), 2, *a.shape[-2:]]}"
            )
        found.append(flow)
    return Flows(*found)


def opencv() -> Any:
    """The module ``cv2``.

    Raises:
        Unsupported: it is not installed.
    """
    try:
        return import_module("cv2")
    except ImportError as error:
        raise Unsupported(
            f"motion_guided: flow = 'dis' needs OpenCV ({error}): pip install 'diffgraft-motion-guided[opencv]', or give the flow itself"
        ) from error


LEAST = 12
"""Pixels of a side that OpenCV's search takes."""


def dis(first: Tensor, second: Tensor) -> Tensor:
    """OpenCV's dense inverse search (preset medium) on grey pictures of 8 bits, pair by pair.

    Raises:
        ConfigError: the pictures are smaller than it takes.
    """
    if min(first.shape[-2:]) < LEAST:
        size = "x".join(map(str, first.shape[-2:]))
        raise ConfigError(f"motion_guided: flow = 'dis': the clip's frames are {size}, and it takes {LEAST} pixels at least: enlarge them")
    cv2 = opencv()
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)

    def grey(frames: Tensor) -> Any:
        return ((frames * weights).sum(1) * 255).round().clamp(0, 255).byte().numpy()

    pairs = zip(grey(first), grey(second), strict=True)
    return torch.stack([torch.from_numpy(search.calc(a, b, None)).permute(2, 0, 1) for a, b in pairs])


# on the latents' grid ---------------------------------------------------------------------------------------------------------------


def resized(flow: Tensor, height: int, width: int) -> Tensor:
    """A flow [n, 2, H, W] on another grid, in its pixels (official: bilinear)."""
    ratio = torch.tensor([width / flow.shape[-1], height / flow.shape[-2]], dtype=flow.dtype, device=flow.device).view(2, 1, 1)
    return interpolate(flow * ratio, (height, width), mode="bilinear", align_corners=False)


def pan(u: float, v: float, pairs: int, height: int, width: int) -> Flows:
    """The whole picture moves by (u, v) pixels of this grid a frame."""
    forward = torch.tensor([u, v]).view(1, 2, 1, 1).expand(pairs, 2, height, width)
    return Flows(forward, -forward)
