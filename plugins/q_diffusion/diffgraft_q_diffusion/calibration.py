"""What Q-Diffusion learns: how each weight is rounded, and the scale of each activation, block by block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from diffgraft import DenoiseCall, ModulesCall, Target
from diffgraft.methods.quant.affine import searched_scale
from diffgraft.methods.quant.blocks import Keeping, Kept, Unit, learned, units_of
from diffgraft.methods.quant.kept import Shapes, keep, misfit
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import put, quantised_in
from diffgraft.methods.quant.ranges import MOST, measure
from diffgraft.methods.quant.rounding import Losses, Outputs, Recipe, learn_rounding, learn_scales
from diffgraft.methods.schema import Holds, Values
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_q_diffusion.knobs import PAPER, PLAN, QDiffusionConfig
from diffgraft_q_diffusion.method import kept_steps
from diffgraft_q_diffusion.plan import made, round_activations, splits_of, wanted

FIRST, AT_ONCE = 64, 4
"""Rows that an activation's range is first measured on, and how many of them in one forward: a softmax is large."""
P = 2.4
"""Of the distance |y_q - y|^p to which activation scales are learned, as in the search of a range."""


class Facts(TypedDict):
    """Of an artefact: the shapes of its scales and roundings by layer, the knobs that it was made for, and of each block the distance to
    what it gives in floats, before and after its rounding ("weights") and its scales ("inputs") were learned; where nothing was, twice
    the same."""

    scales: Shapes
    up: Shapes
    plan: dict[str, Any]
    losses: dict[str, dict[str, list[float]]]


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with an artefact, or None."""
    return misfit(tensors["scales"], facts["scales"]) or misfit(tensors.get("up", torch.zeros(0)), facts["up"])


HOLDS = Holds({"scales": Values(("values",), low=0), "up": Values(("bits",), (torch.bool,), optional=True)}, Facts, wrong)


def plan_of(config: QDiffusionConfig) -> dict[str, Any]:
    """The knobs that an artefact is made for, as JSON has them."""
    values = config.model_dump(mode="json", include=set(PLAN))
    return {name: values[name] for name in PLAN}


class Measure(Keeping):
    """Records of one run: the denoiser's calls at each (steps / timesteps)-th step, both halves of guidance."""

    name = "q_diffusion_calibration"
    paper = PAPER
    Config = QDiffusionConfig
    State = Kept
    config: QDiffusionConfig

    def modules(self, call: ModulesCall, next: Any) -> None:
        splits = splits_of(call.denoisers) if self.config.split else {}
        for layer in wanted(call.denoisers, self.config):
            new = made(layer, self.config, splits, searched_scale)
            new.active = False
            put(call.swap, layer, new)
        next(call)

    def keeps(self, call: DenoiseCall) -> bool:
        return call.step.stage == 0 and call.step.index in kept_steps(call.step.total, self.config.timesteps)

    def summarise(self, records: Sequence[dict[str, Tensor]], target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ "scales" of weights and activations, "up": which weights are rounded up."""
        layers = quantised_in(target.denoisers)
        units = units_of(target, layers)
        losses: dict[str, dict[str, Losses]] = {}
        if self.config.weight_bits != FLOAT:
            losses["weights"] = learned(records, target, units, "weights", self.learn_weights, self.config.batch)
        if self.config.input_bits != FLOAT:
            splits = splits_of(target.denoisers) if self.config.split else {}
            for layer in layers.values():
                round_activations(layer, self.config, splits)
            losses["inputs"] = learned(records, target, units, "inputs", self.learn_inputs, self.config.batch)
        tensors, facts = keep(layers)
        told = {
            stage: {key: [one.before, one.after if one.kept else one.before] for key, one in found.items()}
            for stage, found in losses.items()
        }
        return {name: x for name, x in tensors.items() if x.numel()}, {**facts, "plan": plan_of(self.config), "losses": told}

    def learn_weights(self, unit: Unit, outputs: Outputs, targets: Outputs, count: int) -> Losses:
        """AdaRound on a block's own distance."""
        return learn_rounding(outputs, targets, count, list(unit.layers.values()), Recipe(**self.recipe))

    def learn_inputs(self, unit: Unit, outputs: Outputs, targets: Outputs, count: int) -> Losses:
        """First ranges, by search; then their deltas are learned. A grid of 16 bits stays as it was found."""
        rows = torch.randperm(count, generator=torch.Generator().manual_seed(0))[:FIRST].tolist()
        parts = [rows[i : i + AT_ONCE] for i in range(0, len(rows), AT_ONCE)]
        measure(unit.layers, lambda: [outputs(part) for part in parts], "q_diffusion", most=MOST // len(parts))
        rounders = [one for layer in unit.layers.values() for one in layer.rounders().values() if one.grid.bits < 16]
        recipe = Recipe(**{**self.recipe, "steps": self.config.scale_iterations, "lr": self.config.scale_lr, "p": P})
        return learn_scales(outputs, targets, count, rounders, recipe)

    @property
    def recipe(self) -> dict[str, Any]:
        return asdict(Recipe(steps=self.config.iterations, batch=self.config.batch, lr=self.config.lr))
