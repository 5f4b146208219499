"""Measurements of pictures and videos in [-1, 1], as operators (entry-point group ``diffgraft.operators``)."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from diffgraft.installed.errors import ConfigError
from diffgraft.methods.operators import Operator, Rows, Shape


def wanted(name: str, fits: bool, value: object, what: str) -> None:
    """Raises ConfigError unless ``fits``."""
    if not fits:
        raise ConfigError(f"{name} = {value}: give {what}")


def flat(x: Tensor) -> Tensor:
    """Pictures and the frames of videos [n, c, (f,) h, w] as one batch [N, 1, h, w]: each is measured by itself."""
    return x.reshape(-1, 1, *x.shape[-2:])


class Identity(Rows):
    """Everything is seen; what is left is the noise."""

    def A(self, x: Tensor) -> Tensor:
        return x

    def AT(self, y: Tensor) -> Tensor:
        return y


class Mask(Rows):
    """Some pixels are seen, the others are 0 in y: inpainting.

    Args:
        seen: a picture file (white: seen), a tensor [h, w] or [n, 1, h, w] of 0 and 1, or which share of pixels, drawn once for a size.
        seed: of the draw.
    """

    def __init__(self, seen: float | str | Path | Tensor, seed: int = 0) -> None:
        self.share, self.seed = None, seed
        self.seen: Tensor | None = None
        if isinstance(seen, (str, Path)):
            try:
                told = torch.from_numpy(np.asarray(Image.open(seen).convert("L")).copy()) / 255
            except OSError as error:
                raise ConfigError(f"mask: seen = {str(seen)!r}: no picture can be read there: {error}") from None
            self.seen = (told > 0.5).float()
        elif isinstance(seen, Tensor):
            wanted(
                "mask: seen", bool(((seen == 0) | (seen == 1)).all()), f"{float(seen.min()):g} to {float(seen.max()):g}", "0 and 1 alone"
            )
            self.seen = seen.float()
        else:
            wanted("mask: seen", not isinstance(seen, bool) and 0 < seen <= 1, seen, "a share above 0 and up to 1, a file or a tensor")
            self.share = float(seen)

    def at(self, x: Tensor) -> Tensor:
        """The mask for pictures of this size."""
        if self.share is not None and (self.seen is None or self.seen.shape[-2:] != x.shape[-2:]):
            draws = torch.rand(x.shape[-2:], generator=torch.Generator().manual_seed(self.seed))
            self.seen = (draws < self.share).to(x.device, x.dtype)
        assert self.seen is not None
        if self.seen.shape[-2:] != x.shape[-2:]:
            size = "x".join(map(str, self.seen.shape[-2:]))
            raise ConfigError(f"mask: it is {size}, and the pictures are {'x'.join(map(str, x.shape[-2:]))}: give one of their size")
        return self.seen

    def A(self, x: Tensor) -> Tensor:
        return x * self.at(x)

    def AT(self, y: Tensor) -> Tensor:
        return y * self.at(y)


class Smaller(Operator):
    """``factor`` times smaller on each axis."""

    def __init__(self, factor: int) -> None:
        self.factor = factor

    def ensure_divides(self, x: Tensor) -> None:
        """Raises ConfigError for pictures of which the last row or column would be cut off, and never found again."""
        h, w = x.shape[-2:]
        fits = h % self.factor == w % self.factor == 0
        near = "x".join(str(side // self.factor * self.factor) for side in (h, w))
        told = f"one that divides the size of the pictures, {h}x{w}" + ("" if near.startswith("0") else f", or pictures of {near}")
        wanted("downsample: factor", fits, self.factor, told)

    def domain(self, y: Shape) -> Shape:
        return (*y[:-2], y[-2] * self.factor, y[-1] * self.factor)


class Downsample(Smaller, Rows):
    """A picture ``factor`` times smaller on each axis: super-resolution. The mean of each square: rows of length 1 / factor.

    For ``kernel="bicubic"`` see :class:`Bicubic`, which :func:`downsample` takes.
    """

    def __init__(self, factor: int) -> None:
        super().__init__(factor)
        self.c = 1 / factor**2

    def A(self, x: Tensor) -> Tensor:
        self.ensure_divides(x)
        small = F.avg_pool2d(flat(x), self.factor)
        return small.reshape(*x.shape[:-2], *small.shape[-2:])

    def AT(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.factor, -1).repeat_interleave(self.factor, -2) / self.factor**2


class Bicubic(Smaller):
    """``factor`` times smaller by bicubic interpolation without aliasing, as PIL does it."""

    def A(self, x: Tensor) -> Tensor:
        self.ensure_divides(x)
        size = (x.shape[-2] // self.factor, x.shape[-1] // self.factor)
        return F.interpolate(flat(x), size=size, mode="bicubic", antialias=True, align_corners=False).reshape(*x.shape[:-2], *size)


def downsample(factor: int, kernel: Literal["area", "bicubic"] = "area") -> Operator:
    """A smaller picture, by the mean of squares (closed inverse) or bicubic."""
    wanted("downsample: factor", type(factor) is int and factor >= 1, factor, "a whole number, 1 or more")
    wanted("downsample: kernel", kernel in ("area", "bicubic"), repr(kernel), "'area' or 'bicubic'")
    return Downsample(factor) if kernel == "area" else Bicubic(factor)


class Blur(Operator):
    """Convolution with a kernel; at the edges the picture is mirrored.

    Args:
        kernel: a tensor [k, k], odd, or the width sigma of a Gaussian in pixels.
    """

    def __init__(self, kernel: float | Tensor) -> None:
        self.kernel = gaussian(kernel) if not isinstance(kernel, Tensor) else kernel.float()
        square = self.kernel.ndim == 2 and len(set(self.kernel.shape)) == 1 and self.kernel.shape[0] % 2 == 1
        wanted("blur: kernel", square, f"a tensor {list(self.kernel.shape)}", "one of [k, k] with k odd, or a width in pixels")

    def A(self, x: Tensor) -> Tensor:
        k = self.kernel.shape[-1] // 2
        wanted("blur: kernel", k < min(x.shape[-2:]), f"{2 * k + 1} pixels", f"one of less than twice the picture, {tuple(x.shape[-2:])}")
        padded = F.pad(flat(x), (k, k, k, k), mode="reflect")
        return F.conv2d(padded, self.kernel[None, None].to(x.dtype)).reshape(x.shape)


def gaussian(sigma: float) -> Tensor:
    """A Gaussian of width ``sigma`` on a square of 3 sigma to each side, of sum 1."""
    wanted("blur: kernel", not isinstance(sigma, bool) and 0 < sigma < 100, sigma, "a width in pixels, above 0 and below 100, or a tensor")
    k = math.ceil(3 * sigma)
    line = torch.exp(-(torch.arange(-k, k + 1).double() ** 2) / (2 * sigma**2))
    square = torch.outer(line, line)
    return (square / square.sum()).float()


def motion_blur(length: int, angle: float = 0.0) -> Operator:
    """A camera that moves ``length`` pixels at ``angle`` degrees, in even speed."""
    wanted("motion_blur: length", type(length) is int and 1 <= length <= 255, length, "a whole number of pixels, 1 to 255")
    k = length // 2 + 1
    square = torch.zeros(2 * k + 1, 2 * k + 1)
    for at in torch.linspace(-(length - 1) / 2, (length - 1) / 2, 8 * length).tolist():
        x, y = k + at * math.cos(math.radians(angle)), k - at * math.sin(math.radians(angle))
        i, j = math.floor(y), math.floor(x)
        for di, dj in ((0, 0), (0, 1), (1, 0), (1, 1)):  # a point's share of the four pixels around it
            if 0 <= i + di < len(square) and 0 <= j + dj < len(square):
                square[i + di, j + dj] += (1 - abs(y - i - di)) * (1 - abs(x - j - dj))
    return Blur(square / square.sum())


class Radon(Operator):
    """Tomography with parallel beams: at each of ``views`` angles in [0, 180) the picture is turned and summed along its columns, over the
    number of rows. y [n, c, (f,) views, w]; outside of the picture is 0. With an odd side it is scikit-image's ``radon`` at the negative
    angles, over the side and transposed; of an even one that turns around another point."""

    def __init__(self, views: int) -> None:
        wanted("radon: views", type(views) is int and views >= 1, views, "a whole number of angles, 1 or more")
        self.views = views

    def A(self, x: Tensor) -> Tensor:
        wanted("radon: size", x.shape[-1] == x.shape[-2], f"{x.shape[-2]}x{x.shape[-1]}", "square pictures")
        angles = torch.arange(self.views, device=x.device, dtype=x.dtype) * (math.pi / self.views)
        cos, sin, zero = angles.cos(), angles.sin(), torch.zeros_like(angles)
        turns = torch.stack([torch.stack([cos, -sin, zero], -1), torch.stack([sin, cos, zero], -1)], 1)
        pictures = x.reshape(1, -1, *x.shape[-2:]).expand(self.views, -1, -1, -1)
        grid = F.affine_grid(turns, list(pictures.shape), align_corners=False)
        sums = F.grid_sample(pictures, grid, mode="bilinear", align_corners=False).mean(-2)
        return sums.transpose(0, 1).reshape(*x.shape[:-2], self.views, x.shape[-1])

    def domain(self, y: Shape) -> Shape:
        return (*y[:-2], y[-1], y[-1])


class Grey(Rows):
    """The mean of the channels: what a grey measurement says of a colour model's pictures, as in ``Radon(8) @ Grey()``.

    Args:
        channels: of the model's pictures.
    """

    def __init__(self, channels: int = 3) -> None:
        wanted("grey: channels", type(channels) is int and channels >= 1, channels, "a whole number, 1 or more")
        self.channels, self.c = channels, 1 / channels

    def A(self, x: Tensor) -> Tensor:
        wanted("grey: channels", x.shape[1] == self.channels, self.channels, f"{x.shape[1]}, as many as the pictures have")
        return x.mean(1, keepdim=True)

    def AT(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.channels, 1) / self.channels

    def domain(self, y: Shape) -> Shape:
        wanted("grey: y", y[1] == 1, f"{y[1]} channels", "a grey measurement, of one: of a coloured one y.mean(1, keepdim=True)")
        return (y[0], self.channels, *y[2:])


class TemporalMean(Rows):
    """Of each ``frames`` frames of a video their mean: a long exposure."""

    def __init__(self, frames: int) -> None:
        wanted("temporal_mean: frames", type(frames) is int and frames >= 1, frames, "a whole number, 1 or more")
        self.frames, self.c = frames, 1 / frames

    def A(self, x: Tensor) -> Tensor:
        wanted("temporal_mean", x.ndim == 5, f"pictures {list(x.shape)}", "videos [n, c, frames, h, w]")
        wanted("temporal_mean: frames", x.shape[2] % self.frames == 0, self.frames, f"one that divides the {x.shape[2]} frames")
        return x.unflatten(2, (-1, self.frames)).mean(3)

    def AT(self, y: Tensor) -> Tensor:
        return y.repeat_interleave(self.frames, 2) / self.frames

    def domain(self, y: Shape) -> Shape:
        return (*y[:2], y[2] * self.frames, *y[3:])


class Phase(Operator):
    """Phase retrieval: the absolute values of the Fourier transform of the picture with black beside it, ``oversample`` times as large on
    each axis. Not linear."""

    linear = False

    def __init__(self, oversample: int = 2) -> None:
        wanted("phase: oversample", type(oversample) is int and oversample >= 1, oversample, "a whole number, 1 or more")
        self.oversample = oversample

    def A(self, x: Tensor) -> Tensor:
        size = (x.shape[-2] * self.oversample, x.shape[-1] * self.oversample)
        bright = (x + 1) / 2
        return torch.fft.fft2(bright.to(torch.promote_types(x.dtype, torch.float32)), s=size, norm="ortho").abs().to(x.dtype)

    def domain(self, y: Shape) -> Shape:
        return (*y[:-2], y[-2] // self.oversample, y[-1] // self.oversample)


# fmt: off
LUMA = (
    (16, 11, 10, 16, 24, 40, 51, 61), (12, 12, 14, 19, 26, 58, 60, 55), (14, 13, 16, 24, 40, 57, 69, 56), (14, 17, 22, 29, 51, 87, 80, 62),
    (18, 22, 37, 56, 68, 109, 103, 77), (24, 35, 55, 64, 81, 104, 113, 92), (49, 64, 78, 87, 103, 121, 120, 101),
    (72, 92, 95, 98, 112, 100, 103, 99),
)
# fmt: on
"""Steps of the 64 frequencies at quality 50 (ITU-T T.81, table K.1)."""


class Jpeg(Operator):
    """What JPEG does to each channel: the cosine transform of blocks of 8 x 8, rounded to steps. Not linear; the rounding passes gradients.

    Without colour transform and subsampling: not the bytes of a JPEG file.

    Args:
        quality: 1 to 100, as encoders have it.
    """

    linear = False

    def __init__(self, quality: int) -> None:
        wanted("jpeg: quality", type(quality) is int and 1 <= quality <= 100, quality, "a whole number from 1 to 100")
        scale = 5000 / quality if quality < 50 else 200 - 2 * quality
        self.steps = ((torch.tensor(LUMA).double() * scale + 50) / 100).floor().clamp(1, 255).float()
        n = torch.arange(8).double()
        cosines = torch.cos((2 * n[None] + 1) * n[:, None] * math.pi / 16) / 2
        cosines[0] /= math.sqrt(2)
        self.cosines = cosines.float()

    def A(self, x: Tensor) -> Tensor:
        fits = x.shape[-1] % 8 == x.shape[-2] % 8 == 0
        wanted("jpeg: size", fits, f"{x.shape[-2]}x{x.shape[-1]}", "pictures of multiples of 8 pixels")
        D, q = self.cosines.to(x.dtype), self.steps.to(x.dtype)
        blocks = (x * 127.5).unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).transpose(-2, -3)
        found = (D @ blocks @ D.T) / q
        found = found + (found.round() - found).detach()
        return ((D.T @ (found * q) @ D) / 127.5).transpose(-2, -3).flatten(-2).flatten(-3, -2)
