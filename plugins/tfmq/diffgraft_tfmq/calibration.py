"""What TFMQ measures and learns: ranges of inputs by timestep, and how the time path's weights are rounded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from diffgraft import Calibrator, ConfigError, DenoiseCall, ModulesCall, RunCall, Target, now
from diffgraft.methods.quant.affine import Scale, UniformAffine, searched_scale
from diffgraft.methods.quant.kept import Shapes, keep, misfit
from diffgraft.methods.quant.knobs import FLOAT, bits_in
from diffgraft.methods.quant.layers import (
    Layer,
    Pick,
    QuantConv2d,
    QuantLayer,
    QuantLinear,
    SeveralScales,
    chosen,
    ensure_finite,
    layers_of,
    put,
    quantised,
)
from diffgraft.methods.quant.rounding import Losses, Outputs, Recipe, learn_rounding, mean_distance
from diffgraft.methods.schema import Holds, Values
from torch import Tensor, nn
from typing_extensions import TypedDict

from diffgraft_tfmq.knobs import PAPER, TFMQConfig
from diffgraft_tfmq.method import finite_set, is_kept, is_temporal, similarity
from diffgraft_tfmq.path import TimePath, added, ensure_known, ranges_of

PLAIN = (nn.Linear, nn.Conv2d)
MOST = 512
"""Pairs of a timestep and what is added to it, at most about, that the cosine is taken of."""


class Plan(TypedDict):
    """The knobs that an artefact depends on."""

    bits: str
    scales: str
    keep: list[str]


def plan_of(config: TFMQConfig) -> Plan:
    """These of a config."""
    return {"bits": config.bits, "scales": config.scales, "keep": list(config.keep)}


class Facts(TypedDict):
    """Of an artefact: shapes of what it keeps, the knobs it was made for, TIAR's distance and the features' cosine before and after."""

    scales: Shapes
    up: Shapes
    plan: Plan
    distance: list[float]
    cosine: list[float]


def wrong(tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> str | None:
    """What is wrong with an artefact, or None."""
    if other := next((n for n, s in facts["scales"].items() if "/inputs." in n and s != [len(tensors["times"]), 1]), None):
        return f"{other!r} has shape {facts['scales'][other]}, and there are {len(tensors['times'])} timesteps"
    return misfit(tensors["scales"], facts["scales"]) or misfit(tensors.get("up", torch.zeros(0)), facts["up"])


HOLDS = Holds(
    {
        "times": Values(("timesteps",), low=0),
        "scales": Values(("values",), low=0),
        "up": Values(("weights",), (torch.bool,), optional=True),
    },
    Facts,
    wrong,
)


def wanted(denoisers: Mapping[str, nn.Module], config: TFMQConfig, kinds: tuple[type, ...] = PLAIN) -> list[Layer]:
    """The linears and convolutions of the denoisers that are quantised.

    Raises:
        ConfigError: ``keep`` names a layer that the model does not have.
    """
    layers = list(layers_of(denoisers, kinds))
    out = {layer.key for layer in chosen(layers, config.keep, "plugin 'tfmq': keep")}
    return [layer for layer in layers if layer.key not in out and not is_kept(layer.path)]


@dataclass
class Seen:
    """Of a run: the number of the call; t of each call; what was added to its embedding; ends of the inputs' ranges by layer and call."""

    at: int | None = None
    times: dict[int, Tensor] = field(default_factory=dict)
    added: Tensor | None = None
    ends: dict[str, dict[int, Tensor]] = field(default_factory=dict)


class Measure(Calibrator):
    """Records of one run: "times" [calls], "added" [rows, channels or 0] to their embedding, and "ends.<layer>" [calls, 2], least and
    largest input; NaN of a call that did not reach it."""

    name = "tfmq_calibration"
    paper = PAPER
    Config = TFMQConfig
    State = Seen
    config: TFMQConfig

    def check(self, target: Target) -> None:
        for denoiser in target.denoisers.values():
            ensure_known(denoiser)

    def modules(self, call: ModulesCall, next: Any) -> None:
        weights, _ = bits_in(self.config.bits)
        for layer in wanted(call.denoisers, self.config):
            grid = None if weights == FLOAT else UniformAffine(weights, "channel")
            new = quantised(layer.module, grid, scale_of=searched_scale)
            new.switch(False)
            new.show(self.seeing(layer.key))
            put(call.swap, layer, new)
        next(call)

    def seeing(self, key: str) -> Any:
        """What a layer shows its inputs to."""

        def see(x: Tensor, name: str = self.name) -> None:
            seen: Seen | None = run.shared(name) if (run := now()) is not None else None
            if seen is not None and seen.at is not None and x.numel() > 0:
                ends, old = torch.stack([x.detach().amin(), x.detach().amax()]).float(), seen.ends.setdefault(key, {}).get(seen.at)
                seen.ends[key][seen.at] = ends if old is None else torch.stack([torch.minimum(ends, old)[0], torch.maximum(ends, old)[1]])

        return see

    def denoise(self, call: DenoiseCall, next: Any) -> Tensor:
        seen: Seen = call.shared
        seen.at = call.step.call
        seen.times[seen.at] = call.step.t.detach().float().reshape(())
        if seen.added is None:
            seen.added = added(call).detach().float()
        try:
            return next(call)  # type: ignore[no-any-return]
        finally:
            seen.at = None

    def collect(self, call: RunCall) -> dict[str, Tensor]:
        seen: Seen = call.shared
        calls = sorted(seen.times)
        nothing = torch.full((2,), torch.nan)
        ensure_finite({key: torch.stack(list(ends.values())) for key, ends in seen.ends.items()}, "tfmq")
        ends = {f"ends.{key}": torch.stack([each.get(i, nothing).cpu() for i in calls]) for key, each in seen.ends.items()}
        assert seen.added is not None
        return {"times": torch.stack([seen.times[i].cpu() for i in calls]), "added": seen.added.cpu(), **ends}

    def summarise(self, records: Sequence[dict[str, Tensor]], target: Target) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """ "times" [timesteps], falling; "scales" and "up" of all layers, packed."""
        times, low, high = by_timestep(records)
        layers = {m.key: m for model in target.denoisers.values() for m in model.modules() if isinstance(m, (QuantLinear, QuantConv2d))}
        for layer in layers.values():
            layer.show(None)
        _, bits = bits_in(self.config.bits)
        grid = None if bits == FLOAT else UniformAffine(bits)
        for key, layer in layers.items() if grid is not None else ():
            if key in low and not is_temporal(key.partition(".")[2]):
                self.fix(layer, low[key], high[key], grid)
        rows = torch.cat([record["added"] for record in records])
        pairs = Pairs(times, rows.unique(dim=0) if rows.shape[1] else rows[:1])
        facts: dict[str, Any] = {"plan": plan_of(self.config), "distance": [], "cosine": []}
        for model in target.denoisers.values():
            for name, value in self.maintain(TimePath(model), pairs, grid).items():
                facts[name] += value
        tensors, shapes = keep(layers)
        kept = {"times": times, "scales": tensors["scales"]}
        return {**kept, **({"up": tensors["up"]} if shapes["up"] else {})}, {**facts, **shapes}

    def fix(self, layer: QuantLayer, low: Tensor, high: Tensor, grid: UniformAffine, pick: Pick = lambda: 0) -> None:
        """Give a layer's inputs their scales."""
        delta, zero = finite_set(low, high, grid, self.config.scales == "one")
        layer.round_inputs([SeveralScales(grid, Scale(delta.to(layer.weight.device), zero.to(layer.weight.device)), pick)])

    def maintain(self, path: TimePath, pairs: Pairs, grid: UniformAffine | None) -> dict[str, list[float]]:
        """Reconstruct the time path and give its inputs their scales; no picture is looked at.

        Returns TIAR's "distance" and the "cosine" of the features, each rounded to the nearest and as kept, inputs in floats.
        """
        layers = [layer for stage in path.stages() for layer in stage]

        def rounded(chosen: list[int]) -> Tensor:
            return path(*pairs.of(chosen))

        @torch.no_grad()
        def exact(chosen: list[int]) -> Tensor:
            with inactive(layers):
                return path(*pairs.of(chosen))

        for layer in layers:
            layer.switch(True)
        every = range(0, len(pairs), max(len(pairs) // MOST, 1))
        before = cosine(rounded, exact, every)
        recipe = Recipe(steps=self.config.iterations, weight=self.config.rounding)
        if recipe.steps:
            losses = learn_rounding(rounded, exact, len(pairs), layers, recipe)
        else:
            near = mean_distance(rounded, exact, len(pairs), recipe)
            losses = Losses(near, near, kept=False)
        after = cosine(rounded, exact, every)
        for layer in layers if grid is not None else ():
            self.fix(layer, *finite_ranges(path, layer, pairs), grid, path.pick)
        return {"distance": [losses.before, losses.after if losses.kept else losses.before], "cosine": [before, after]}


@dataclass(frozen=True)
class Pairs:
    """Each timestep [T] with each vector that is added to its embedding [A, channels]."""

    times: Tensor
    added: Tensor

    def __len__(self) -> int:
        return len(self.times) * len(self.added)

    def of(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(timesteps, vectors) of the pairs of these numbers."""
        at = torch.tensor(numbers)
        return self.times[at // len(self.added)], self.added[at % len(self.added)]


@contextmanager
def inactive(layers: Sequence[QuantLinear]) -> Iterator[None]:
    """Let layers compute what they stand for."""
    for layer in layers:
        layer.switch(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.switch(True)


@torch.no_grad()
def cosine(rounded: Outputs, exact: Outputs, numbers: Sequence[int]) -> float:
    """Mean cosine between temporal features of these pairs."""
    found = [similarity(rounded([i]), exact([i])) for i in numbers]
    return float(torch.stack(found).mean())


@torch.no_grad()
def finite_ranges(path: TimePath, layer: QuantLinear, pairs: Pairs) -> tuple[Tensor, Tensor]:
    """(least, largest) input of a layer of the time path [timesteps], with what comes before it as it is quantised by now."""
    ends = []
    for number in range(len(pairs.times)):
        path.at = number
        first = number * len(pairs.added)
        chosen = list(range(first, first + len(pairs.added)))
        ends.append(ranges_of(layer, lambda chosen=chosen: path(*pairs.of(chosen))))
    return torch.stack([low for low, _ in ends]).cpu(), torch.stack([high for _, high in ends]).cpu()


def by_timestep(records: Sequence[dict[str, Tensor]]) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
    """(timesteps, falling; least and largest input by layer [timesteps]): the extremes over all records.

    A mean of the records' extremes would cut off what most of them hold, at any number of bits.

    Raises:
        ConfigError: the records are of other timesteps.
    """
    calls = records[0]["times"]
    times = calls.unique().flip(0)  # some schedulers ask twice at one
    low: dict[str, Tensor] = {}
    high: dict[str, Tensor] = {}
    for record in records:
        if not torch.equal(record["times"], calls):
            raise ConfigError(
                "plugin 'tfmq': the calibration's runs had different timesteps, and inputs have a scale for each: use one schedule"
            )
        for name, ends in record.items():
            what, _, key = name.partition(".")
            if what == "ends":
                of_time = [ends[calls == t] for t in times]
                least = torch.stack([each[:, 0].nan_to_num(torch.inf).amin() for each in of_time])
                most = torch.stack([each[:, 1].nan_to_num(-torch.inf).amax() for each in of_time])
                low[key] = torch.minimum(low.get(key, least), least)
                high[key] = torch.maximum(high.get(key, most), most)
    for key, least in low.items():
        # a timestep at which nothing came to the layer: the range of all
        low[key] = torch.where(least.isfinite(), least, least.amin())
        high[key] = torch.where(least.isfinite(), high[key], high[key].amax())
    return times, low, high
