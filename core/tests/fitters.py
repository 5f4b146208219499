"""Plugins that learn, for the tests of ``fit``; run as a program it is a fit that a test kills."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from diffgraft import Need, PluginConfig, unload
from diffgraft.methods.examples import Example
from diffgraft.methods.fitter import Fitter, LoraFitter
from diffgraft.methods.fitting import FitPlan, fit
from diffgraft.methods.inputs import CallSettings
from PIL import Image
from probes import Probe, tiny
from pydantic import Field
from torch import nn

SETTINGS = CallSettings(steps=3, guidance_scale=1.0, height=32, width=32)


class GateConfig(PluginConfig):
    artefact: Any = Field(None, description="what `fit` learned")


class Rate(PluginConfig):
    bad_at: int = Field(-1, description="the step whose loss is not a number")


class Gate(nn.Module):
    """One factor a channel, near 1 at first; dropout and a buffer, so that draws and buffers count."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.factor = nn.Parameter(1 + 0.1 * torch.randn(channels))
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.seen += 1
        return x * nn.functional.dropout(self.factor, 0.1, self.training)[:, None, None]


class GateFitter(Fitter):
    """Learns to make predictions the noise."""

    Config = Rate
    rate = 1e-2
    ema = 0.9

    def build(self, probe):
        return Gate(probe.target.denoisers["unet"].config.in_channels)

    def loss(self, session, batch):
        x0, text = self.latents(batch), self.conditioning(batch)
        index = int(torch.randint(len(self.probe.timesteps), (), generator=batch.generator))
        noise = torch.randn(x0.shape, generator=batch.generator)
        session.at(index)
        t = self.probe.timesteps[index]
        prediction = session.model(self.probe.scheduler.add_noise(x0, noise, t[None]), t, **text, return_dict=False)[0]
        losses = (self.trained(prediction) - noise).square().mean((1, 2, 3))
        return losses * float("nan") if batch.step == self.config.bad_at else losses


class GateUser(Probe):
    name = "gate"
    families = ("sd",)
    Config = GateConfig
    needs = (Need("fit", "artefact", fits=frozenset()),)
    fitting = GateFitter

    def denoise(self, call, next):
        artefact = call.given("artefact")
        return next(call) if artefact is None else next(call) * artefact.tensors["factor"][:, None, None]


class NothingFitter(GateFitter):
    """Draws and computes, and nothing comes of it."""

    wants = frozenset({"prompts"})

    def rollout(self, pipe, batch):
        return pipe(**self.arguments(batch)).images

    def loss(self, session, batch):
        assert len(batch.made) == len(batch.examples)
        return torch.zeros(len(batch.examples)) + 0 * self.trained.factor.sum()


class Nothing(GateUser):
    name = "nothing"
    fitting = NothingFitter


class LoraOf(LoraFitter):
    rank = 2
    targets = ("to_q", "to_v")
    rate = 1e-2

    def loss(self, session, batch):
        noise = torch.randn(len(batch.examples), 4, 16, 16, generator=batch.generator)
        text = self.conditioning(batch)
        return session.model(noise, 500, **text, return_dict=False)[0].square().mean((1, 2, 3))

    wants = frozenset({"prompts"})


class LoraUser(Probe):
    name = "lora_user"
    Config = GateConfig
    fitting = LoraOf


def pictures(number: int = 6) -> list[Example]:
    return [Example(f"picture {i}", Image.new("RGB", (40, 36), (40 * i, 100, 255 - 40 * i))) for i in range(number)]


def bare() -> Any:
    return unload(tiny("StableDiffusionPipeline")[0])


def run(out: Path, steps: int = 6, plugin: Any = None, examples: Any = None, pipe: Any = None, **more: Any) -> Any:
    plan = FitPlan(steps, batch=4, keep_every=more.pop("keep_every", 0))
    examples = pictures() if examples is None else examples
    return fit(pipe or bare(), plugin or GateUser(), examples, SETTINGS, out, plan, **more)


if __name__ == "__main__":  # tells each step, so that the test knows when to kill
    run(Path(sys.argv[1]), on_progress=lambda phase, done, total: print(done, flush=True))
