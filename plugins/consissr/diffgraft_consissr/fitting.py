"""``diffgraft fit consissr``: the hybrid prompt adapter, learned from pictures with captions on a denoiser that does not move."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from diffgraft import AttentionCall, AttentionInfo, Fitter, PluginConfig, Unsupported
from diffgraft.methods.fitter import Batch
from diffgraft.methods.predictions import SignalNoise, known_kind, prediction_target
from pydantic import Field
from torch import Tensor, nn

from diffgraft_consissr.adapter import Adapter, ask_with_image, cross_layers, image_tokens, of_layer, seen
from diffgraft_consissr.method import smaller


class FitConfig(PluginConfig):
    """Knobs of the fit."""

    factor: int = Field(4, ge=1, le=64, description="how many times smaller than its picture the low-quality one is, by means over squares")
    dropout: float = Field(
        0.1, ge=0, le=1, description="share of captions that are left out: the more, the more the image tokens must tell"
    )
    channels: int = Field(32, ge=4, le=512, description="of the adapter's own eye")
    width: int = Field(64, ge=8, le=2048, description="f: of what it sees")
    rate: float = Field(1e-3, gt=0, le=1, description="largest learning rate")


@dataclass
class Told:
    """Of one batch: c_img [batch, tokens, d], and the adapter's values as they are at this step."""

    tokens: Tensor | None = None
    values: Any = None


class HpaFitter(Fitter):
    """||prediction - target||^2 at uniform t; queries, keys and values of the text, and all other weights, are the model's own."""

    Config = FitConfig
    State = Told
    wants: ClassVar[frozenset[str]] = frozenset({"pictures", "prompts"})
    ema = 0.995
    trained: Adapter
    config: FitConfig
    heard: Told

    def build(self, probe: Any) -> nn.Module:
        target = probe.target
        if target.family.kind != "unet" or getattr(probe.scheduler, "alphas_cumprod", None) is None:
            raise Unsupported(f"consissr: its adapter is for U-Nets of variance-preserving noise, not for {type(target.pipe).__name__}")
        layers = cross_layers(target.denoisers["unet"])
        self.number = {path: i for i, path in enumerate(layers)}
        return Adapter([*layers.values()], self.config.channels, self.config.width)

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        return [layer for layer in layers if layer.is_cross]

    def loss(self, session: Any, batch: Batch) -> Tensor:
        target, scheduler, generator = self.probe.target, self.probe.scheduler, batch.generator
        assert batch.pixels is not None
        x0 = self.latents(batch).float()
        low = smaller(batch.pixels, self.config.factor)
        state = dict(self.trained.named_parameters())
        self.heard = Told(image_tokens(state, seen(state, low)), [of_layer(state, i) for i in range(len(self.number))])
        kept = torch.rand(len(x0), generator=generator) >= self.config.dropout
        said = [each if keep else replace(each, prompt="") for each, keep in zip(batch.examples, kept.tolist(), strict=True)]
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        t = torch.randint(len(scheduler.alphas_cumprod), (len(x0),), generator=generator)
        abar = scheduler.alphas_cumprod[t].to(x0).view(-1, 1, 1, 1)
        levels = SignalNoise(abar.sqrt(), (1 - abar).sqrt())
        x, told = levels.a * x0 + levels.s * noise, dict(self.conditioning(replace(batch, examples=tuple(said))))
        if target.denoisers["unet"].config["in_channels"] > x.shape[1]:
            x = torch.cat([x, self.beside(low, told, generator)], 1)
        session.at(0)
        dtype = target.denoisers["unet"].dtype
        out = session.model(x.to(dtype), t.to(x.device), **told, return_dict=False)[0].float()
        wanted = prediction_target(x0, noise, levels, known_kind(target.family, scheduler))
        return (out[:, : wanted.shape[1]] - wanted).square().mean((1, 2, 3))

    def beside(self, low: Tensor, told: Any, generator: torch.Generator) -> Tensor:
        """The low-quality pictures that an upscaler has beside its latents, noised as it was told that they are.

        Raises:
            Unsupported: the channels beside the latents are something else.
        """
        pipe, labels = self.probe.target.pipe, told.get("class_labels")
        if labels is None or not hasattr(pipe, "low_res_scheduler"):
            raise Unsupported(f"consissr: {type(pipe).__name__} has channels beside its latents that are no low-quality picture")
        noise = torch.randn(low.shape, generator=generator).to(low)
        return pipe.low_res_scheduler.add_noise(low, noise, labels.long().cpu().expand(len(low)))  # type: ignore[no-any-return]

    def attention(self, call: AttentionCall, next: Any) -> Any:
        heard = self.heard
        assert heard.tokens is not None
        return ask_with_image(call, next, heard.values[self.number[call.info.path]], heard.tokens, 1.0)
