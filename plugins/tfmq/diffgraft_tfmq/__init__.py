"""TFMQ: U-Nets in few bits whose temporal features are kept (arXiv 2311.16503).

(Huang, Gong, Liu, Chen, Liu.) Whatever a quantised U-Net gets wrong about the timestep, it gets wrong in every block. So the time embedding
and all its projections are reconstructed together, as one block, over the timesteps of the schedule; and since these are finitely many,
inputs are rounded with scales of the timestep that it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import (
    DenoiseCall,
    Effects,
    ModulesCall,
    Need,
    Plugin,
    PluginNotFound,
    RunCall,
    Target,
    Unsupported,
    denoisers_of,
    now,
)
from diffgraft.methods.artefacts import Artefact, make_again_with
from diffgraft.methods.quant.affine import Scale
from diffgraft.methods.quant.kept import as_made, ensure_made_for, restore
from diffgraft.methods.quant.knobs import inputs_of, weights_of
from diffgraft.methods.quant.layers import (
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    ensure_current,
    put,
    quantised,
    quantised_in,
)
from diffgraft.methods.quant.told import simulated
from torch import Tensor, nn

from diffgraft_tfmq.calibration import HOLDS, PLAIN, Measure, plan_of, wanted
from diffgraft_tfmq.knobs import PAPER, TFMQConfig
from diffgraft_tfmq.method import is_temporal, nearest_time
from diffgraft_tfmq.path import TimedScales, ensure_known, watched

__all__ = ["TFMQ"]
__version__ = "0.1.0"

QUANTISED = (QuantLinear, QuantConv2d)


@dataclass
class Where:
    """Of a run (``call.shared``): which of the calibrated timesteps it is at, or nearest to; each row's, where they have their own."""

    at: Tensor | int = 0

    def move(self, t: Any, times: Tensor, device: torch.device) -> None:
        """To the nearest to t; nothing waits for the device."""
        self.at = nearest_time(torch.as_tensor(t), times).to(device)


class TFMQ(Plugin):
    name = "tfmq"
    paper = PAPER
    families = ("sd", "sdxl", "pixel", "latent_diffusion")
    Config = TFMQConfig
    State = Where
    neutral: ClassVar[dict[str, Any]] = {"bits": "w32a32"}
    active: ClassVar[dict[str, Any]] = {"bits": "w4a8", "iterations": 3}
    sessions = True
    # not calibrated, a batch's inputs have one scale; calibrated, the last bits of a batch's sums are not one row's, and decide roundings
    effects = Effects(edits=frozenset({"weights"}), couples_batch=True)
    needs = (Need("artefact", "artefact", fits=frozenset(), holds=HOLDS),)
    calibration = Measure
    config: TFMQConfig

    def check(self, target: Target) -> None:
        ensure_current(target.denoisers, self.name)
        for denoiser in target.denoisers.values():
            ensure_known(denoiser)
        artefact: Artefact | None = target.given.get("artefact")
        knobs = as_made(self.config, artefact)
        layers = wanted(target.denoisers, knobs, (*PLAIN, *QUANTISED))
        if not layers:
            raise Unsupported(f"tfmq: {type(target.pipe).__name__} has no layer that is not kept")
        if artefact is None or knobs.is_off:
            return
        keys = [layer.key for layer in layers] if artefact.facts["scales"] else []
        ensure_made_for(artefact.facts, self.config, keys, self.name, self.again())

    def again(self) -> str:
        """How to get an artefact that fits, with the knobs that it depends on."""
        return make_again_with(self.name, {name: value for name, value in self.own_knobs.items() if name in plan_of(self.config)})

    def modules(self, call: ModulesCall, next: Any) -> None:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if not knobs.is_off:
            layers = wanted(call.denoisers, knobs)
            made = {layer.key: made_of(layer.key, layer.module, knobs, artefact) for layer in layers}
            if artefact is not None:
                tensors = {"up": torch.zeros(0, dtype=torch.bool), **artefact.tensors}
                restore(made, tensors, artefact.facts, self.again())
            for layer in layers:
                put(call.swap, layer, made[layer.key])
        next(call)

    def run(self, call: RunCall, next: Any) -> Any:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if knobs.is_off:
            call.note("inactive: w32a32 leaves every layer as it is")
            return next(call)
        denoisers = denoisers_of(call.pipe, call.family)
        call.note(simulated(denoisers, self.name, knobs.bits, rounded_how(denoisers, artefact)))
        return next(call)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        artefact: Artefact | None = call.given("artefact")
        if artefact is None:
            return next(call)  # type: ignore[no-any-return]
        where, times, device = call.shared, artefact.tensors["times"], call.sample.device
        if any("timestep" in each.effects.edits and not each.is_neutral for each in call.others):
            return next(watched(call, lambda t: where.move(t, times, device)))  # type: ignore[no-any-return]
        where.move(call.step.t, times, device)
        return next(call)  # type: ignore[no-any-return]


def made_of(key: str, layer: nn.Linear | nn.Conv2d, knobs: TFMQConfig, artefact: Artefact | None) -> QuantLayer:
    """A layer in the place of a plain one; what an artefact says is still to be restored."""
    inputs = inputs_of(knobs.input_bits)
    new = quantised(layer, weights_of(knobs.weight_bits), inputs)
    if artefact is not None and inputs is not None and f"{key}/inputs.0.delta" in artefact.facts["scales"]:
        blank = torch.ones(len(artefact.tensors["times"]), 1, device=layer.weight.device)
        new.round_inputs([TimedScales(inputs, Scale(blank, blank), pick)])
    return new


def rounded_how(denoisers: Mapping[str, nn.Module], artefact: Artefact | None) -> str:
    """How the weights that are in the pipeline now are rounded, in words."""
    if artefact is None:
        return "to the nearest: no artefact"
    layers = quantised_in(denoisers).items()
    learned = any(is_temporal(key.partition(".")[2]) and weights.up is not None for key, layer in layers for weights in layer.weights)
    return "the time path as learned" if learned else "to the nearest, calibrated"


def pick() -> Tensor | int | None:
    """The calibrated timestep that the run in progress is at; None in a run that tfmq is no part of.

    Raises:
        Unsupported: none is in progress.
    """
    run = now()
    if run is None:
        raise Unsupported("tfmq: inputs have a scale for each timestep, and outside of a run nobody says which; ask through the pipeline")
    try:
        found: Tensor | int = run.shared("tfmq").at
    except PluginNotFound:
        return None
    return found
