"""The knobs, and the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from diffgraft import Paper, PluginConfig
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.published import Weights
from pydantic import Field, field_serializer, field_validator, model_validator
from typing_extensions import Self

from diffgraft_consissr.pictures import ensure_pictures, names

PAPER = Paper(
    title="ConsisSR: Delving Deep into Consistency in Diffusion-based Image Super-Resolution",
    arxiv="2410.13807",
    implemented="the GAN-embedding start (a run begins at a noised super-resolved picture), the hybrid prompt adapter in the U-Net "
    "(own keys and values for image tokens, summed), both colour fixes, and a fit of the adapter",
    omitted="TALA, which is a training of the denoiser; the ControlNet and the further attention of the authors' own U-Net, which "
    "diffusers has not; the fine-tuned CLIP that their file brings",
    licence="official code Apache-2.0, read for facts; written from the equations",
)
Colour = Literal["adain", "wavelet", "none"]


class ConsisSRConfig(PluginConfig):
    """Knobs of ConsisSR."""

    image: Any = Field(
        None,
        description="the low-quality picture, or one for each prompt: PIL, path, tensor [3, h, w] in 0 to 1, array [h, w, 3], a list; "
        "none: the call's own `image` where the pipeline is an upscaler",
    )
    sr: Any = Field(
        None,
        description="GAN-embedding: what a run begins at. A network pixels [n, 3, h, w] in -1 to 1 -> [n, 3, H, W] (a callable, "
        "'package.module:name', an entry point of diffgraft.super_resolution, 'bicubic'), or pictures that are super-resolved "
        "already; none: runs begin in noise",
    )
    start: float = Field(
        0.5, gt=0, le=1, description="t_s, a share of the training's time; towards 0 the super-resolved picture, through the autoencoder, "
        "comes out; at 1 a run is the plain one"
    )  # fmt: skip
    spacing: Literal["spread", "cut"] = Field(
        "spread", description="the call's steps all lie below t_s ('spread'), or are those of the plain run that do ('cut')"
    )
    colour: Colour = Field(
        "adain", description="colours of the result: means and deviations ('adain') or the low band ('wavelet') of the upscaled "
        "low-quality picture"
    )  # fmt: skip
    scale: float = Field(1.0, ge=0, le=10, description="lambda: of the image tokens' part in cross-attention; 0 is text alone, bit for bit")
    artefact: str | Path | Artefact | None = Field(None, description="an adapter that `diffgraft fit consissr` learned on this model")
    weights: str | Path | list[str | Path] | Weights | None = Field(
        None, description="an adapter of others: the authors' checkpoint, or what a fit made for a sibling"
    )
    vision: Any = Field(
        None, description="for `weights` without an eye of their own: pixels [n, 3, h, w] in -1 to 1 -> features [n, (tokens,) f]"
    )

    @field_validator("image")
    @classmethod
    def _pictures(cls, value: Any) -> Any:
        if value is not None:
            ensure_pictures(value)
        return value

    @field_validator("sr")
    @classmethod
    def _network(cls, value: Any) -> Any:
        if value is not None and not callable(value) and not isinstance(value, str):
            ensure_pictures(value)
        return value

    @field_validator("vision")
    @classmethod
    def _callable(cls, value: Any) -> Any:
        if value is not None and not callable(value):
            raise ValueError(f"a {type(value).__name__} cannot be called; give a function of pixels, or a network")
        return value

    @field_serializer("image", "sr", "vision", when_used="json-unless-none")
    def _named(self, value: Any) -> str:
        return names(value)

    @model_validator(mode="after")
    def _one_adapter(self) -> Self:
        if self.artefact is not None and self.weights is not None:
            raise ValueError("weights and artefact both say an adapter; give one of them")
        if self.vision is not None and self.weights is None:
            raise ValueError(
                "vision is what `weights` are told of a picture; give weights, or leave it out (what a fit made sees for itself)"
            )
        return self

    @property
    def starts(self) -> bool:
        """Whether a run begins at a super-resolved picture."""
        return self.sr is not None and self.start < 1

    @property
    def adapts(self) -> bool:
        """Whether image tokens are heard."""
        return self.scale > 0 and (self.artefact is not None or self.weights is not None)
