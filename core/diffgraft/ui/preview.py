"""What a run shows while it is on: how far it is, and its picture so far, from latents by one small matrix product.

The autoencoder would take a good part of a run; colours are nearly linear in the latents of one place, so a least-squares fit of the two
on one made-up picture is enough for a preview.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import Field
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, interpolate

from diffgraft.installed.config import PluginConfig
from diffgraft.installed.errors import DiffgraftError
from diffgraft.installed.family import Family
from diffgraft.installed.plugin import Paper, Plugin
from diffgraft.kernel.calls import StepCall, StepOutput
from diffgraft.methods.decoding import picture_channels, to_latents

OnStep = Callable[[int, int, Tensor], None]
"""Called with (steps done, steps in all, the clean sample as it looks now, or the sample where the scheduler tells none)."""
SIDE = 16
"""Latent places on each side of the made-up picture: many more than channels."""
EVERY = 0.4
"""Seconds between two previews: each waits for the device."""


class WatchedConfig(PluginConfig):
    """Knobs of Watched."""

    told: Any = Field(description="called at each step, see `OnStep`")


class Watched(Plugin):
    """A step's clean sample, told to whoever looks on. It changes nothing."""

    name = "watched"
    paper = Paper(title="none", arxiv="", implemented="the steps of a run are told", licence="none")
    families = ("*", "consistency")
    Config = WatchedConfig
    neutral: ClassVar[dict[str, Any]] = {}
    config: WatchedConfig

    def step(self, call: StepCall, next: Callable[[StepCall], StepOutput]) -> StepOutput:
        out = next(call)
        if call.copy == 0:
            self.config.told(call.step.index + 1, call.step.total, out.sample if out.x0 is None else out.x0)
        return out


class Previewer:
    """Small pictures [height, width, 3] in 0..1 of a pipeline's latents; none where it is not known how they are laid out."""

    def __init__(self, pipe: Any, family: Family) -> None:
        self.family = family
        try:
            self.colours = None if family.latents == "pixels" else fit_colours(pipe, family)
            self.works = True
        except (DiffgraftError, RuntimeError, ValueError, TypeError, AttributeError, KeyError):  # a layout that is not known: no preview
            self.works = False

    @torch.no_grad()
    def __call__(self, latents: Tensor) -> NDArray[np.float32] | None:
        """Of the first picture of a batch; of a video its middle frame."""
        if not self.works:
            return None
        places = as_places(latents[:1].detach().float(), self.family.latents)
        if places is None:
            return None
        if self.colours is not None:
            places = colours_at(places, self.colours.to(places))
        picture = (places[0, :3] / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).cpu().numpy()
        return np.repeat(picture, 3, axis=-1) if picture.shape[-1] == 1 else picture


def as_places(latents: Tensor, layout: str) -> Tensor | None:
    """Latents as [batch, channels, height, width]: of a video the middle frame, of packed ones a place a token where they fill a square."""
    if layout in ("bchw", "pixels") and latents.ndim == 4:
        return latents
    if layout == "bcfhw" and latents.ndim == 5:
        return latents[:, :, latents.shape[2] // 2]
    if layout == "bfchw" and latents.ndim == 5:
        return latents[:, latents.shape[1] // 2]
    if layout == "packed" and latents.ndim == 3 and (side := round(latents.shape[1] ** 0.5)) ** 2 == latents.shape[1]:
        return latents.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    return None


@torch.no_grad()
def fit_colours(pipe: Any, family: Family) -> Tensor:
    """[channels + 1, 3]: least squares of a made-up picture's colours on its latents and a constant.

    Raises:
        Unsupported: the pipeline has no autoencoder of which it is known how the latents are laid out.
        ValueError: they are in no grid.
    """
    scale: Any = getattr(pipe, "vae_scale_factor", None) or getattr(pipe, "vae_scale_factor_spatial", 8)
    side = SIDE * int(scale)
    noise = torch.rand(1, picture_channels(pipe, family), 6, 6, generator=torch.Generator().manual_seed(0)) * 2.4 - 1.2
    picture = interpolate(noise, (side, side), mode="bicubic").clamp(-1, 1)
    still = picture.unsqueeze(2) if family.latents == "bcfhw" else picture
    vae = getattr(pipe, "vae", None)
    places = as_places(to_latents(pipe, family, still.to(pipe.device if vae is None else vae.device)).float().cpu(), family.latents)
    if places is None:
        raise ValueError(f"latents in the layout {family.latents!r} fill no square")
    wanted = adaptive_avg_pool2d(picture[:, :3], places.shape[-2:]).flatten(2)[0].T
    known = with_constant(places).flatten(2)[0].T
    found: Tensor = torch.linalg.lstsq(known.double(), wanted.double(), driver="gelsd").solution.float()
    return found


def with_constant(places: Tensor) -> Tensor:
    """[batch, channels + 1, height, width]: the last channel is 1."""
    return torch.cat([places, torch.ones_like(places[:, :1])], dim=1)


def colours_at(places: Tensor, colours: Tensor) -> Tensor:
    """[batch, 3, height, width] in about -1 to 1."""
    return torch.einsum("bchw,cd->bdhw", with_constant(places), colours)


class Lookout:
    """Takes each step of a run: every step is counted, a picture is made a few times a second."""

    def __init__(self, previewer: Previewer, on_step: Callable[[int, int, NDArray[np.float32] | None], None]) -> None:
        self.previewer = previewer
        self.on_step = on_step
        self.last = 0.0

    def __call__(self, done: int, total: int, latents: Tensor) -> None:
        picture = None
        if time.monotonic() - self.last >= EVERY:
            picture = self.previewer(latents)
            self.last = time.monotonic()
        self.on_step(done, total, picture)
