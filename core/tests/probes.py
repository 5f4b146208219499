"""Small plugins and helpers that the core's tests share."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from diffgraft import Effects, Paper, Plugin, PluginConfig
from diffgraft.methods.inputs import calling, pictures_in
from diffgraft_pipelines.tiny import make
from diffusers.modular_pipelines import PipelineState

PAPER = Paper("a probe", "0000.00000", "nothing")


class Probe(Plugin):
    """Base of the probes: any family, neutral as it stands."""

    name = "probe"
    paper = PAPER
    families = ("*", "consistency")
    neutral: ClassVar[dict[str, Any]] = {}


class Unguided(Probe):
    """Does nothing at every hook point that all families have, on every block."""

    name = "unguided"

    def run(self, call, next):
        return next(call)

    def schedule(self, call, next):
        return next(call)

    def denoise(self, call, next):
        return next(call)

    def block(self, call, next):
        return next(call)

    def attention(self, call, next):
        return next(call)

    def step(self, call, next):
        return next(call)

    def modules(self, call, next):
        return next(call)

    def select_blocks(self, blocks):
        return blocks


class Everything(Unguided):
    """The same with guidance."""

    name = "everything"

    def guide(self, call, next):
        return next(call)


def tiny(name: str) -> tuple[Any, dict[str, Any]]:
    made = make(name)
    return made.pipe, made.kwargs


def generate(pipe: Any, kwargs: dict[str, Any], seed: int = 0, **more: Any) -> torch.Tensor:
    """The first output of a run, as a tensor."""
    out = calling(pipe)(**{**kwargs, **more}, generator=torch.Generator().manual_seed(seed))
    out = pictures_in(out) if isinstance(out, PipelineState) else out[0]
    return out if isinstance(out, torch.Tensor) else torch.as_tensor(out)


def trace(pipe: Any) -> dict[str, Any]:
    """What a pipeline looks like from outside: attribute names of every part, and which objects are its submodules and processors."""
    seen: dict[str, Any] = {"class": type(pipe), "pipe": sorted(pipe.__dict__), "scheduler": sorted(pipe.scheduler.__dict__)}
    for part, component in pipe.components.items():
        if isinstance(component, torch.nn.Module):
            for path, module in component.named_modules():
                seen[f"{part}.{path}"] = (sorted(module.__dict__), id(module), id(getattr(module, "processor", None)))
    return seen


ENTRY = {
    "name": "good_method",
    "dist": "diffgraft-good-method",
    "summary": "Reuses what hardly changes",
    "paper": {"title": "A Good Method", "arxiv": "2401.00001"},
    "hook_points": ["denoise"],
    "families": ["*"],
    "homepage": "https://github.com/somebody/good",
}
"""A published plugin as the catalogue holds it."""

__all__ = ["ENTRY", "PAPER", "Effects", "Everything", "PluginConfig", "Probe", "Unguided", "generate", "tiny", "trace"]
