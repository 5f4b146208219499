"""What PTQ4DM measures: the range of each layer's inputs, at timesteps that are drawn."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from diffgraft import DenoiseCall, ModulesCall, Schedule, ScheduleCall, Target
from diffgraft.methods.quant.blocks import Asked, Keeping, Kept, active, on_cpu, replay
from diffgraft.methods.quant.kept import Shapes, keep, misfit
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import put, quantised_in
from diffgraft.methods.quant.ranges import MOST, measure
from diffgraft.methods.schema import Holds, Values
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_ptq4dm.knobs import PAPER, PLAN, PTQ4DMConfig
from diffgraft_ptq4dm.method import drawn, searched, step_of, uniform
from diffgraft_ptq4dm.plan import made, wanted


class Facts(TypedDict):
    """Of an artefact: the shapes of its scales by layer, and the knobs that it was made for."""

    scales: Shapes
    up: Shapes
    plan: dict[str, Any]


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with an artefact, or None."""
    return misfit(tensors["scales"], facts["scales"])


HOLDS = Holds({"scales": Values(("values",), low=0)}, Facts, wrong)


def plan_of(config: PTQ4DMConfig) -> dict[str, Any]:
    """The knobs that an artefact is made for, as JSON has them."""
    values = config.model_dump(mode="json", include=set(PLAN))
    return {name: values[name] for name in PLAN}


@dataclass
class Drawn(Kept):
    """Of a run: how often each step is kept, by its number; the timesteps of its schedule; the seed of its noise."""

    often: list[int] | None = None
    timesteps: Tensor | None = None


class Measure(Keeping):
    """Records of one run: the denoiser's calls at the timesteps that were drawn for it, both halves of guidance."""

    name = "ptq4dm_calibration"
    paper = PAPER
    Config = PTQ4DMConfig
    State = Drawn
    config: PTQ4DMConfig

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.config):
            new = made(layer, self.config)
            new.active = False
            put(call.swap, layer, new)
        next(call)

    def schedule(self, call: ScheduleCall, next: Any) -> Schedule:
        schedule: Schedule = next(call)
        call.shared.timesteps = schedule.timesteps
        return schedule

    def keeps(self, call: DenoiseCall) -> int:
        seen: Drawn = call.shared
        if seen.often is None:
            seen.often = self.draw(call)
        return seen.often[call.step.index] if call.step.stage == 0 else 0

    def draw(self, call: DenoiseCall) -> list[int]:
        """How often each step of the run is kept: from its generator's seed, so that a repeated run draws the same."""
        total, one = call.step.total, call.generator[0] if isinstance(call.generator, list) else call.generator
        generator = torch.Generator().manual_seed(0 if one is None else one.initial_seed() % 2**63)
        config, count = self.config, self.config.draws
        t = drawn(count, total, config.mu, config.sd, generator) if config.timesteps == "normal" else uniform(count, total, generator)
        # the official state after reverse step number t is what the denoiser is asked at the next step
        step = (t + 1).clamp(max=total - 1) if config.official_compat else step_of(t, total)
        return torch.bincount(step, minlength=total).tolist()  # check: allow host_sync because it is on the CPU

    def kept(self, call: DenoiseCall) -> Asked:
        asked = super().kept(call)
        if self.config.official_compat:
            seen, total = call.shared, call.step.total
            labels = seen.timesteps[-total:]
            label = labels[step_of(torch.tensor(call.step.index - 1).clamp(min=0), total)]
            asked = on_cpu(Asked(asked.model, {**asked.arguments, call.family.timestep: label}, asked.rows))
        return asked

    def summarise(self, records: Sequence[dict[str, Tensor]], target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ "scales" of weights and inputs."""
        layers = quantised_in(target.denoisers)
        if self.config.input_bits != FLOAT:
            most = max(MOST // len(records), 64)
            with active(layers, True):
                measure(layers, lambda: replay(records, target), "ptq4dm", partial(searched, p=self.config.p), most)
        tensors, facts = keep(layers)
        return {"scales": tensors["scales"]}, {**facts, "plan": plan_of(self.config)}
