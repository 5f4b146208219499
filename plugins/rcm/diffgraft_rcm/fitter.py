"""``diffgraft fit rcm``: a LoRA that makes a flow model jump to the clean sample, by discrete-time consistency distillation ("dcm").

This is not the paper's own training: no Jacobian-vector product (continuous time), no score regularisation. The teacher, which is the same
model without the LoRA, walks from noise to the end along its guided ODE; at every point of the way the student must name the same x0 as at
the next one, and at the last the end itself. Nothing but prompts goes in.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from itertools import pairwise
from typing import Any, ClassVar

import torch
from diffgraft import DenoiseCall, LoraFitter, PluginConfig
from diffgraft.methods.adapters import without_adapters
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffgraft_rcm.method import clean, consistency_loss, guided, refined, start


class FitConfig(PluginConfig):
    """Knobs of the fit (``diffgraft fit rcm --set NAME=VALUE``)."""

    rank: int = Field(32, ge=1, le=1024, description="rank of the LoRA, and its alpha")
    rate: float = Field(3e-4, gt=0, le=1, description="learning rate of AdamW")
    hop: float = Field(1.0, gt=0, le=1, description="largest distance in t between neighbours that must agree; 1: those of the table")
    teacher_step: float = Field(0.16, gt=0, le=1, description="largest step in t of the teacher (Euler's method)")
    huber: float = Field(0.03, gt=0, description="c of the pseudo-Huber loss, in units of the latents")
    bf16: bool = Field(False, description="compute in bfloat16 (autocast): half the time on processors that have it")


class DCMFitter(LoraFitter):
    Config = FitConfig
    wants: ClassVar[frozenset[str]] = frozenset({"prompts"})
    targets: ClassVar[tuple[str, ...]] = (
        "to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2", "ff.net.0.proj", "ff.net.2", "proj_out",
    )  # fmt: skip
    ema: ClassVar[float] = 0.99
    plugin: Any
    config: FitConfig
    guidance: float | None = None

    def build(self, probe: Any) -> nn.Module:
        times = (*self.plugin.times(self.plugin.usual_steps()), 0.0)  # a run of fewer steps takes the first of them
        self.path = [t for stretch in refined(times, self.config.hop) for t in stretch[:-1]] + [0.0]
        return super().build(probe)

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=self.rate, weight_decay=0.0)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        self.guidance = call.run.guidance_scale(call.model_name)  # of the call that it is for
        return next(call)  # type: ignore[no-any-return]

    def loss(self, session: Any, batch: Any) -> Tensor:
        asked = self.calls(batch)
        latents: Tensor = asked["cond"][self.probe.target.family.sample]
        noise = torch.randn(latents.shape, generator=batch.generator).to(latents.device)
        with self.computing(latents.device):
            points = self.walk(session, asked, start(noise, self.path[0]))
            t = torch.tensor(self.path[:-1], device=noise.device).repeat_interleave(len(noise))
            x = torch.cat(points[:-1])
            v = self.ask(session, x, t, [asked["cond"]] * len(points[:-1]))
        x0 = clean(x, v, t.view(-1, *[1] * (x.ndim - 1))).unflatten(0, (len(points) - 1, -1))
        return consistency_loss(x0, points[-1], self.config.huber)

    @torch.no_grad()
    def walk(self, session: Any, asked: Mapping[str, Mapping[str, Any]], x: Tensor) -> list[Tensor]:
        """The teacher's points of the path [batch, ...] each, from the noise to the end."""
        points = [x]
        order = [branch for branch in self.probe.target.family.guidance.order if branch in asked]
        with without_adapters(self.trained):
            for stretch in refined(self.path, self.config.teacher_step):
                for t, after in pairwise(stretch):
                    times = torch.full((len(x),), t, device=x.device)
                    v = self.ask(session, x, times, [asked[each] for each in order])
                    said = dict(zip(order, v.chunk(len(order)), strict=True))
                    x = x + (after - t) * guided(said["cond"], said.get("uncond"), self.guidance)
                points.append(x)
        return points

    def ask(self, session: Any, x: Tensor, t: Tensor, texts: list[Mapping[str, Any]]) -> Tensor:
        """v, float32, at ``x`` and ``t`` under each of the conditionings in ``texts``; fewer samples than these have are repeated."""
        family = self.probe.target.family
        rows = len(texts[0][family.sample])
        copies = rows * len(texts) // len(x)
        x, t = x.repeat(copies, *[1] * (x.ndim - 1)), t.repeat(copies)
        t = family.told(self.probe.scheduler.config.num_train_timesteps * t)
        given = joined(texts, rows, family.common)
        given |= {family.sample: x.to(texts[0][family.sample].dtype), family.timestep: t.to(x.device)}
        return session.predict(given).float()  # type: ignore[no-any-return]

    @staticmethod
    def plain_attention(device: torch.device) -> contextlib.AbstractContextManager[Any]:
        """On a CPU, attention by plain matrix products: the backward pass of the fused kernel is slow there."""
        return sdpa_kernel(SDPBackend.MATH) if device.type == "cpu" else contextlib.nullcontext()

    @contextlib.contextmanager
    def computing(self, device: torch.device) -> Any:
        with torch.autocast(device.type, torch.bfloat16, enabled=self.config.bf16), self.plain_attention(device):
            yield


def joined(texts: list[Mapping[str, Any]], rows: int, common: Iterable[str]) -> dict[str, Any]:
    """Denoiser arguments of several calls of ``rows`` samples as those of one."""

    def join(name: str, values: list[Any]) -> Any:
        for_rows = isinstance(values[0], Tensor) and values[0].ndim > 0 and len(values[0]) == rows and name not in common
        return torch.cat(values) if for_rows else values[0]

    return {name: join(name, [text[name] for text in texts]) for name in texts[0]}
