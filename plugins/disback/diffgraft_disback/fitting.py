"""``diffgraft fit disback``: a student of one step, by distribution matching along the teacher's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from diffgraft import ConfigError
from diffgraft.methods.fitter import Batch
from diffgraft.methods.matching import FAKE, STUDENT, MatchingConfig, MatchingFitter, Noised, is_of
from diffgraft.methods.predictions import SignalNoise, clean_estimate
from pydantic import Field
from torch import Tensor, nn

from diffgraft_disback.method import Path

LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv2", "conv_shortcut",
    "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj",
)  # fmt: skip
"""One step is far from what the teacher does in it: all layers have to move."""
WARMUP = 20


class DisBackFitConfig(MatchingConfig):
    """Knobs of the fit."""

    rank: int = Field(32, ge=1, description="rank of all LoRA")
    path: int = Field(4, ge=0, description="N: points of the path; 0 is plain distribution matching, without a first stage")
    record: int = Field(100, ge=1, description="steps of the first stage, degradation recording; the student stays as it is")
    stay: int = Field(50, ge=1, description="steps for each target on the way back; after the last one the target is the teacher")


class DisBackFitter(MatchingFitter):
    """Stage 1 trains the fake on the samples of the student as it begins and keeps it at N points; stage 2 goes back along them."""

    Config = DisBackFitConfig
    targets: ClassVar[tuple[str, ...]] = LAYERS
    config: DisBackFitConfig

    @property
    def path(self) -> Path:
        config = self.config
        return Path(config.path, config.record if config.path else 0, config.stay)

    def factor(self, step: int, steps: int) -> float:
        return min(1.0, (step + 1) / WARMUP)  # the same whatever the number of steps, so that the path is too

    def build(self, probe: Any) -> nn.Module:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.timestep = timestep_of(self.plugin.config.timestep, probe.scheduler)
        model = super().build(probe)
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets))
        for k in range(1, self.config.path + 1):
            model.add_adapter(config, point(k))  # type: ignore[operator]
        points = kept(model, self.config.path)
        for name, value in model.named_parameters():
            value.requires_grad_(is_of(name, STUDENT) or is_of(name, FAKE) or name in points)
        cast_training_params(model)
        for value in points.values():
            value.requires_grad_(False)  # copied, not learned; part of the state all the same
        return model

    def values(self) -> dict[str, Tensor]:
        return {**super().values(), **kept(self.trained, self.config.path)}

    def sample(self, session: Any, batch: Batch, calls: Mapping[str, Any]) -> Tensor:
        shape = calls["cond"][self.probe.target.family.sample].shape
        z = torch.randn(shape, generator=batch.generator).to(self.probe.target.pipe._execution_device)
        t = torch.full((len(z),), self.timestep, device=z.device)
        abar = self.probe.scheduler.alphas_cumprod[self.timestep].to(z)
        return clean_estimate(
            z, self.predict(session, z, t, calls["cond"], STUDENT), SignalNoise(abar.sqrt(), (1 - abar).sqrt()), self.kind
        )

    def learns(self, batch: Batch) -> bool:
        return self.path.moves(batch.step, self.config.student_every)

    def real(self, session: Any, at: Noised, calls: Mapping[str, Any], batch: Batch) -> Tensor:
        k = self.path.target(batch.step)
        return self.clean(at, self.guided(session, at, calls, point(k) if k else None))

    def loss(self, session: Any, batch: Batch) -> Tensor:
        if (k := self.path.kept_at(batch.step)) is not None:
            self.keep(k)
        return super().loss(session, batch)

    @torch.no_grad()
    def keep(self, k: int) -> None:
        """theta_k becomes what the fake is now."""
        values = dict(self.trained.named_parameters())
        for name, value in values.items():
            if is_of(name, FAKE):
                values[name.replace(f".{FAKE}.", f".{point(k)}.")].copy_(value)


def kept(model: nn.Module, points: int) -> dict[str, nn.Parameter]:
    """The weights of theta_1 to theta_N."""
    names = [point(k) for k in range(1, points + 1)]
    return {name: value for name, value in model.named_parameters() if any(is_of(name, each) for each in names)}


def point(k: int) -> str:
    """Name of the LoRA that is theta_k."""
    return f"path{k}"


def timestep_of(timestep: int | None, scheduler: Any) -> int:
    """The training timestep of the one step; by default the last one.

    Raises:
        ConfigError: the model was not trained for so many.
    """
    steps = len(scheduler.alphas_cumprod)
    if timestep is not None and timestep >= steps:
        raise ConfigError(f"plugin 'disback': timestep = {timestep}: this model was trained at 0 to {steps - 1}")
    return steps - 1 if timestep is None else timestep
