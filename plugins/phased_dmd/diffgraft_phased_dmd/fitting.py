"""``diffgraft fit phased_dmd``: the expert of one phase, by distribution matching on the noise that is above it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from diffgraft import ConfigError, Need, Unsupported
from diffgraft.methods.adapters import read_adapter
from diffgraft.methods.fitter import Batch
from diffgraft.methods.matching import STUDENT, MatchingConfig, MatchingFitter, Noised
from diffgraft.methods.predictions import SignalNoise
from diffgraft.methods.search import Probe
from pydantic import Field, field_validator
from torch import Tensor, nn

from diffgraft_phased_dmd.levels import levels_of
from diffgraft_phased_dmd.method import between, euler, phase_estimate, phase_of, renoised, velocity_target, weight

TIMES = 1000
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
FEED_FORWARD = ("net.0.proj", "net.2", "proj_mlp", "proj_out")


class PhasedConfig(MatchingConfig):
    """Knobs of the fit."""

    earlier: tuple[str, ...] = Field(
        (), description="LoRA files of the phases before this one, the noisiest first: this fit's phase is the next one"
    )
    clamp: float = Field(10.0, gt=0, description="largest 1 / b^2 in the fake's loss, which grows as t comes near the phase's end")
    gradients: Literal["all", "truncated"] = Field(
        "all", description="through all steps of the phase; or of one drawn at random, which then goes to the phase's end at once (SGTS)"
    )
    layers: Literal["all", "attention"] = Field("all", description="which layers get a LoRA: attention and feed-forward, or attention")

    @field_validator("earlier", mode="before")
    @classmethod
    def _one(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value


class PhasedFitter(MatchingFitter):
    """Its student draws x_s, s = t_k, from what the earlier experts make of noise; teacher and fake are compared at t in (s, 1)."""

    Config = PhasedConfig  # type: ignore[assignment]  # the base has no annotation of its own
    config: PhasedConfig
    plugin: Any

    def build(self, probe: Probe) -> nn.Module:
        target, earlier, knobs = probe.target, self.config.earlier, self.plugin.config
        if len(target.denoisers) > 1:
            raise Unsupported("phased_dmd: a fit learns on one denoiser; this pipeline has two, each the expert of its own phase")
        model = next(iter(target.denoisers.values()))
        if target.family.appended != "none" and model.config["in_channels"] != model.config.get("out_channels"):
            raise Unsupported(f"phased_dmd: a fit begins in noise and prompts alone; {type(target.pipe).__name__} takes a picture too")
        if len(earlier) > len(knobs.boundaries):
            raise ConfigError(
                f"fit of phased_dmd: earlier has {len(earlier)} experts, and boundaries = {knobs.boundaries} make "
                f"{len(knobs.boundaries) + 1} phases: none is left to learn"
            )
        own = levels_of(probe.scheduler, probe.timesteps, probe.sigmas)
        if knobs.sigmas is None and knobs.steps is not None and len(own) - 1 != knobs.steps:
            raise ConfigError(
                f"fit of phased_dmd: the call has {len(own) - 1} steps, and phased_dmd's steps = {knobs.steps} is what a run of the expert "
                f"has: say --inference-steps {knobs.steps}, or -o phased_dmd.steps={len(own) - 1}"
            )
        self.knots = self.plugin.table_of(own)
        phases = [phase_of(level, knobs.boundaries) for level in self.knots[:-1]]
        self.plugin.ensure_phases(self.knots)
        self.phase = len(earlier)
        self.first = phases.index(self.phase)
        self.last = self.first + phases.count(self.phase)
        self.s = self.knots[self.last]
        self.phases, self.names = phases, []
        for number, file in enumerate(earlier):
            adapter = read_adapter(self.plugin, Need("adapter", f"earlier_{number + 1}"), file, target)
            adapter.put_on(target.pipe)
            self.names.append(adapter.name)
        self.targets = ATTENTION + (FEED_FORWARD if self.config.layers == "all" else ())  # type: ignore[misc]
        return super().build(probe)

    def facts(self) -> dict[str, Any]:
        return {"phase": self.phase + 1, "levels": self.knots}

    def sample(self, session: Any, batch: Batch, calls: Mapping[str, Any]) -> Tensor:
        x = torch.randn(calls["cond"][self.probe.target.family.sample].shape, generator=batch.generator)
        x = x.to(self.probe.target.pipe._execution_device)
        with torch.no_grad():
            for step in range(self.first):
                x = self.stepped(session, batch, calls, x, step, step + 1, self.names[self.phases[step]])
        ends = [(step, step + 1) for step in range(self.first, self.last)]
        if self.config.gradients == "truncated":
            chosen = int(torch.randint(len(ends), (), generator=batch.generator))
            with torch.no_grad():
                for step, after in ends[:chosen]:
                    x = self.stepped(session, batch, calls, x, step, after, STUDENT)
            ends = [(self.first + chosen, self.last)]
        for step, after in ends:
            x = self.stepped(session, batch, calls, x, step, after, STUDENT)
        return x

    def stepped(self, session: Any, batch: Batch, calls: Mapping[str, Any], x: Tensor, step: int, after: int, name: str) -> Tensor:
        """The sample at knot ``after``, from ``step``'s, by a LoRA."""
        t, end = self.knots[step], self.knots[after]
        v = self.predict(session, x, torch.full((len(x),), t * TIMES, device=x.device), calls["cond"], name)
        if self.plugin.config.sampler == "euler":
            return euler(x, v, t, end)
        return renoised(x, v, t, end, torch.randn(x.shape, generator=batch.generator).to(x))

    def noised(self, x: Tensor, batch: Batch) -> Noised:
        """x_t of the student's x_s, at t from s (t_low of the way) to 1 (t_high of it), uniform."""
        config, s = self.config, self.s
        u = config.t_low + (config.t_high - config.t_low) * torch.rand(x.shape[0], generator=batch.generator)
        t = (s + (1 - s) * u).to(x.device).view(-1, *[1] * (x.ndim - 1))
        eps = torch.randn(x.shape, generator=batch.generator).to(x)
        a, b = between(t, s)
        return Noised(a * x + b * eps, SignalNoise(1 - t, t), t.flatten() * TIMES, velocity_target(x, eps, t, s))

    def fake_losses(self, prediction: Tensor, point: Noised) -> Tensor:
        return weight(point.levels.s, self.s, self.config.clamp).flatten() * super().fake_losses(prediction, point)

    def clean(self, point: Noised, prediction: Tensor) -> Tensor:
        """The phase's own sample, x_s, that a prediction implies."""
        return phase_estimate(point.x, prediction, point.levels.s, self.s)
