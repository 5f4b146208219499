"""TFMQ: U-Nets in few bits whose temporal features are kept (arXiv 2311.16503).

(Huang, Gong, Liu, Chen, Liu.) Whatever a quantised U-Net gets wrong about the timestep, it gets wrong in every block. So the time embedding
and all its projections are reconstructed together, as one block, over the timesteps of the schedule; and since these are finitely many,
inputs are rounded with scales of the timestep that it is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from diffgraft import (
    ArtefactMismatch,
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
from diffgraft.methods.quant.affine import Scale, UniformAffine
from diffgraft.methods.quant.kept import restore
from diffgraft.methods.quant.knobs import FLOAT, bits_in
from diffgraft.methods.quant.layers import (
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    SeveralScales,
    ensure_current,
    put,
    quantised,
)
from diffgraft.methods.quant.told import simulated
from torch import Tensor, nn

from diffgraft_tfmq.calibration import HOLDS, PLAIN, Measure, wanted
from diffgraft_tfmq.knobs import PAPER, TFMQConfig
from diffgraft_tfmq.method import nearest_time
from diffgraft_tfmq.path import ensure_known

__all__ = ["TFMQ"]
__version__ = "0.1.0"

QUANTISED = (QuantLinear, QuantConv2d)


@dataclass
class Where:
    """Of a run (``call.shared``): which of the calibrated timesteps it is at, or nearest to."""

    at: Tensor | int = 0


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
        layers = wanted(target.denoisers, self.config, (*PLAIN, *QUANTISED))
        if not layers:
            raise Unsupported(f"tfmq: {type(target.pipe).__name__} has no layer that is not kept")
        artefact: Artefact | None = target.given.get("artefact")
        if artefact is None or self.config.is_off:
            return
        if "bits" in self.own_knobs and artefact.facts["bits"] != self.config.bits:
            raise ArtefactMismatch(f"tfmq: bits = {self.config.bits}: the artefact was made for {artefact.facts['bits']}; {self.again()}")
        known = {name.partition("/")[0] for name in artefact.facts["scales"]}
        if known and (lost := next((layer.key for layer in layers if layer.key not in known), None)):
            raise ArtefactMismatch(f"tfmq: {lost} is to be quantised, and the artefact says nothing of it; {self.again()}")

    def again(self) -> str:
        """How to get an artefact that fits, with the knobs that it depends on."""
        return make_again_with(self.name, {name: value for name, value in self.own_knobs.items() if name in ("bits", "keep", "scales")})

    def plan(self, artefact: Artefact | None) -> tuple[int, int]:
        """(bits of weights, of activations): an artefact's own where none are asked for."""
        return bits_in(self.config.bits if artefact is None or "bits" in self.own_knobs else artefact.facts["bits"])

    def modules(self, call: ModulesCall, next: Any) -> None:
        artefact: Artefact | None = call.given("artefact")
        if not self.config.is_off:
            layers = wanted(call.denoisers, self.config)
            made = {layer.key: self.made(layer.key, layer.module, artefact) for layer in layers}
            if artefact is not None:
                tensors = {"up": torch.zeros(0, dtype=torch.bool), **artefact.tensors}
                restore(made, tensors, artefact.facts, self.again())
            for layer in layers:
                put(call.swap, layer, made[layer.key])
        next(call)

    def made(self, key: str, layer: nn.Linear | nn.Conv2d, artefact: Artefact | None) -> QuantLayer:
        """A layer in the place of a plain one; what an artefact says is still to be restored."""
        weight_bits, input_bits = self.plan(artefact)
        weight = None if weight_bits == FLOAT else UniformAffine(weight_bits, "channel")
        inputs = None if input_bits == FLOAT else UniformAffine(input_bits)
        new = quantised(layer, weight, inputs)
        if artefact is not None and inputs is not None and f"{key}/inputs.0.delta" in artefact.facts["scales"]:
            blank = torch.ones(len(artefact.tensors["times"]), 1, device=layer.weight.device)
            new.round_inputs([SeveralScales(inputs, Scale(blank, blank), pick)])
        return new

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.is_off:
            call.note("inactive: w32a32 leaves every layer as it is")
            return next(call)
        artefact: Artefact | None = call.given("artefact")
        weights, inputs = self.plan(artefact)
        how = "to the nearest: no artefact" if artefact is None else "the time path as learned"
        call.note(simulated(denoisers_of(call.pipe, call.family), self.name, f"w{weights}a{inputs}", how))
        return next(call)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        artefact: Artefact | None = call.given("artefact")
        if artefact is not None:
            call.shared.at = nearest_time(call.step.t, artefact.tensors["times"]).to(call.sample.device)
        return next(call)  # type: ignore[no-any-return]


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
