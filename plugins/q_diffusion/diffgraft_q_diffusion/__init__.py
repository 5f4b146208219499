"""Q-Diffusion: U-Nets in few bits (arXiv 2302.04304).

(Li, Liu, Lian, Yang, Dong, Kang, Zhang, Keutzer.) What a denoiser gets changes along the timesteps, so it is calibrated on calls of all of
them. The shortcut convolutions of the up blocks get two tensors of different ranges in one: each half has its own grid. How weights are
rounded, and the scales of activations, are learned block by block.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from diffgraft import (
    AttentionCall,
    AttentionInfo,
    Effects,
    Family,
    ModulesCall,
    Need,
    Plugin,
    RunCall,
    Target,
    Unsupported,
    denoisers_of,
)
from diffgraft.methods.artefacts import Artefact, make_again_with
from diffgraft.methods.quant.affine import nearest_scale, searched_scale
from diffgraft.methods.quant.attention import with_rounded_softmax
from diffgraft.methods.quant.blocks import ensure_replayable, replayable
from diffgraft.methods.quant.kept import as_made, ensure_made_for, fill
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import QuantConv2d, QuantLinear, ensure_current, put, quantised_in
from diffgraft.methods.quant.told import simulated
from torch import nn

from diffgraft_q_diffusion.calibration import HOLDS, Measure
from diffgraft_q_diffusion.knobs import PAPER, PLAN, QDiffusionConfig
from diffgraft_q_diffusion.plan import made, round_activations, splits_of, wanted

__all__ = ["QDiffusion"]
__version__ = "0.1.0"


class QDiffusion(Plugin):
    name = "q_diffusion"
    paper = PAPER
    families = ("unets",)
    not_on: ClassVar[dict[str, str]] = {
        "*AdapterPipeline": "a calibration asks calls again block by block, and what an adapter adds inside of them is not kept for it"
    }
    Config = QDiffusionConfig
    neutral: ClassVar[dict[str, Any]] = {"bits": "w32a32"}
    active: ClassVar[dict[str, Any]] = {"bits": "w4a8", "timesteps": 2, "iterations": 3, "scale_iterations": 3, "batch": 8}
    sessions = True
    # without an artefact a range is that of the whole tensor; with one, a batch's last bits differ from one row's, and decide roundings
    effects = Effects(edits=frozenset({"weights", "attention"}), couples_batch=True)
    needs = (Need("artefact", "artefact", fits=frozenset(), holds=HOLDS),)
    calibration = Measure
    config: QDiffusionConfig

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
            raise Unsupported(f"q_diffusion: {type(target.pipe).__name__} has no linear layer or convolution that is not kept")
        if knobs.split:
            splits_of(target.denoisers)
        if artefact is not None and not knobs.is_off:
            ensure_made_for(artefact.facts, self.config, [layer.key for layer in layers], self.name, self.again())

    def again(self) -> str:
        """How to get an artefact that fits, with the knobs that it depends on."""
        return make_again_with(self.name, {name: value for name, value in self.own_knobs.items() if name in PLAN})

    def modules(self, call: ModulesCall, next: Any) -> None:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if not knobs.is_off:
            splits = splits_of(call.denoisers) if knobs.split else {}
            for layer in wanted(call.denoisers, knobs):
                new = made(layer, knobs, splits, searched_scale if artefact is None else nearest_scale)
                put(call.swap, layer, new)
                round_activations(new, knobs, splits)
            if artefact is not None:
                fill(quantised_in(call.denoisers), artefact.tensors, artefact.facts, self.again())
        next(call)

    def select_attention(self, layers: Sequence[AttentionInfo]) -> Sequence[AttentionInfo]:
        return [] if FLOAT in (self.config.input_bits, self.config.softmax) else layers

    def attention(self, call: AttentionCall, next: Any) -> Any:
        return with_rounded_softmax(call.attn, lambda: next(call))

    def run(self, call: RunCall, next: Any) -> Any:
        artefact: Artefact | None = call.given("artefact")
        knobs = as_made(self.config, artefact)
        if knobs.is_off:
            call.note("inactive: w32a32 leaves every layer as it is")
            return next(call)
        denoisers = denoisers_of(call.pipe, call.family)
        split = sum(len(layer.sizes) > 1 for layer in quantised_in(denoisers).values())
        how = "learned" if artefact is not None else "not learned: no artefact"
        call.note(simulated(denoisers, self.name, knobs.bits, f"{how}, {split} layers split"))
        return next(call)
