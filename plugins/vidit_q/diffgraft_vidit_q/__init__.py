"""ViDiT-Q: weights and activations of a diffusion transformer in few bits (arXiv 2406.02540).

(Zhao, Fang, Huang, Liu, Wan, Soedarmadji, Li, Lin, Dai, Yan, Yang, Ning, Wang.) Weights lie on one grid for each output channel,
activations on one for each token, made of that token as it comes. What is large in some channels only is moved from the activations to the
weights, by factors that are measured for ranges of timesteps, and the layers that suffer most get more bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from diffgraft import ArtefactMismatch, DenoiseCall, Effects, ModulesCall, Need, Plugin, RunCall, Target, Unsupported, denoisers_of, now
from diffgraft.methods.artefacts import Artefact, make_again_with
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.export import kernels_of
from diffgraft.methods.quant.kept import unpacked
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import Layer, QuantLayer, QuantLinear, ensure_current, put, quantised, quantised_in
from diffgraft.methods.quant.rotation import Rotation
from diffgraft.methods.quant.told import simulated
from torch import Tensor, nn

from diffgraft_vidit_q.calibration import HOLDS, Measure, wanted
from diffgraft_vidit_q.knobs import PAPER, ViDiTQConfig
from diffgraft_vidit_q.method import balance, group_of, raised, range_of

__all__ = ["ViDiTQ"]
__version__ = "0.1.0"

RAISED = 8
"""Bits of the weights that mixed precision raises."""


@dataclass
class Where:
    """Of a run (``call.shared``): which range of timesteps it is in."""

    range: Tensor | int = 0


class ViDiTQ(Plugin):
    name = "vidit_q"
    paper = PAPER
    families = ("dits",)
    Config = ViDiTQConfig
    State = Where
    neutral: ClassVar[dict[str, Any]] = {"bits": "w32a32"}
    active: ClassVar[dict[str, Any]] = {"bits": "w4a8"}
    sessions = True
    # a token's scale is its own; but the last bits of a batch's matrix products differ from those of one row's, and bits decide roundings
    effects = Effects(edits=frozenset({"weights"}), couples_batch=True)
    needs = (Need("artefact", "artefact", fits=frozenset(), holds=HOLDS),)
    calibration = Measure
    config: ViDiTQConfig

    def check(self, target: Target) -> None:
        ensure_current(target.denoisers, self.name)
        layers = wanted(target.denoisers, self.config, (nn.Linear, QuantLinear))
        if not layers:
            raise Unsupported(f"vidit_q: {type(target.pipe).__name__} has no linear layer in a list of blocks that is not kept")
        artefact = target.given.get("artefact")
        if artefact is None:
            if self.config.mixed > 0 and not self.config.is_off:
                raise ArtefactMismatch(f"vidit_q: mixed = {self.config.mixed}: which layers suffer is measured; {self.again()}")
            return
        facts, ranges = artefact.facts, list(self.config.ranges)
        if "ranges" in self.own_knobs and facts["ranges"] != ranges:
            raise ArtefactMismatch(f"vidit_q: ranges = {ranges}: the artefact was made for {facts['ranges']}; {self.again()}")
        for layer in layers:
            found, channels = facts["shapes"].get(layer.key), layer.module.in_features
            if found is None or found[1] != channels:
                has = "none of its name" if found is None else f"one of {found[1]}"
                raise ArtefactMismatch(f"vidit_q: {layer.key} has {channels} input channels, the artefact {has}; {self.again()}")
        if self.config.mixed > 0 and facts["weight_bits"] not in (0, self.config.weight_bits):
            raise ArtefactMismatch(
                f"vidit_q: mixed = {self.config.mixed}: what suffers was measured at w{facts['weight_bits']}, and these are "
                f"w{self.config.weight_bits}; {self.again()}"
            )
        if self.config.mixed > 0 and (lost := {group_of(layer.key) for layer in layers} - set(facts["groups"])):
            raise ArtefactMismatch(f"vidit_q: mixed = {self.config.mixed}: the artefact says nothing of {min(lost)}; {self.again()}")

    def again(self) -> str:
        """How to get an artefact that fits, with the knobs that it depends on."""
        knobs = {"bits": self.config.bits, "mixed": self.config.mixed, "ranges": self.config.ranges}
        return make_again_with(self.name, {name: knobs[name] for name in knobs if name in self.own_knobs})

    def modules(self, call: ModulesCall, next: Any) -> None:
        if not self.config.is_off:
            artefact: Artefact | None = call.given("artefact")
            layers = wanted(call.denoisers, self.config)
            sizes = {} if artefact is None else unpacked(artefact.tensors["size"], artefact.facts["shapes"])
            bits = self.bits_of(layers, artefact)
            inputs = None if self.config.input_bits == FLOAT else UniformAffine(self.config.input_bits, "token")
            for layer in layers:
                weight = None if bits[layer.key] == FLOAT else UniformAffine(bits[layer.key], "channel", self.config.symmetric)
                s = None
                if sizes and weight is not None:  # weights in floats are left as they are, and so are the inputs' channels
                    s = balance(sizes[layer.key].to(layer.module.weight.device), layer.module.weight, self.config.alpha)
                turns = self.config.rotate and weight is not None and layer.module.in_features % 2 == 0  # of an odd number nothing is mixed
                turn = Rotation(layer.module.in_features).to(layer.module.weight.device) if turns else None
                put(call.swap, layer, quantised(layer.module, weight, inputs, balance=s, pick=pick, rotation=turn))
        next(call)

    def bits_of(self, layers: list[Layer], artefact: Artefact | None) -> Mapping[str, int]:
        """Bits of the weights by layer: those of the most sensitive groups are raised."""
        least = self.config.weight_bits
        if artefact is None or self.config.mixed == 0 or least >= RAISED:
            return {layer.key: least for layer in layers}
        sizes: dict[str, int] = {}
        for layer in layers:
            sizes[group_of(layer.key)] = sizes.get(group_of(layer.key), 0) + layer.module.weight.numel()
        damage = dict(
            zip(artefact.facts["groups"], artefact.tensors["damage"].tolist(), strict=True)
        )  # check: allow host_sync because the artefact is on the CPU
        up = raised(damage, sizes, self.config.mixed)
        return {layer.key: RAISED if group_of(layer.key) in up else least for layer in layers}

    def run(self, call: RunCall, next: Any) -> Any:
        if self.config.is_off:
            call.note("inactive: w32a32 leaves every layer as it is")
            return next(call)
        denoisers = denoisers_of(call.pipe, call.family)
        how = self.how(call.given("artefact"), [*quantised_in(denoisers).values()])
        call.note(f"{simulated(denoisers, self.name, self.config.bits, how)}; {kernels_of(denoisers)}")
        return next(call)

    def how(self, artefact: Artefact | None, layers: Sequence[QuantLayer]) -> str:
        """What was done to layers beside rounding them, in words."""
        if self.config.weight_bits == FLOAT:
            return f"not balanced{' or rotated' if self.config.rotate else ''}: weights are floats"
        said = ["not balanced: no artefact" if artefact is None else "balanced"]
        if self.config.rotate:
            rotated = sum(layer.rotation is not None for layer in layers)
            said.append("rotated" if rotated == len(layers) else f"{rotated} of {len(layers)} rotated (the others have odd widths)")
        if self.config.mixed > 0 and self.config.weight_bits >= RAISED:
            said.append("no weight needs more bits")
        elif self.config.mixed > 0:
            up = sum(layer.weights[0].grid.bits > self.config.weight_bits for layer in layers)  # type: ignore[operator, union-attr]
            said.append(f"mixed {self.config.mixed}: {up or 'no'} layers in {RAISED} bits{'' if up else ', each group is a larger share'}")
        return ", ".join(said)

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        artefact: Artefact | None = call.given("artefact")
        if artefact is not None and artefact.facts["ranges"]:
            call.shared.range = range_of(call.step.t.reshape(()), artefact.facts["ranges"]).to(call.sample.device)
        return next(call)  # type: ignore[no-any-return]


def pick() -> Tensor | int:
    """The range that the run in progress is in.

    Raises:
        Unsupported: none is in progress.
    """
    run = now()
    if run is None:
        raise Unsupported(
            "vidit_q: balanced for several ranges of timesteps, and outside of a run nobody says which; ask through the pipeline"
        )
    found: Tensor | int = run.shared("vidit_q").range
    return found
