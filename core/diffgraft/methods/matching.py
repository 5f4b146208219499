"""Distribution matching: a student learns to draw what a teacher draws, from the difference of two scores.

At a noisy point ``x_t`` of a student's sample the teacher says where the clean sample of *its* distribution lies, and a second copy of it,
the *fake*, which is trained on the student's samples as they change, where that of the student's lies. Their difference is the gradient of
the KL divergence with respect to the sample (Yin et al., "One-step Diffusion with Distribution Matching Distillation", arXiv 2311.18828).

Student and fake are LoRA on one copy of the denoiser, the teacher is the copy without them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from typing_extensions import Self

from diffgraft.installed.config import PluginConfig
from diffgraft.installed.errors import ConfigError, Unsupported
from diffgraft.kernel.session import Session
from diffgraft.methods.adapters import weighted
from diffgraft.methods.examples import Example
from diffgraft.methods.fitter import Batch, LoraFitter
from diffgraft.methods.inputs import call_arguments
from diffgraft.methods.predictions import SignalNoise, clean_estimate, known_kind, prediction_target
from diffgraft.methods.search import Probe

STUDENT, FAKE = "fit", "fake"
TIMES = 1000
"""Of a flow model's timestep and its sigma."""


def matching_gradient(x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
    """The gradient of the KL divergence of the student's from the teacher's distribution, scaled per sample (DMD, eq. 7 and 8).

    Args:
        x: the student's samples [batch, ...].
        fake, real: clean samples that the two scores imply at the same noisy point, likewise.
    """
    axes = tuple(range(1, x.ndim))
    return (fake - real) / (x - real).abs().mean(axes, keepdim=True).clamp(min=1e-8)


def along(x: Tensor, gradient: Tensor) -> Tensor:
    """Losses [batch] whose gradient with respect to ``x`` [batch, ...] is ``gradient``, over the number of a sample's elements."""
    return 0.5 * (x - (x - gradient).detach()).square().flatten(1).mean(1)


@dataclass(frozen=True, eq=False)
class Noised:
    """A noisy sample ``x`` [batch, ...] at ``levels`` [batch, 1, ...].

    t       the denoiser's timesteps [batch] for it
    target  what the fake is to predict there
    """

    x: Tensor
    levels: SignalNoise
    t: Tensor
    target: Tensor


class MatchingConfig(PluginConfig):
    """Knobs that every fit by distribution matching has."""

    rank: int = Field(16, ge=1, description="rank of both LoRA")
    rate: float = Field(1e-4, gt=0, description="largest learning rate of the student")
    fake_rate: float = Field(3e-4, gt=0, description="largest learning rate of the fake")
    student_every: int = Field(3, ge=1, description="steps of the fake for each of the student")
    teacher_guidance: float = Field(2.0, ge=1, description="guidance scale of the teacher")
    t_low: float = Field(0.02, ge=0, lt=1, description="least noise at which the two are compared, a share of the training times")
    t_high: float = Field(0.98, gt=0, lt=1, description="most noise, likewise")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.t_low >= self.t_high:
            raise ValueError(f"t_low = {self.t_low} is not below t_high = {self.t_high}")
        return self


class MatchingFitter(LoraFitter):
    """Base of fits by distribution matching; the student's LoRA is what is written.

    An author writes :meth:`sample`, and :meth:`noised`, :meth:`fake_losses` or :meth:`real` where the method compares in another way.
    """

    Config = MatchingConfig
    wants = frozenset({"prompts"})
    clip = None  # two that learn at different rates have no common norm; Adam's step has none anyway
    config: MatchingConfig

    # what an author writes -----------------------------------------------------------------------------------------------------------

    def sample(self, session: Session, batch: Batch, calls: Mapping[str, Any]) -> Tensor:
        """What the student draws for the batch's prompts [batch, ...], with its graph where gradients are on.

        Args:
            calls: what :meth:`predict` wants: by branch, the arguments of the denoiser's call.
        """
        raise NotImplementedError

    def learns(self, batch: Batch) -> bool:
        """Whether the student moves in this step; the fake does in every one."""
        return batch.step % self.config.student_every == 0

    def noised(self, x: Tensor, batch: Batch) -> Noised:
        """The student's samples [batch, ...] with noise, where they are compared: times between t_low and t_high, uniform."""
        config = self.config
        u = config.t_low + (config.t_high - config.t_low) * torch.rand(x.shape[0], generator=batch.generator)
        levels, t = self.levels_at(u, x)
        noise = torch.randn(x.shape, generator=batch.generator).to(x)
        return Noised(levels.a * x + levels.s * noise, levels, t, prediction_target(x, noise, levels, self.kind))

    def fake_losses(self, prediction: Tensor, point: Noised) -> Tensor:
        """Of the fake's predictions at a point, [batch]."""
        return (prediction - point.target).square().flatten(1).mean(1)

    def real(self, session: Session, point: Noised, calls: Mapping[str, Any], batch: Batch) -> Tensor:
        """The clean sample that the teacher's score implies."""
        return self.clean(point, self.guided(session, point, calls))

    # what it may use -----------------------------------------------------------------------------------------------------------------

    def levels_at(self, u: Tensor, x: Tensor) -> tuple[SignalNoise, Tensor]:
        """Levels [batch, 1, ...] and timesteps [batch] at ``u`` [batch], shares of the training times: of a flow model sigma."""
        shape = (-1, *[1] * (x.ndim - 1))
        u = u.to(x.device, torch.float32)
        if self.kind == "flow":
            return SignalNoise((1 - u).view(shape), u.view(shape)), u * TIMES
        abar = self.probe.scheduler.alphas_cumprod.to(x.device, torch.float32)
        t = (u * len(abar)).long().clamp(max=len(abar) - 1)
        return SignalNoise(abar[t].sqrt().view(shape), (1 - abar[t]).sqrt().view(shape)), t

    def showing(self, name: str | None) -> AbstractContextManager[None]:
        """The denoiser with the LoRA of this name alone; None: as the pipeline has it without any."""
        return weighted(self.trained, {} if name is None else {name: 1.0})

    def predict(
        self, session: Session, x: Tensor, t: Tensor, arguments: Mapping[str, Any], name: str | None, branch: str = "cond"
    ) -> Tensor:
        """A prediction at ``x`` [batch, ...] and the timesteps ``t`` [batch], float32, by the LoRA ``name``."""
        family = self.probe.target.family
        own = {family.sample: x.to(self.probe.target.pipe.dtype), family.timestep: family.told(t)}
        with self.showing(name):
            return session.predict({**arguments, **own}, branch).float()

    @torch.no_grad()
    def guided(self, session: Session, point: Noised, calls: Mapping[str, Any], name: str | None = None) -> Tensor:
        """The teacher's prediction at a point, with guidance."""
        cond = self.predict(session, point.x, point.t, calls["cond"], name)
        if self.config.teacher_guidance == 1:
            return cond
        uncond = self.predict(session, point.x, point.t, calls["uncond"], name, "uncond")
        return uncond + self.config.teacher_guidance * (cond - uncond)

    def clean(self, point: Noised, prediction: Tensor) -> Tensor:
        """The clean sample that a prediction at a point implies."""
        return clean_estimate(point.x, prediction, point.levels, self.kind)

    # what the loop does ---------------------------------------------------------------------------------------------------------------

    def build(self, probe: Probe) -> nn.Module:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.kind = known_kind(probe.target.family, probe.scheduler)
        if self.kind != "flow" and not hasattr(probe.scheduler, "alphas_cumprod"):
            raise Unsupported(f"{self.plugin.name}: {type(probe.scheduler).__name__} has no alphas_cumprod, so noise levels are not known")
        self.ensure_guided(probe)
        model = super().build(probe)
        model.add_adapter(LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=list(self.targets)), FAKE)  # type: ignore[operator]
        for name, value in model.named_parameters():  # adding one had the other wait
            value.requires_grad_(is_of(name, STUDENT) or is_of(name, FAKE))
        cast_training_params(model)
        return model

    def ensure_guided(self, probe: Probe) -> None:
        """Raises ConfigError where the teacher is to be guided, and the call is not: it would silently be another teacher."""
        pipe, guidance = probe.target.pipe, probe.target.family.guidance
        if self.config.teacher_guidance == 1:
            return
        if "uncond" not in self._listening.conditioning(call_arguments(pipe, [Example("").sample(0)], self.settings)).whole:
            way = "" if guidance.layout == "none" else f"fit for a call with {guidance.scale} above 1, or "
            raise ConfigError(
                f"fit of {self.plugin.name}: teacher_guidance = {self.config.teacher_guidance:g}, and the call has no guidance, so nothing "
                f"to guide the teacher with: {way}say --set teacher_guidance=1"
            )

    def values(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.trained.named_parameters() if is_of(name, STUDENT) or is_of(name, FAKE)}

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        fakes = {id(value) for name, value in self.trained.named_parameters() if is_of(name, FAKE)}
        moving = list(parameters)
        groups = [
            {"params": [value for value in moving if (id(value) in fakes) == is_fake], "lr": rate}
            for is_fake, rate in ((False, self.config.rate), (True, self.config.fake_rate))
        ]
        return torch.optim.AdamW(groups, betas=(0.0, 0.999), weight_decay=0.0)  # no momentum: the two chase each other

    def loss(self, session: Session, batch: Batch) -> Tensor:
        """Of both at once: neither's reaches the other's weights."""
        calls, learns = self.calls(batch), self.learns(batch)
        with torch.set_grad_enabled(learns):
            x = self.sample(session, batch, calls)
        point = self.noised(x.detach(), batch)
        prediction = self.predict(session, point.x, point.t, calls["cond"], FAKE)
        losses = self.fake_losses(prediction, point)
        if learns:
            fake, real = self.clean(point, prediction.detach()), self.real(session, point, calls, batch)
            losses = losses + along(x, self.gradient(x.detach(), fake, real))
        return losses

    def gradient(self, x: Tensor, fake: Tensor, real: Tensor) -> Tensor:
        """What the student's samples go against; see :func:`matching_gradient`."""
        return matching_gradient(x, fake, real)


def is_of(parameter: str, adapter: str) -> bool:
    """Whether a denoiser's parameter belongs to this LoRA."""
    return f".{adapter}." in parameter
