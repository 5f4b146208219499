"""PTQ4DM: U-Nets in 8 bits, calibrated at the timesteps that matter (arXiv 2211.15736).

(Shang, Yuan, Xie, Wu, Yan.) Activations of a denoiser have other ranges at each timestep. The states that calibrate them are made by the
model itself, on its way from noise, and kept at timesteps drawn from a normal distribution, which lies towards the finished picture.
"""

from __future__ import annotations

from typing import Any, ClassVar

from diffgraft import Effects, Family, ModulesCall, Need, Plugin, RunCall, Target, Unsupported, denoisers_of
from diffgraft.methods.artefacts import Artefact, make_again_with
from diffgraft.methods.quant.affine import nearest_scale
from diffgraft.methods.quant.blocks import ensure_replayable, replayable
from diffgraft.methods.quant.kept import as_made, ensure_made_for, fill
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, ensure_current, put, quantised_in
from diffgraft.methods.quant.told import simulated
from torch import nn

from diffgraft_ptq4dm.calibration import HOLDS, Measure
from diffgraft_ptq4dm.knobs import PAPER, PLAN, PTQ4DMConfig
from diffgraft_ptq4dm.plan import made, wanted

__all__ = ["PTQ4DM"]
__version__ = "0.1.0"


class PTQ4DM(Plugin):
    name = "ptq4dm"
    paper = PAPER
    families = ("unets",)
    Config = PTQ4DMConfig
    neutral: ClassVar[dict[str, Any]] = {"bits": "w32a32"}
    active: ClassVar[dict[str, Any]] = {"bits": "w4a8", "draws": 2}
    sessions = True
    # without an artefact a range is that of the whole tensor; with one, a batch's last bits differ from one row's, and decide roundings
    effects = Effects(edits=frozenset({"weights"}), couples_batch=True)
    needs = (Need("artefact", "artefact", fits=frozenset(), holds=HOLDS),)
    calibration = Measure
    config: PTQ4DMConfig

    @classmethod
    def claims(cls, family: Family) -> bool:
        """All whose calls a calibration can ask again."""
        return super().claims(family) and replayable(family)

    def check(self, target: Target) -> None:
        ensure_replayable(target, self.name)
        ensure_current(target.denoisers, self.name)
        artefact: Artefact | None = target.given.get("artefact")
        knobs = as_made(self.config, artefact)
        layers = wanted(target.denoisers, knobs, (nn.Linear, nn.Conv2d, QuantLinear, QuantConv2d))
        if not layers:
            raise Unsupported(f"ptq4dm: {type(target.pipe).__name__} has no linear layer or convolution that is not kept")
        if artefact is not None and not knobs.is_off:
            ensure_made_for(artefact.facts, self.config, [layer.key for layer in layers], self.name, self.again())

    def again(self) -> str:
        """How to get an artefact that fits, with the knobs that it depends on."""
        return make_again_with(self.name, {name: value for name, value in self.own_knobs.items() if name in PLAN})

    def modules(self, call: ModulesCall, next: Any) -> None:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if not knobs.is_off:
            for layer in wanted(call.denoisers, knobs):
                put(call.swap, layer, made(layer, knobs, None if artefact is None else nearest_scale))
            if artefact is not None:
                fill(quantised_in(call.denoisers), artefact.tensors, artefact.facts, self.again())
        next(call)

    def run(self, call: RunCall, next: Any) -> Any:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if knobs.is_off:
            call.note("inactive: w32a32 leaves every layer as it is")
            return next(call)
        how = "calibrated" if artefact is not None else "not calibrated: no artefact"
        call.note(simulated(denoisers_of(call.pipe, call.family), self.name, knobs.bits, how))
        return next(call)
