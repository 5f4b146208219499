"""What ViDiT-Q measures: how large each input channel of each layer gets in each range of timesteps, and how much a group's bits matter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import Calibrator, ConfigError, DenoiseCall, ModulesCall, RunCall, now, root_of
from diffgraft.methods.quant.affine import UniformAffine
from diffgraft.methods.quant.kept import Shapes, misfit, packed
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import Layer, QuantLayer, QuantLinear, chosen, ensure_finite, in_place_of, layers_of, put, quantised
from diffgraft.methods.schema import Holds, Values
from torch import Tensor, nn
from typing_extensions import TypedDict

from diffgraft_vidit_q.knobs import PAPER, ViDiTQConfig
from diffgraft_vidit_q.method import MOMENTUM, channel_size, group_of, range_of

LOOKS = 4
"""Steps of a run at which the groups' damage is measured."""


class Facts(TypedDict):
    """Of an artefact: the shapes of a_c by layer, the ranges they were taken in, and the groups whose damage was measured, in order, with
    the bits that their weights had (0: none was)."""

    shapes: Shapes
    ranges: list[int]
    groups: list[str]
    weight_bits: int


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with an artefact, or None."""
    rows = len(facts["ranges"]) + 1
    if other := next((name for name, shape in facts["shapes"].items() if len(shape) != 2 or shape[0] != rows), None):
        return f"{other!r} has shape {facts['shapes'][other]}, not [{rows}, channels]"
    if len(facts["groups"]) != len(tensors.get("damage", ())):
        return "the tensor 'damage' and the fact 'groups' are not of one length"
    return misfit(tensors["size"], facts["shapes"])


HOLDS = Holds({"size": Values(("values",), low=0), "damage": Values(("groups",), low=0, optional=True)}, Facts, wrong)


def wanted(denoisers: Mapping[str, nn.Module], config: ViDiTQConfig, kinds: tuple[type, ...] = (nn.Linear,)) -> list[Layer]:
    """The linears inside the blocks of the denoisers, but for embedders: as in the official code, what is outside of them stays floats.

    Raises:
        ConfigError: ``keep`` names a layer that the model does not have.
    """
    lists = {
        f"{model}.{name}"
        for model, denoiser in denoisers.items()
        for name, part in root_of(denoiser).named_children()
        if type(part) is nn.ModuleList
    }
    layers = list(layers_of(denoisers, kinds))
    out = {layer.key for layer in chosen(layers, config.keep, "plugin 'vidit_q': keep")}
    inside = [layer for layer in layers if ".".join(layer.key.split(".")[:2]) in lists and layer.path.split(".")[1].isdecimal()]
    return [layer for layer in inside if layer.key not in out and "emb" not in layer.path]


@dataclass
class Seen:
    """Of a run: the range of the step, one-hot [ranges, 1]; sums of a_c [ranges, C] and how many [ranges], by layer; damage by group."""

    at: Tensor | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, Tensor] = field(default_factory=dict)
    damage: dict[str, Tensor] = field(default_factory=dict)
    looks: int = 0

    def add(self, key: str, x: Tensor) -> None:
        """Take an input of a layer into the mean of the range that the run is in."""
        if self.at is None:
            return
        if key not in self.sums:
            self.sums[key] = torch.zeros(len(self.at), x.shape[-1], device=x.device)
            self.counts[key] = torch.zeros(len(self.at), device=x.device)
        if x.numel() > 0:  # else no tokens, of a picture that was not given
            old = self.sums[key]
            self.sums[key] = torch.where(self.at, MOMENTUM * old + (1 - MOMENTUM) * channel_size(x), old)
            self.counts[key] = self.counts[key] + self.at[:, 0].float()


class Measure(Calibrator):
    """Records of one run: "sum.<layer>" [ranges, C] and "count.<layer>" [ranges], a mean with momentum that began at 0; "damage.<group>",
    the relative squared error of the prediction where that group alone is in few bits, summed over "looks" steps."""

    name = "vidit_q_calibration"
    paper = PAPER
    Config = ViDiTQConfig
    State = Seen
    config: ViDiTQConfig

    def modules(self, call: ModulesCall, next: Any) -> None:
        for layer in wanted(call.denoisers, self.config):
            put(call.swap, layer, self.seeing(layer))
        next(call)

    def seeing(self, layer: Layer) -> QuantLayer:
        """The layer, which shows its inputs and can be switched to few bits."""
        few = self.config.mixed > 0 and self.config.weight_bits != FLOAT
        grid = UniformAffine(self.config.weight_bits, "channel", self.config.symmetric) if few else None
        new = in_place_of(layer.module) if grid is None else quantised(layer.module, grid)
        new.active = False

        def see(x: Tensor, name: str = self.name, key: str = layer.key) -> None:
            if (run := now()) is not None:
                run.shared(name).add(key, x)

        new.see = see
        return new

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        seen: Seen = call.shared
        number = range_of(call.step.t.reshape(()), self.config.ranges)
        seen.at = (torch.arange(len(self.config.ranges) + 1, device=number.device) == number)[:, None].to(call.sample.device)
        v: Tensor = next(call)
        seen.at = None
        if self.config.mixed > 0 and call.step.stage == 0 and call.step.index % max(call.step.total // LOOKS, 1) == 0:
            self.look(call, next, v)
        return v

    def look(self, call: DenoiseCall, next: Any, v: Tensor) -> None:
        """Ask again with each group in few bits."""
        seen: Seen = call.shared
        groups: dict[str, list[Any]] = {}
        for module in call.model.modules():
            if isinstance(module, QuantLinear):
                groups.setdefault(group_of(module.key), []).append(module)
        for group, layers in groups.items():
            for layer in layers:
                layer.active = True
            try:
                error = (next(call).float() - v.float()).pow(2).sum() / v.float().pow(2).sum()
            finally:
                for layer in layers:
                    layer.active = False
            seen.damage[group] = seen.damage.get(group, 0) + error
        seen.looks += 1

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        seen: Seen = call.shared
        ensure_finite(seen.sums, "vidit_q")
        return {
            **{f"sum.{key}": value for key, value in seen.sums.items()},
            **{f"count.{key}": value for key, value in seen.counts.items()},
            **{f"damage.{key}": value.reshape(1) / max(seen.looks, 1) for key, value in seen.damage.items()},
        }

    def summarise(self, records: Sequence[dict[str, Tensor]]) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ "size": a_c [ranges, C] of all layers, packed; "damage" [groups]."""
        rows = len(self.config.ranges) + 1
        means: dict[str, Tensor] = {}
        counts: dict[str, Tensor] = {}
        damage: dict[str, Tensor] = {}
        for record in records:
            for name, total in record.items():
                what, _, key = name.partition(".")
                if what == "sum":
                    n = record[f"count.{key}"]
                    means[key] = means.get(key, torch.zeros_like(total)) * (MOMENTUM**n)[:, None] + total
                    counts[key] = counts.get(key, torch.zeros(rows)) + n
                elif what == "damage":
                    damage[key] = damage.get(key, torch.zeros(1)) + total / len(records)
        seen = sum(counts.values(), torch.zeros(rows))
        if bool((seen == 0).any()):
            empty = [*self.config.ranges, "the end"][int((seen == 0).nonzero()[0])]
            raise ConfigError(f"plugin 'vidit_q': ranges = {self.config.ranges}: no step of the calibration is in the range up to {empty}")
        # each mean was begun at 0, so it is short of its whole weight; of a layer that got nothing it stays 0
        whole = {key: (1 - MOMENTUM**n).clamp(min=1 - MOMENTUM)[:, None] for key, n in counts.items()}
        flat, shapes = packed({key: mean / whole[key] for key, mean in means.items()})
        bits = self.config.weight_bits if damage else 0
        facts = {"shapes": shapes, "ranges": list(self.config.ranges), "groups": sorted(damage), "weight_bits": bits}
        return {"size": flat, **({"damage": torch.cat([damage[group] for group in sorted(damage)])} if damage else {})}, facts
