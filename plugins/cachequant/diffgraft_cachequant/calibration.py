"""What CacheQuant measures: how far features are from older ones and what affine map leads from these to them, in what range the inputs of
each layer lie at each U-Net call, and what quantised weights make of the feature that is cached.

One plain run a prompt. What is kept of it are sums, so that memory depends on the number of U-Net calls and not on that of prompts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from diffgraft import BlockCall, Calibrator, DenoiseCall, ModulesCall, RunCall, Target, now
from diffgraft.methods.quant.affine import UniformAffine, nearest_scale, searched_scale
from diffgraft.methods.quant.kept import Shapes, keep, misfit, unpacked
from diffgraft.methods.quant.knobs import FLOAT
from diffgraft.methods.quant.layers import Layer, QuantConv2d, QuantLayer, ensure_finite, in_place_of, put
from diffgraft.methods.schema import Holds, Values
from diffgraft.methods.skips import bypassed, ensure_branch, is_on_the_way_up
from torch import Tensor
from typing_extensions import TypedDict

from diffgraft_cachequant.knobs import PAPER, CacheQuantConfig
from diffgraft_cachequant.layers import OURS, on_grids, readers, splits, wanted
from diffgraft_cachequant.method import affine, merged, moments

MOST = 1e6
"""Largest |a| and |b| that is taken for a measurement."""


class Facts(TypedDict):
    """Of an artefact: the branch and the interval that it was made for, the bits, how inputs are ranged, what is corrected, the layers that
    stay floats, and the shapes of the scales by layer."""

    branch: int
    interval: int
    bits: str
    inputs: Literal["fixed", "dynamic"]
    correct: Literal["both", "cache", "quantisation", "off"]
    keep: list[str]
    scales: Shapes


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with an artefact, or None."""
    if facts["interval"] < 1 or facts["branch"] < 0:
        return f"interval = {facts['interval']}, branch = {facts['branch']}: no such"
    if "scales" not in tensors:
        return f"it has no scales, and its bits are {facts['bits']}" if facts["scales"] else None
    halves = [name.partition(".") for name in tensors if name.startswith(("gain.", "offset."))]
    if {key for kind, _, key in halves if kind == "gain"} != {key for kind, _, key in halves if kind == "offset"}:
        return "a layer has a gain and no offset, or an offset and no gain"
    if why := misfit(tensors["scales"], facts["scales"]):
        return why
    steps = {name: value for name, value in unpacked(tensors["scales"], facts["scales"]).items() if name.endswith(".delta")}
    if none := next((name for name, value in steps.items() if not bool((value > 0).all())), None):
        return f"{none} holds a step that is not above 0"
    return None


HOLDS = Holds(
    tensors={
        "distance": Values(("T", "W"), low=0, infinite=True),
        "gain": Values(("T", "W", "C"), low=-MOST, high=MOST),
        "offset": Values(("T", "W", "C"), low=-MOST, high=MOST),
        "gain.*": Values(("T", "outputs"), low=-MOST, high=MOST),
        "offset.*": Values(("T", "outputs"), low=-MOST, high=MOST),
        "scales": Values(("values",), optional=True),
    },
    facts=Facts,
    also=wrong,
)


@dataclass
class Measured:
    """Of a branch: its last W features with the numbers of their calls. Of the run (``call.shared``): what was measured, and the number of
    the call that is in progress."""

    at: int = -1
    calls: int = 0
    ages: int = 1
    feature: Tensor | None = None
    history: list[tuple[int, Tensor]] = field(default_factory=list)
    records: dict[str, Tensor] = field(default_factory=dict)

    def range_of(self, key: str, parts: Sequence[Tensor]) -> None:
        """Take inputs of a layer, cut as its weights are, into the range of this call."""
        if not parts[0].numel():
            return
        if f"low.{key}" not in self.records:
            for name, value in (("low", torch.inf), ("high", -torch.inf)):
                self.records[f"{name}.{key}"] = torch.full((self.calls, len(parts)), value, device=parts[0].device)
        low, high = self.records[f"low.{key}"], self.records[f"high.{key}"]
        low[self.at] = torch.minimum(low[self.at], torch.stack([part.min() for part in parts]).float())
        high[self.at] = torch.maximum(high[self.at], torch.stack([part.max() for part in parts]).float())

    def add(self, name: str, found: Tensor, *place: int) -> None:
        """Merge moments into those of a place."""
        kept = self.records.setdefault(name, torch.zeros(5, *self.sizes(name), found.shape[1], device=found.device))
        index = (slice(None), *place)
        kept[index] = merged(kept[index], found)

    def sizes(self, name: str) -> tuple[int, ...]:
        return (self.calls, self.ages) if name == "feature" else (self.calls,)


class Measure(Calibrator):
    """Records of one run, T calls and ages 1 .. W: "distance" [T, W]; "feature" [5, T, W, C], moments of older features and this one;
    "low.<layer>" and "high.<layer>" [T, parts], the range of its inputs; "reader.<layer>" [5, T, outputs], moments of what the quantised
    layer and the plain one make of the half of its input that is cached."""

    name = "cachequant_calibration"
    paper = PAPER
    Config = CacheQuantConfig
    State = Measured
    config: CacheQuantConfig

    def check(self, target: Target) -> None:
        ensure_branch(target.blocks, self.config.branch, "cachequant")

    def select_blocks(self, blocks: Any) -> Any:
        return bypassed(blocks, self.config.branch, "cachequant")

    # what is seen --------------------------------------------------------------------------------------------------------------------

    def modules(self, call: ModulesCall, next: Any) -> None:
        if self.config.quantises:
            layers = wanted(call.denoisers, self.config)
            cut = splits(layers, call.denoisers) if self.config.weight_bits != FLOAT else {}
            read = readers(list(cut), call.denoisers, self.config.branch) if self.config.corrects_quantisation else []
            for layer in layers:
                put(call.swap, layer, self.seeing(layer, cut.get(layer.key, 0), layer.key in read))
        next(call)

    def seeing(self, layer: Layer, split: int, reads: bool) -> QuantLayer:
        """The plain layer, which shows its inputs; one that reads the cache with its weights on their grid beside it."""
        new = on_grids(layer, self.config, split, 1, searched_scale) if reads else in_place_of(layer.module)
        new.active = False

        def see(x: Tensor, name: str = self.name, key: str = layer.key) -> None:
            if (run := now()) is not None and (seen := run.shared(name)).at >= 0:
                seen.range_of(key, x.split((split, x.shape[1] - split), 1) if split else (x,))
                if reads:
                    assert isinstance(new, QuantConv2d)
                    seen.add(f"reader.{key}", read_half(new, x[:, :split], self.config.input_bits), seen.at)

        new.see = see
        return new

    def block(self, call: BlockCall, next: Any) -> Any:
        out = next(call)
        if is_on_the_way_up(call.info):  # the last one feeds the branch
            call.state.feature = out[0] if isinstance(out, tuple) else out
        return out

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        state, shared = call.state, call.shared
        i, T = call.step.call, call.step.calls
        if call.extra or (state.history and state.history[-1][0] == i):  # skip-layer guidance; asked again for one step
            return next(call)  # type: ignore[no-any-return]
        shared.at, shared.calls, shared.ages = i, T, max(1, min(2 * self.config.interval, T) - 1)
        v: Tensor = next(call)
        shared.at = -1
        F = state.feature
        distance = shared.records.setdefault("distance", torch.full((T, shared.ages), torch.inf, device=F.device))
        for j, old in state.history:
            if old.shape == F.shape and 1 <= i - j <= shared.ages:
                place = i, i - j - 1
                before = torch.where(distance[place].isinf(), 0.0, distance[place])
                distance[place] = before + (F.float() - old.float()).abs().sum()
                shared.add("feature", moments(old, F), *place)
        if "feature" not in shared.records:  # of a run of one call nothing else would be there
            shared.records["feature"] = torch.zeros(5, T, shared.ages, F.shape[1], device=F.device)
        state.history = [*state.history, (i, F)][-shared.ages :]
        state.feature = None
        return v

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        records: dict[str, Tensor] = call.shared.records
        for kind, unasked in (("low.", torch.inf), ("high.", -torch.inf)):
            ranges = {name.removeprefix(kind): value for name, value in records.items() if name.startswith(kind)}
            ensure_finite({key: value[value != unasked] for key, value in ranges.items()}, "cachequant")
        ensure_finite({"the part that is cached": records["feature"]}, "cachequant")
        return dict(records)

    # what is made of it --------------------------------------------------------------------------------------------------------------

    def summarise(self, records: Sequence[dict[str, Tensor]], target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ "distance" [T, W], the mean over the prompts; "gain" and "offset" [T, W, C] of the cached feature, "gain.<layer>" and
        "offset.<layer>" [T, outputs] of the layers that read it; "scales" of all layers, packed."""
        sums: dict[str, Tensor] = {}
        joined = {"distance": torch.add, "low": torch.minimum, "high": torch.maximum, "feature": merged, "reader": merged}
        for record in records:
            for name, value in record.items():
                join = joined[name.partition(".")[0]]
                sums[name] = join(sums[name], value.double()) if name in sums else value.double()
        tensors = {"distance": (sums["distance"] / len(records)).float()}
        tensors["gain"], tensors["offset"] = affine(sums["feature"])
        for name, value in sums.items():
            if name.startswith("reader."):
                key = name.removeprefix("reader.")
                tensors[f"gain.{key}"], tensors[f"offset.{key}"] = affine(value)
        scales, shapes = self.scales(sums, target, len(tensors["distance"])) if self.config.quantises else (None, {})
        facts = {
            "branch": self.config.branch,
            "interval": self.config.interval,
            "bits": self.config.bits,
            "inputs": self.config.inputs,
            "correct": self.config.correct,
            "keep": list(self.config.keep),
            "scales": shapes,
        }
        return {**tensors, **({} if scales is None else {"scales": scales})}, facts

    def scales(self, sums: Mapping[str, Tensor], target: Target, calls: int) -> tuple[Tensor | None, Shapes]:
        """The scales of all layers that were seen, as :func:`keep` packs them: weights searched, inputs by the whole range."""
        made: dict[str, QuantLayer] = {}
        layers = wanted(target.denoisers, self.config, OURS)
        cut = splits(layers, target.denoisers) if self.config.weight_bits != FLOAT else {}
        for layer in layers:
            if f"low.{layer.key}" in sums:
                new = on_grids(layer, self.config, cut.get(layer.key, 0), calls, searched_scale)
                low, high = (filled(sums[f"{name}.{layer.key}"].float()) for name in ("low", "high"))
                for part, rounder in enumerate(new.inputs if self.config.inputs == "fixed" else ()):
                    scale = rounder.grid.scale(low[:, part, None], high[:, part, None])  # type: ignore[operator, union-attr]
                    rounder.delta, rounder.zero = scale  # type: ignore[assignment]
                made[layer.key] = new
        tensors, shapes = keep(made)
        return (tensors["scales"] if made else None), shapes["scales"]


def read_half(layer: QuantConv2d, x: Tensor, bits: int) -> Tensor:
    """Moments [5, outputs] of what the layer with its weights on their grid makes of the first half of its input, and of what the plain one
    does. The input is on a grid of its own range."""
    grid = UniformAffine(bits) if bits != FLOAT else None
    rounded = x if grid is None else grid.rounded(x, nearest_scale(x, grid))
    size = x.shape[1]
    weights = layer.weights[0]().to(layer.weight.dtype)
    on_grid, plain = (layer._conv_forward(z, w[:, :size], None) for z, w in ((rounded, weights), (x, layer.weight)))
    return moments(on_grid, plain)


def filled(value: Tensor) -> Tensor:
    """The range [T, parts] of a layer's inputs; at calls that did not ask it, that of the nearest one before that did, or after."""
    asked = (~value.isinf().any(1)).nonzero().flatten()
    if not len(asked):
        return torch.zeros_like(value)
    places = torch.arange(len(value), device=value.device)
    return value[asked[(torch.searchsorted(asked, places, right=True) - 1).clamp(min=0)]]
