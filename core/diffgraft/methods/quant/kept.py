"""What an artefact keeps of quantised layers: their scales and how their weights are rounded; the weights themselves are the model's.

Tensors of many shapes (one a layer) are one flat tensor, and the shapes are among the facts.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from pydantic import ValidationError
from torch import Tensor

from diffgraft.installed.config import PluginConfig
from diffgraft.installed.errors import ArtefactMismatch
from diffgraft.installed.foreign import brief
from diffgraft.installed.foreign import said as foreign
from diffgraft.methods.artefacts import Artefact
from diffgraft.methods.quant.affine import Scale
from diffgraft.methods.quant.layers import QuantLayer, Weights
from diffgraft.methods.quant.rounding import balanced

Shapes = dict[str, list[int]]
C = TypeVar("C", bound=PluginConfig)


def packed(values: Mapping[str, Tensor]) -> tuple[Tensor, Shapes]:
    """(all values in the order of their names [n], name -> shape); the values are of one dtype."""
    names = sorted(values)
    flat = torch.cat([values[name].reshape(-1) for name in names]) if names else torch.zeros(0)
    return flat, {name: list(values[name].shape) for name in names}


def unpacked(flat: Tensor, shapes: Mapping[str, list[int]]) -> dict[str, Tensor]:
    """The values by name, as they were packed, bit for bit."""
    names = sorted(shapes)
    parts = flat.split([math.prod(shapes[name]) for name in names])
    return {name: part.reshape(shapes[name]) for name, part in zip(names, parts, strict=True)}


def misfit(flat: Tensor, shapes: Mapping[str, list[int]]) -> str | None:
    """What is wrong with a flat tensor and shapes that were read from a file, or None."""
    if wrong := next((name for name, shape in shapes.items() if not shape or min(shape) < 1), None):
        return f"the shape of {wrong!r} is {shapes[wrong]}"
    told = sum(math.prod(shape) for shape in shapes.values())
    return None if told == flat.numel() else f"it holds {flat.numel()} values, and its shapes say {told}"


def state_of(layer: QuantLayer) -> dict[str, Tensor]:
    """Scales (float32) of a layer's weights, and of its activations where fixed; what is rounded up (bool) where it was learned."""
    found: dict[str, Tensor] = {}
    for i, weights in enumerate(layer.weights):
        for j, scale in enumerate(weights.scales):  # type: ignore[arg-type]
            found |= {f"weights.{i}.{j}.delta": scale.delta, f"weights.{i}.{j}.zero": scale.zero}
        if weights.up is not None:
            found[f"weights.{i}.up"] = weights.up  # type: ignore[assignment]
    for name, rounder in layer.rounders().items():
        if rounder.fixed is not None:
            found |= {f"{name}.delta": rounder.fixed.delta, f"{name}.zero": rounder.fixed.zero}
    return found


def keep(layers: Mapping[str, QuantLayer]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors "scales" and "up", facts "scales" and "up") of an artefact for these layers, by their keys."""
    states = {f"{key}/{name}": value for key, layer in layers.items() for name, value in state_of(layer).items()}
    kinds = {"scales": torch.float32, "up": torch.bool}
    made = {kind: packed({name: v.cpu() for name, v in states.items() if v.dtype == dtype}) for kind, dtype in kinds.items()}
    return {kind: flat.to(kinds[kind]) for kind, (flat, _) in made.items()}, {kind: shapes for kind, (_, shapes) in made.items()}


def as_made(config: C, artefact: Artefact | None, names: Iterable[str] | None = None) -> C:
    """The knobs of a run: where nothing was said, those that the artefact was made for.

    Args:
        names: which of its facts are knobs; None: all in its fact ``plan``.

    Raises:
        ArtefactMismatch: it says what no knob takes.
    """
    facts = {} if artefact is None else artefact.facts
    plan = facts.get("plan", {}) if names is None else {name: facts[name] for name in names if name in facts}
    unsaid = {name: value for name, value in plan.items() if name in type(config).model_fields and name not in config.model_fields_set}
    said = {name: getattr(config, name) for name in config.model_fields_set}
    try:
        return type(config)(**said, **unsaid)
    except ValidationError as error:
        raise ArtefactMismatch(f"the artefact says that it was made for {brief(unsaid)}: {foreign(error)}") from error


def ensure_made_for(facts: Mapping[str, Any], config: PluginConfig, keys: Iterable[str], plugin: str, again: str) -> None:
    """Raises ArtefactMismatch where knobs that were said are others than those an artefact was made for (its fact ``plan``), or a layer's
    key is not in it. ``again``: how another one is made."""
    plan = facts["plan"]
    said = config.model_dump(mode="json", include=config.model_fields_set & plan.keys())
    if differing := [name for name in plan if name in said and said[name] != plan[name]]:
        told = "; ".join(f"{name} = {said[name]!r}, and it was made for {plan[name]!r}" for name in differing)
        fits = ", ".join(f"{name}={plan[name]!r}" for name in differing)
        raise ArtefactMismatch(f"{plugin}: the artefact is of other settings: {told}; take {fits}, or {again}")
    known = {name.partition("/")[0] for name in facts["scales"]}
    if lost := next((key for key in keys if key not in known), None):
        raise ArtefactMismatch(f"{plugin}: the artefact says nothing of the layer {lost}; {again}")


@torch.no_grad()
def fill(layers: Mapping[str, QuantLayer], tensors: Mapping[str, Tensor], facts: Mapping[str, Any], again: str) -> None:
    """The same as :func:`restore`, for layers whose activations are not measured yet, and a file that may lack what is empty."""
    measured = {name.partition("/")[0] for name in facts["scales"] if "/weights." not in name}
    for key in measured & layers.keys():
        for rounder in layers[key].rounders().values():
            one = torch.ones(1, device=layers[key].weight.device)
            rounder.fix(Scale(one, torch.zeros_like(one)))
    restore(layers, {"scales": torch.zeros(0), "up": torch.zeros(0, dtype=torch.bool), **tensors}, facts, again)


@torch.no_grad()
def restore(layers: Mapping[str, QuantLayer], tensors: Mapping[str, Tensor], facts: Mapping[str, Any], again: str) -> None:
    """Give layers, made with the same grids, parts and ranges, what :func:`keep` took of others: they compute the same, bit for bit.

    Raises:
        ArtefactMismatch: a layer that the artefact does not hold, or holds in other parts; nothing is changed. ``again``: the way out.
    """
    states = unpacked(tensors["scales"], facts["scales"]) | unpacked(tensors["up"], facts["up"])
    for key, layer in layers.items():
        own = state_of(layer)
        theirs = [name.removeprefix(f"{key}/") for name in states if name.startswith(f"{key}/") and not name.endswith(".up")]
        if more := next((name for name in theirs if name not in own), None):
            raise ArtefactMismatch(f"{key}: the artefact holds {more}, and here is nothing of the kind; {again}")
        for name, value in own.items():
            found = states.get(f"{key}/{name}")
            if found is None and not name.endswith(".up"):
                raise ArtefactMismatch(f"{key}: the artefact holds no {name}; {again}")
            if found is not None and found.shape != value.shape:
                raise ArtefactMismatch(f"{key}: {name} has shape {tuple(found.shape)} in the artefact, here {tuple(value.shape)}; {again}")
    for key, layer in layers.items():
        for i, weights in enumerate(layer.weights):
            assert isinstance(weights, Weights)
            for j in range(len(weights.sizes)):
                for name in ("delta", "zero"):
                    setattr(weights, f"{name}{j}", states[f"{key}/weights.{i}.{j}.{name}"].to(weights.value.device))
            up = states.get(f"{key}/weights.{i}.up")
            weights.up = None if up is None else up.to(weights.value.device)
            weights.value = weights.rounded(balanced(layer, i), weights.up).to(weights.value.dtype)
        for name, rounder in layer.rounders().items():
            if rounder.fixed is not None:
                rounder.fix(Scale(*(states[f"{key}/{name}.{part}"].to(layer.weight.device) for part in Scale._fields)))
