"""``diffgraft fit one_more_step``: the network, learned from pictures with captions; the denoiser has no part in it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, ClassVar

import torch
from diffgraft import Fitter, PluginConfig
from pydantic import Field
from torch import Tensor, nn

from diffgraft_one_more_step.method import clean
from diffgraft_one_more_step.network import GROUPS, TIME, network, predict


class FitConfig(PluginConfig):
    """Knobs of the fit."""

    width: int = Field(8, ge=4, le=640, multiple_of=GROUPS, description="w: channels at full size, doubled twice; published: 160")
    dropout: float = Field(0.1, ge=0, lt=1, description="share of captions that are left out, for guidance")


class OneMoreStepFitter(Fitter):
    """Regresses x_0 from pure noise and the caption, ||v + x_0||^2: what is learned is E[x_0 | c]."""

    Config = FitConfig
    wants: ClassVar[frozenset[str]] = frozenset({"pictures", "prompts"})
    rate = 1e-3
    ema = 0.995
    config: FitConfig

    def build(self, probe: Any) -> nn.Module:
        config = probe.target.denoisers["unet"].config
        return network(self.config.width, config["out_channels"], config["cross_attention_dim"])

    def loss(self, session: Any, batch: Any) -> Tensor:
        x0 = self.latents(batch).float()
        noise = torch.randn(x0.shape, generator=batch.generator).to(x0)
        kept = torch.rand(len(batch.examples), generator=batch.generator) >= self.config.dropout
        told = [each if keep else replace(each, prompt="") for each, keep in zip(batch.examples, kept.tolist(), strict=True)]
        v = predict(self.trained, noise, self.conditioning(replace(batch, examples=tuple(told)))["encoder_hidden_states"])
        return (clean(v) - x0).square().mean((1, 2, 3))

    def values(self) -> dict[str, Tensor]:
        return {key: value for key, value in super().values().items() if not TIME.match(key)}
