"""Tensors of many shapes (one a layer) as an artefact keeps them: one flat tensor, and the shapes among its facts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

Shapes = dict[str, list[int]]


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
